"""What is verified: a bundle, the graph that it was made from, and the weights that it should hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketlm.bundle import Bundle
from pocketlm.errors import InputError
from pocketlm.manifest import Weight
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.reading import Reader, WrittenMatrix
from pocketlm_export.checkpoint.adapter import with_adapter
from pocketlm_export.checkpoint.checkpoint import Checkpoint, Tensors, open_checkpoint, read_configuration
from pocketlm_export.checkpoint.hub import locate
from pocketlm_export.graph.graph import Graph
from pocketlm_export.quantization.rounding import dequantize_rows
from pocketlm_export.quantization.schemes import SchemeRow, scheme_row
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import Weights, quantize
from pocketlm_export.verify.lockstep import WeightSource
from pocketlm_export.verify.structure import row_ranges

__all__ = ["ArtifactWeights", "OriginalWeights", "Subject", "open_subject"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Subject:
    """``weights``: the store's; None if they can only be read from an artifact. ``originals``: the
    values of ``checkpoint``; both None where it was not given."""

    bundle: Bundle
    graph: Graph
    weights: WeightSource | None = None
    originals: "OriginalWeights | None" = None
    checkpoint: Checkpoint | None = None


class OriginalWeights:
    """A checkpoint's own values, none quantized."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def row(self, name: str) -> SchemeRow | None:  # noqa: ARG002
        """None: all values are kept."""
        return None

    def values(self, name: str) -> Floats:
        """A whole vector."""
        return self._tensors.values(name)

    def blocks(self, name: str) -> Iterator[tuple[int, Floats]]:
        """``(first row, values)``."""
        return self._tensors.blocks(name)

    def release(self) -> None:
        """Let the kernel drop mapped pages."""
        self._tensors.release()


class ArtifactWeights:
    """The weights as one artifact of the bundle holds them: what a bundle is verified with when it is all there is.

    Level 1 holds every artifact, this one too, against the manifest's hash of each weight.
    """

    def __init__(self, bundle: Bundle, target: str, reader: Reader) -> None:
        self._manifest, self._target, self._reader = bundle.manifest, target, reader
        self.exact = reader.stored.value is np.float32
        """Whether values that aren't quantized are as the checkpoint had them."""

    def row(self, name: str) -> SchemeRow | None:
        """The row of the weight's scheme."""
        return _stated_row(self._manifest.weights[name])

    def values(self, name: str) -> Floats:
        """A whole vector."""
        return np.concatenate([values for _, values in self.blocks(name)])

    def blocks(self, name: str) -> Iterator[tuple[int, Floats]]:
        """``(first row, values)``, dequantized."""
        weight = self._manifest.weights[name]
        place = weight.places[self._target]
        for start, stop in row_ranges(weight.shape):
            found = self._reader.rows(place.entry, place.first_row + start, place.first_row + stop)
            yield start, dequantize_rows(found.codes, found.scales) if isinstance(found, WrittenMatrix) else found

    def release(self) -> None:
        """Nothing to do: a reader maps what it is asked for."""


def open_subject(
    bundle: Bundle,
    reference: str | None,
    adapter: Path | None,
    store: WeightStore,
    advance: Callable[[str, int], None],
) -> Subject:
    """The subject of ``pocketlm verify``; ``reference`` is a folder or ``org/name[@revision]``, ``adapter`` a folder.

    Raises :class:`InputError` if that is not the checkpoint that the bundle was made from, or not its adapter.
    """
    manifest = bundle.manifest
    accepted = manifest.provenance.accepted
    if reference is None:
        if adapter is not None:
            raise InputError("an adapter is merged into the checkpoint: give that with --reference")
        bundle.check_files("config.json")
        config = read_configuration(bundle.folder, accepted)
        return Subject(bundle, build_graph(config, manifest.model.context_length))
    checkpoint = open_checkpoint(locate(reference), accepted)
    if adapter is not None:
        checkpoint = with_adapter(checkpoint, adapter, accepted)
    _require_same_adapter(bundle, checkpoint)
    graph = build_graph(checkpoint.config, manifest.model.context_length)
    checkpoint.check_tensors(graph.weights(), accepted)
    checkpoint.check_saved_head(accepted)
    if checkpoint.digest(graph.weights()) != manifest.provenance.checkpoint_sha256:
        raise InputError(f"{reference}: not the checkpoint that {bundle.folder} was made from: its hash differs")
    weights = quantize(checkpoint.tensors, scheme_rows(bundle), store, advance)
    return exported_subject(bundle, graph, weights, checkpoint)


def _require_same_adapter(bundle: Bundle, checkpoint: Checkpoint) -> None:
    stated, found = bundle.manifest.provenance.adapter_sha256, checkpoint.tensors.changes_digest()
    if found == stated:
        return
    if found is None:
        raise InputError(f"{bundle.folder}: was made with an adapter: give it with --adapter")
    made = "without an adapter" if stated is None else "with another adapter: the hash differs"
    raise InputError(f"{checkpoint.adapter}: {bundle.folder} was made {made}")


def exported_subject(bundle: Bundle, graph: Graph, weights: Weights, checkpoint: Checkpoint) -> Subject:
    """The subject at the end of an export."""
    return Subject(bundle, graph, weights, OriginalWeights(checkpoint.tensors), checkpoint)


def scheme_rows(bundle: Bundle) -> Mapping[str, SchemeRow | None]:
    """The scheme row of each weight, as the manifest states it."""
    return {name: _stated_row(weight) for name, weight in bundle.manifest.weights.items()}


def _stated_row(weight: Weight) -> SchemeRow | None:
    return scheme_row(weight.scheme, weight.group)
