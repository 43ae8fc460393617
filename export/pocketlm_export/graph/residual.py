"""A rewrite for runtimes whose numbers a family's residual leaves: it is held times a power of two."""

from collections.abc import Mapping
from dataclasses import replace

from pocketlm.errors import UnsupportedError
from pocketlm_export.graph.graph import (
    Add,
    Graph,
    Linear,
    Multiply,
    Node,
    Norm,
    Scale,
    Value,
    inputs_of,
    outputs_of,
    substitute,
)

__all__ = ["shift_residual"]


def shift_residual(graph: Graph, shift: int) -> Graph:
    """The residual times ``2^-shift``: what begins it and what is added to it is scaled, and the epsilon of each norm
    that reads it by the square. What comes out is the same.

    Raises :class:`UnsupportedError` naming what reads the residual and is no norm.
    """
    if not shift:
        return graph
    factor = 2.0**-shift
    residual, parts = _residual(graph)
    scaled = {_first_scalable(graph, part) for part in parts}
    renamed: dict[Value, Value] = {}
    nodes: list[Node] = []
    for node in graph:
        changed = substitute(node, renamed)
        if isinstance(changed, Norm) and inputs_of(node)[0] in residual:
            changed = replace(changed, epsilon=changed.epsilon * factor**2)
        if isinstance(changed, Scale) and changed.output in scaled:
            nodes.append(replace(changed, factor=changed.factor * factor))
            continue
        nodes.append(changed)
        for value in scaled.intersection(outputs_of(node)):
            renamed[value] = Value(f"{value.name}_shifted", value.shape)
            nodes.append(Scale(x=value, factor=factor, output=renamed[value]))
    return replace(graph, nodes=tuple(nodes))


def _residual(graph: Graph) -> tuple[set[Value], list[Value]]:
    """The values that the residual goes through, and those that it is the sum of: the embedding, scaled if it is, and
    whatever is added."""
    start = graph.embedding.output
    match graph.readers(start):
        case [Scale(output=output)]:
            start = output
    values, parts = {start}, [start]
    for node in graph:
        if isinstance(node, Add) and not values.isdisjoint(inputs_of(node)):
            parts += [value for value in inputs_of(node) if value not in values]
            values.add(node.output)
        elif not isinstance(node, Norm) and not values.isdisjoint(inputs_of(node)):
            raise UnsupportedError(f"{outputs_of(node)[0].name}: {type(node).__name__} of the residual itself")
    return values, parts


def _first_scalable(graph: Graph, value: Value) -> Value:
    """The value to scale in the place of ``value``: what a product was made of is smaller than the product."""
    makers: Mapping[Value, Node] = {made: node for node in graph for made in outputs_of(node)}
    while True:
        match makers[value]:
            case Linear(x=source, biases=(None,)) | Multiply(left=source) if len(graph.readers(source)) == 1:
                value = source
            case _:
                return value
