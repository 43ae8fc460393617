"""The norms of a written program, followed back from their inverse roots."""

from collections.abc import Iterator

from pocketlm_export.backends.coreml.reading.walk import Walk
from pocketlm_export.backends.coreml.reading.written import WrittenOperator

__all__ = ["read_epsilons"]

SMALLEST_MAXIMUM = 2.0**-10


def read_epsilons(walk: Walk) -> Iterator[float]:
    """Of each norm in the order of execution. Raises :class:`pocketlm.BundleError` for one that has another form."""
    for inverse in walk.of_kind("rsqrt"):
        walk.expect(inverse, epsilon=0.0)
        yield _epsilon(walk, inverse)


def _epsilon(walk: Walk, inverse: WrittenOperator) -> float:
    """Of ``rsqrt(mean(y^2) + (root/m)^2)``, where y is x/m or, in a layer norm, x/m less its mean: root is stated."""
    total = walk.maker(inverse.inputs["x"][0], "add")
    mean = walk.maker(total.inputs["x"][0], "reduce_mean")
    walk.expect(mean, axes=[-1], keep_dims=True)
    scaled = walk.maker(_uncentered(walk, _root_of_square(walk, mean.inputs["x"][0])), "real_div")
    ratio, below = _root_of_square(walk, total.inputs["y"][0]), 1.0
    if walk.kind_of(ratio) == "mul":
        smaller = walk.maker(ratio, "mul")
        ratio, below = smaller.inputs["x"][0], walk.number(smaller, "y")
    root = walk.maker(ratio, "real_div")
    divisor = walk.same([*scaled.inputs["y"], *root.inputs["y"]], "a norm's divisors differ")
    floor = walk.maker(divisor, "maximum")
    walk.expect(floor, y=SMALLEST_MAXIMUM)
    largest = walk.maker(floor.inputs["x"][0], "reduce_max")
    walk.expect(largest, axes=[-1], keep_dims=True)
    walk.same([walk.chain(largest.inputs["x"][0], ("abs", "x")), *scaled.inputs["x"]], "a norm of two values")
    return (walk.number(root, "x") * below) ** 2


def _root_of_square(walk: Walk, name: str) -> str:
    squared = walk.maker(name, "mul")
    return walk.same([*squared.inputs["x"], *squared.inputs["y"]], "not a square")


def _uncentered(walk: Walk, name: str) -> str:
    """What a layer norm takes the mean from, and that this mean is its own; ``name`` in an RMS norm."""
    if walk.kind_of(name) != "sub":
        return name
    centered = walk.maker(name, "sub")
    mean = walk.maker(centered.inputs["y"][0], "reduce_mean")
    walk.expect(mean, axes=[-1], keep_dims=True)
    return walk.same([*centered.inputs["x"], *mean.inputs["x"]], "less the mean of something else")
