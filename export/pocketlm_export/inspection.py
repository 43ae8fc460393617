"""What can be said of a checkpoint before any work, from headers and without torch: sizes and memory."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pocketlm.errors import UnsupportedError
from pocketlm.manifest import SchemeName
from pocketlm_export.architectures import DecoderConfig
from pocketlm_export.backends.base import TARGETS, load_backend
from pocketlm_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pocketlm_export.checkpoint.hub import locate
from pocketlm_export.checkpoint.neutral import NEUTRAL_TENSORS
from pocketlm_export.checkpoint.tensors import FLOAT_TYPES
from pocketlm_export.pipeline import resolve_context
from pocketlm_export.quantization.schemes import HEADS, SCHEMES, assign_rows, fitting_row, stored_bits

__all__ = ["CheckpointReport", "check_targets", "inspect_checkpoint"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """``weight_bytes`` is the size of the weights in the store by scheme, embedding and head in int8.

    ``kv_values`` is how many values the key/value cache of ``context_length`` positions holds.
    """

    source: str
    config: DecoderConfig
    context_length: int
    dtypes: Mapping[str, int]
    parameters: int
    weight_bytes: Mapping[str, int]
    kv_values: int
    has_chat_template: bool
    stop_ids: tuple[int, ...]


def inspect_checkpoint(
    source: str, *, context_length: int | None = None, accept: Collection[str] = ()
) -> CheckpointReport:
    """Read configuration and tensor headers of ``source``, a folder or ``org/name[@revision]``.

    Raises :class:`UnsupportedError` for a model that can't be exported, :class:`CheckpointError` for a broken one.
    """
    checkpoint = open_checkpoint(locate(source), accept)
    config, context = checkpoint.config, resolve_context(checkpoint, context_length)
    shapes = _shapes(checkpoint, accept)
    dtypes: dict[str, int] = {}
    for name, shape in shapes.items():
        dtype = checkpoint.tensors.source(name).tensors[name].dtype
        if dtype not in FLOAT_TYPES:
            raise UnsupportedError(
                f"{checkpoint.tensors.source(name).path}: {name} has dtype {dtype}; supported: "
                f"{', '.join(sorted(FLOAT_TYPES))}. A quantized checkpoint can't be exported: take the original one"
            )
        dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(shape)
    return CheckpointReport(
        source=source,
        config=config,
        context_length=context,
        dtypes=dtypes,
        parameters=sum(dtypes.values()),
        weight_bytes={scheme: _weight_bytes(shapes, scheme) for scheme in SCHEMES},
        kv_values=2 * len(config.layers) * config.kv_heads * config.head_dim * context,
        has_chat_template=_has_chat_template(checkpoint),
        stop_ids=checkpoint.generation.stop_ids,
    )


def check_targets(source: str, *, accept: Collection[str] = ()) -> dict[str, str | None]:
    """Trace the model and ask each backend: the reason why a target can't express it, None where it can.

    Imports torch and takes some seconds; no weight is read.
    """
    from pocketlm_export.graph.trace import trace

    checkpoint = open_checkpoint(locate(source), accept)
    graph = trace(checkpoint.config, resolve_context(checkpoint, None))
    checkpoint.check_tensors(graph.weights(), accept)
    reasons: dict[str, str | None] = {}
    for target in TARGETS:
        try:
            load_backend(target).check(graph, assign_rows(graph, "int4", "int8"))
            reasons[target] = None
        except UnsupportedError as error:
            reasons[target] = str(error)
    return reasons


def _shapes(checkpoint: Checkpoint, accept: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The tensors that an export would read; a saved copy of a tied head is none."""
    return {
        name: checkpoint.tensors.shape(name)
        for name in checkpoint.tensors.names()
        if name not in accept and not NEUTRAL_TENSORS.fullmatch(name) and not (name == HEAD and checkpoint.config.tied)
    }


def _weight_bytes(shapes: Mapping[str, tuple[int, ...]], scheme: SchemeName) -> int:
    bits = 0
    for name, shape in shapes.items():
        row = SCHEMES[scheme]
        if row is not None:
            row = HEADS["int8"] if name in (EMBEDDING, HEAD) else row if len(shape) == 2 else None
        bits += stored_bits(fitting_row(row, shape), shape)
    return bits // 8


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    from pocketlm.template import ChatTemplate

    return ChatTemplate.open(checkpoint.folder) is not None
