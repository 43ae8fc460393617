"""What one function of a written program states beside its weights, in the form that the package's format has.

Followed back from each inverse root (a norm) and each softmax (an attention). A program in another form is refused by
name: what isn't understood is not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pocketlm_export.backends.coreml.reading.attention import WrittenAttention, attention_of, mixings
from pocketlm_export.backends.coreml.reading.positions import Positions, read_positions
from pocketlm_export.backends.coreml.reading.walk import Walk
from pocketlm_export.backends.coreml.reading.written import WrittenOperator, WrittenPackage

__all__ = ["Structure", "read_structure"]

SMALLEST_MAXIMUM = 2.0**-10


@dataclass(frozen=True, slots=True)
class Structure:
    """``epsilons`` of the norms and ``attentions`` in the order of execution, an attention's norms included."""

    positions: Positions
    epsilons: tuple[float, ...]
    attentions: tuple[WrittenAttention, ...]
    vocabulary_size: int


def read_structure(package: WrittenPackage, function: str) -> Structure:
    """Raises :class:`pocketlm.BundleError` naming file, function and value for another form."""
    walk = Walk(package, function)
    positions = read_positions(walk)
    return Structure(
        positions,
        tuple(_norms(walk)),
        tuple(attention_of(walk, positions, layer, mixing) for layer, mixing in enumerate(mixings(walk))),
        _vocabulary_size(walk),
    )


def _norms(walk: Walk) -> Iterator[float]:
    for inverse in walk.of_kind("rsqrt"):
        walk.expect(inverse, epsilon=0.0)
        yield _epsilon(walk, inverse)


def _epsilon(walk: Walk, inverse: WrittenOperator) -> float:
    """Of ``rsqrt(mean((x/m)^2) + (root/m)^2)``, m = max(max|x|, floor): root is stated, in fp16."""
    total = walk.maker(inverse.inputs["x"][0], "add")
    mean = walk.maker(total.inputs["x"][0], "reduce_mean")
    squared = walk.maker(mean.inputs["x"][0], "mul")
    scaled = walk.maker(walk.same([*squared.inputs["x"], *squared.inputs["y"]], "not a square"), "real_div")
    root_squared = walk.maker(total.inputs["y"][0], "mul")
    root = walk.maker(walk.same([*root_squared.inputs["x"], *root_squared.inputs["y"]], "not a square"), "real_div")
    divisor = walk.same([*scaled.inputs["y"], *root.inputs["y"]], "a norm's divisors differ")
    floor = walk.maker(divisor, "maximum")
    walk.expect(floor, y=SMALLEST_MAXIMUM)
    largest = walk.maker(floor.inputs["x"][0], "reduce_max")
    for reduction in (mean, largest):
        walk.expect(reduction, axes=[-1], keep_dims=True)
    walk.same([walk.chain(largest.inputs["x"][0], ("abs", "x")), *scaled.inputs["x"]], "a norm of two values")
    return walk.number(root, "x") ** 2


def _vocabulary_size(walk: Walk) -> int:
    shape = walk.package.output_shape(walk.function, "logits")
    if walk.kind_of("logits") != "linear" or len(shape) != 3 or shape[2] is None:
        raise walk.refused("logits", f"made by {walk.kind_of('logits')}, {list(shape)}, where a linear is expected")
    return shape[2]
