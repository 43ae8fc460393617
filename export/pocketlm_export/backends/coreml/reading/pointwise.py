"""The scales and clamps of a written program: products and bounds with numbers that belong to nothing larger."""

from collections.abc import Iterator

from pocketlm_export.backends.coreml.reading.walk import Walk

__all__ = ["Bounds", "read_clamps", "read_gelus", "read_scales"]

GELU_BOUND = 8.0
Bounds = tuple[float | None, float | None]


def read_gelus(walk: Walk) -> None:
    """Raises :class:`pocketlm.BundleError` where gelu by tanh isn't ``gelu(clip(x)) + (max(x, bound) - bound)``."""
    for gelu in walk.of_kind("gelu"):
        if gelu.attributes.get("mode") != "TANH_APPROXIMATION":
            walk.expect(gelu, mode="EXACT")
            continue
        near = walk.maker(gelu.inputs["x"][0], "clip")
        walk.expect(near, alpha=-GELU_BOUND, beta=GELU_BOUND)
        total = walk.reader(gelu.outputs[0], "add")
        walk.same([*total.inputs["x"], *gelu.outputs], "not what lies near added to what lies beyond")
        beyond = walk.maker(total.inputs["y"][0], "sub")
        walk.expect(beyond, y=GELU_BOUND)
        larger = walk.maker(beyond.inputs["x"][0], "maximum")
        walk.expect(larger, y=GELU_BOUND)
        walk.same([*near.inputs["x"], *larger.inputs["x"]], "gelu of two values")


def read_scales(walk: Walk) -> Iterator[float]:
    """The factors, in the order of execution, once all else that multiplies by a number has been read."""
    for product in walk.of_kind("mul"):
        if walk.is_unread(product, "y"):
            yield walk.number(product, "y")


def read_clamps(walk: Walk) -> Iterator[Bounds]:
    """The least and the most of each, in the order of execution, once all else with a bound has been read."""
    for operator in walk.operators:
        match operator.kind:
            case "clip" if walk.is_unread(operator, "alpha"):
                yield walk.number(operator, "alpha"), walk.number(operator, "beta")
            case "maximum" if walk.is_unread(operator, "y"):
                yield walk.number(operator, "y"), None
            case "minimum" if walk.is_unread(operator, "y"):
                yield None, walk.number(operator, "y")
            case _:
                pass
