"""Rewrites that all backends share: each a small function from graph to graph."""

from dataclasses import replace

from pocketlm_export.graph.graph import Graph, LastPositions, Linear, Node, RmsNorm, Value, substitute

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
    by_output = {node.output: node for node in graph if isinstance(node, RmsNorm)}
    norm = by_output[graph.head.x]
    cut = Value(f"{norm.x.name}_last", (1, rows, norm.x.width))
    hidden = Value(f"{norm.output.name}_last", (1, rows, norm.output.width))
    logits = Value(graph.logits.name, (1, rows, graph.logits.width))
    nodes: list[Node] = []
    for node in graph:
        if node is norm:
            nodes.append(LastPositions(x=norm.x, rows=rows, output=cut))
            nodes.append(replace(norm, x=cut, output=hidden))
        elif node is graph.head:
            nodes.append(replace(graph.head, x=hidden, outputs=(logits,)))
        else:
            nodes.append(substitute(node, {norm.output: hidden}))
    return replace(graph, nodes=tuple(nodes), logits=logits)
