"""What delegates state about scales and clamps: operations of a ``[1, S, width]`` value with a number.

Numbers inside a gelu are its own: ``x * sigmoid(a x (b + (c x)^2))``.
"""

from collections.abc import Iterator

from pocketlm_export.backends.executorch.reading.attention import number
from pocketlm_export.backends.executorch.reading.payload import Payload, PayloadNode
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import DelegateStep
from pocketlm_export.backends.reading import Fact

__all__ = ["elementwise_facts"]


def elementwise_facts(file: PteFile) -> Iterator[Fact]:
    """``scale I`` and ``clamp I`` in the order of execution."""
    factors: list[float] = []
    clamps: list[dict[str, float | None]] = []
    for step in file.steps:
        if not isinstance(step, DelegateStep):
            continue
        payload = file.delegates[step.index]
        inner, lower = _inside_a_gelu(payload), -1
        for node in payload.nodes:
            value = _number_of(file, step, payload, node)
            if value is None or node.output in inner:
                continue
            if node.kind == "Multiply":
                factors.append(value)
            elif node.kind == "Maximum":
                clamps.append({"least": value, "most": None})
                lower = node.output
            elif node.kind == "Minimum" and node.inputs[0] == lower:
                clamps[-1]["most"] = value
            elif node.kind == "Minimum":
                clamps.append({"least": None, "most": value})
    for index, factor in enumerate(factors):
        yield Fact(f"scale {index}", "factor", factor)
    for index, bounds in enumerate(clamps):
        for name, bound in bounds.items():
            yield Fact(f"clamp {index}", name, bound)


def _number_of(file: PteFile, step: DelegateStep, payload: Payload, node: PayloadNode) -> float | None:
    """The number that ``node`` combines a ``[1, S, width]`` value with; None if it does not."""
    if len(node.inputs) != 2 or len(payload.values[node.inputs[0]].shape) != 3:
        return None
    return number(file, step, node.inputs[1])


def _inside_a_gelu(payload: Payload) -> set[int]:
    """The values that the scales inside of each gelu make."""
    found: set[int] = set()
    for node in payload.nodes:
        product = payload.producers.get(node.inputs[0]) if node.kind == "Sigmoid" else None
        if product is None or product.kind != "Multiply":
            continue
        cubic = payload.producers.get(product.inputs[1])
        squared = payload.producers.get(cubic.inputs[0]) if cubic is not None and cubic.kind == "Add" else None
        if squared is not None and squared.kind == "Square":
            found |= {product.inputs[0], squared.inputs[0]}
    return found
