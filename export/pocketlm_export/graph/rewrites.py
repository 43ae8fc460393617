"""Rewrites that all backends share: each a small function from graph to graph."""

from dataclasses import replace

from pocketlm_export.graph.graph import (
    Graph,
    LastPositions,
    Linear,
    Node,
    Norm,
    Value,
    inputs_of,
    outputs_of,
    substitute,
    with_outputs,
)

__all__ = ["keep_last_positions", "merge_linears"]


def merge_linears(graph: Graph) -> Graph:
    """Linears with the same input become one with a list of weights: query, key and value; gate and up."""
    groups: dict[Value, list[Linear]] = {}
    for node in graph:
        if isinstance(node, Linear):
            groups.setdefault(node.x, []).append(node)
    merged = {}
    for x, linears in groups.items():
        merged[linears[0].outputs] = Linear(
            x=x,
            weights=tuple(weight for node in linears for weight in node.weights),
            biases=tuple(bias for node in linears for bias in node.biases),
            outputs=tuple(value for node in linears for value in node.outputs),
        )
    nodes: list[Node] = []
    for node in graph:
        if not isinstance(node, Linear):
            nodes.append(node)
        elif node.outputs in merged:
            nodes.append(merged[node.outputs])
    return replace(graph, nodes=tuple(nodes))


def keep_last_positions(graph: Graph, rows: int) -> Graph:
    """Logits of the last ``min(rows, sequence)`` positions only: cut before the final norm, where it saves most."""
    makers = {value: node for node in graph for value in outputs_of(node)}
    norm = makers[graph.head.x]
    assert isinstance(norm, Norm)
    last = Value(f"{norm.x.name}_last", (1, rows, norm.x.width))
    cut = {norm.output: Value(f"{norm.output.name}_last", (1, rows, norm.output.width))}
    nodes: list[Node] = []
    for node in graph:
        if node is norm:
            nodes.append(LastPositions(x=norm.x, rows=rows, output=last))
            nodes.append(replace(norm, x=last, output=cut[norm.output]))
            continue
        if cut.keys() & set(inputs_of(node)):
            cut |= {value: Value(value.name, (1, rows, value.width)) for value in outputs_of(node)}
            node = with_outputs(node, cut)
        nodes.append(substitute(node, cut))
    return replace(graph, nodes=tuple(nodes), logits=cut[graph.logits])
