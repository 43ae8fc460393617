"""The graph cut into what XNNPACK computes and what ExecuTorch's own kernels compute.

Everything between two kernels is one delegate: the output projection of a layer, its MLP and the projections and
rotation of the next layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from pocketlm_export.graph.graph import (
    SEQUENCE,
    Activation,
    Add,
    Attention,
    BlockSparsity,
    Clamp,
    Embedding,
    Graph,
    LastPositions,
    LayerNorm,
    Linear,
    Multiply,
    RmsNorm,
    Scale,
    Value,
    WeightInfo,
    outputs_of,
)
from pocketlm_export.graph.rotary import Rotary

__all__ = ["CachedAttention", "Delegate", "Delegated", "Kernel", "MergeHeads", "SplitHeads", "partition"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitHeads:
    """``[1, S, heads * head_dim]`` -> ``[1, S, heads, head_dim]``, each head normalized, then rotated, where asked."""

    x: Value
    heads: int
    head_dim: int
    norm: WeightInfo | None
    norm_epsilon: float
    norm_offset: float
    rotary: Rotary | None
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeHeads:
    """``[1, S, heads, head_dim]`` -> ``[1, S, heads * head_dim]``."""

    x: Value
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedAttention:
    """Append keys and values to the caches of ``layer``, then attend; all values ``[1, S, heads, head_dim]``."""

    layer: int
    query: Value
    key: Value
    value: Value
    scale: float
    window: int | None
    softcap: float | None
    sparsity: BlockSparsity | None
    output: Value


Delegated = Linear | RmsNorm | LayerNorm | Add | Multiply | Scale | Clamp | Activation | SplitHeads | MergeHeads
Kernel = Embedding | CachedAttention | LastPositions


@dataclass(frozen=True, slots=True)
class Delegate:
    """Nodes of one XNNPACK graph, and those of their values that something outside reads."""

    nodes: tuple[Delegated, ...]
    outputs: frozenset[Value]


def partition(graph: Graph) -> list[Delegate | Kernel]:
    """Delegates and kernels in the order of execution."""
    groups: list[list[Delegated] | Kernel] = []
    for node in _without_whole_attention(graph):
        if isinstance(node, Kernel):
            groups.append(node)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(node)
        else:
            groups.append([node])
    steps: list[Delegate | Kernel] = []
    needed = {graph.logits}
    for group in reversed(groups):
        if isinstance(group, list):
            made = {value for node in group for value in _made_by(node)}
            steps.append(Delegate(tuple(group), frozenset(made & needed)))
            needed |= {value for node in group for value in _read_by(node)}
        else:
            steps.append(group)
            needed |= _read_by(group)
    return steps[::-1]


def _without_whole_attention(graph: Graph) -> Iterator[Delegated | Kernel]:
    for node in graph:
        if not isinstance(node, Attention):
            assert isinstance(node, Delegated | Kernel), node  # `check` has refused any other
            yield node
            continue
        wide = {}
        for value, heads, norm, rotary in (
            (node.query, node.heads, node.query_norm, node.rotary),
            (node.key, node.kv_heads, node.key_norm, node.rotary),
            (node.value, node.kv_heads, None, None),
        ):
            wide[value] = Value(f"{value.name}_heads", (1, SEQUENCE, heads, node.head_dim))
            yield SplitHeads(
                x=value, heads=heads, head_dim=node.head_dim, norm=norm, norm_epsilon=node.norm_epsilon,
                norm_offset=node.norm_offset, rotary=rotary, output=wide[value],
            )  # fmt: skip
        mixed = Value(f"{node.output.name}_heads", (1, SEQUENCE, node.heads, node.head_dim))
        yield CachedAttention(
            layer=node.layer, query=wide[node.query], key=wide[node.key], value=wide[node.value],
            scale=node.scale, window=node.window, softcap=node.softcap, sparsity=node.sparsity, output=mixed,
        )  # fmt: skip
        yield MergeHeads(x=mixed, output=node.output)


def _read_by(node: Delegated | Kernel) -> set[Value]:
    values = (getattr(node, field.name) for field in fields(node) if field.name not in {"output", "outputs"})
    return {value for value in values if isinstance(value, Value)}


def _made_by(node: Delegated) -> tuple[Value, ...]:
    if isinstance(node, SplitHeads | MergeHeads):
        return (node.output,)
    return outputs_of(node)
