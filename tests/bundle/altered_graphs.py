"""A graph with other nodes in it, for what no tiny model has: the same alterations for every backend."""

from collections.abc import Callable
from dataclasses import replace

from pocketlm_export.graph.builder import GraphBuilder
from pocketlm_export.graph.graph import Graph, LayerNorm, Node, RmsNorm, Value

__all__ = ["altered", "followed", "with_capped_logits", "with_layer_norms"]


def altered(graph: Graph, changed: type, **changes) -> Graph:
    """``changes`` in every node of the type ``changed``."""
    return replace(graph, nodes=tuple(replace(n, **changes) if isinstance(n, changed) else n for n in graph.nodes))


def followed(graph: Graph, kind: type, make: Callable[..., Node]) -> Graph:
    """``make(x=, output=)`` behind each node of ``kind``, but for the last norm."""
    nodes: list[Node] = []
    for node in graph:
        if isinstance(node, kind) and node.output != graph.head.x:
            inner = Value(f"{node.output.name}_inner", node.output.shape)
            nodes += [replace(node, output=inner), make(x=inner, output=node.output)]
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def with_layer_norms(graph: Graph, biased: bool) -> Graph:
    """In the place of RMS norms; another norm's weight is the bias."""
    bias = next(node.weight for node in graph if isinstance(node, RmsNorm))
    nodes = [
        LayerNorm(x=n.x, weight=n.weight, bias=bias if biased else None, epsilon=n.epsilon, output=n.output)
        if isinstance(n, RmsNorm)
        else n
        for n in graph
    ]
    return replace(graph, nodes=tuple(nodes))


def with_capped_logits(graph: Graph) -> Graph:
    """A scale and a soft cap behind the head."""
    builder = GraphBuilder()
    logits = builder.softcap(builder.scale(graph.logits, 0.25), 2.0)
    return replace(graph, nodes=graph.nodes + builder.graph(logits, 1).nodes, logits=logits)
