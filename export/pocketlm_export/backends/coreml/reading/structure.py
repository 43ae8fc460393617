"""What one function of a written program states beside its weights, in the form that the package's format has.

Followed back from each inverse root (a norm), each softmax (an attention) and each gelu. A program in another form is
refused by name: what isn't understood is not read.
"""

from dataclasses import dataclass

from pocketlm_export.backends.coreml.reading.attention import WrittenAttention, attention_of, mixings
from pocketlm_export.backends.coreml.reading.experts import WrittenExperts, read_experts
from pocketlm_export.backends.coreml.reading.norms import read_epsilons
from pocketlm_export.backends.coreml.reading.pointwise import Bounds, read_clamps, read_gelus, read_scales
from pocketlm_export.backends.coreml.reading.positions import Positions, read_positions
from pocketlm_export.backends.coreml.reading.walk import Walk
from pocketlm_export.backends.coreml.reading.written import WrittenPackage

__all__ = ["Structure", "read_structure"]


@dataclass(frozen=True, slots=True)
class Structure:
    """``epsilons`` of the norms, ``attentions``, factors of ``scales``, bounds of ``clamps`` and ``experts`` in
    the order of execution, an attention's norms included."""

    positions: Positions
    epsilons: tuple[float, ...]
    attentions: tuple[WrittenAttention, ...]
    scales: tuple[float, ...]
    clamps: tuple[Bounds, ...]
    experts: tuple[WrittenExperts, ...]
    vocabulary_size: int


def read_structure(package: WrittenPackage, function: str) -> Structure:
    """Raises :class:`pocketlm.BundleError` naming file, function and value for another form."""
    walk = Walk(package, function)
    positions = read_positions(walk)
    epsilons = tuple(read_epsilons(walk))
    attentions = tuple(attention_of(walk, positions, layer, mixing) for layer, mixing in enumerate(mixings(walk)))
    experts = tuple(read_experts(walk))
    read_gelus(walk)
    # What is left of the numbers, now that all else has been read, are the graph's own scales and clamps.
    scales, clamps = tuple(read_scales(walk)), tuple(read_clamps(walk))
    return Structure(positions, epsilons, attentions, scales, clamps, experts, _vocabulary_size(walk))


def _vocabulary_size(walk: Walk) -> int:
    """Of what a linear makes, scaled and capped or not."""
    shape, name = walk.package.output_shape(walk.function, "logits"), "logits"
    while walk.kind_of(name) in ("mul", "tanh"):
        name = walk.maker(name, walk.kind_of(name)).inputs["x"][0]
    if walk.kind_of(name) != "linear" or len(shape) != 3 or shape[2] is None:
        raise walk.refused(name, f"made by {walk.kind_of(name)}, {list(shape)}, where a linear is expected")
    return shape[2]
