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
    MixtureOfExperts,
    Multiply,
    RmsNorm,
    Scale,
    Value,
    WeightInfo,
    outputs_of,
)
from pocketlm_export.graph.rotary import Rotary

__all__ = [
    "CachedAttention",
    "ChosenExperts",
    "Delegate",
    "Delegated",
    "Kernel",
    "MergeHeads",
    "RouterShares",
    "SplitHeads",
    "partition",
]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterShares:
    """``output = softmax(x @ router.T)`` over the last axis, the experts."""

    x: Value
    router: WeightInfo
    output: Value


Delegated = (
    Linear | RmsNorm | LayerNorm | Add | Multiply | Scale | Clamp | Activation | SplitHeads | MergeHeads | RouterShares
)


@dataclass(frozen=True, slots=True)
class Delegate:
    """Nodes of one XNNPACK graph, and those of their values that something outside reads."""

    nodes: tuple[Delegated, ...]
    outputs: frozenset[Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenExperts:
    """``output``: for each position the sum over its ``chosen`` experts of the largest ``shares`` ``[1, S, E]``, which
    are divided by their own sum if ``renormalize``.

    An expert is a delegate over the positions that chose it: ``rows`` of ``x``, their ``share`` ``[1, S, 1]`` and the
    ``sums`` before it give ``new_sums``. These four values are the same for all experts and all layers.
    """

    x: Value
    shares: Value
    chosen: int
    renormalize: bool
    experts: tuple[Delegate, ...]
    rows: Value
    share: Value
    sums: Value
    new_sums: Value
    output: Value


Kernel = Embedding | CachedAttention | ChosenExperts | LastPositions


def partition(graph: Graph) -> list[Delegate | Kernel]:
    """Delegates and kernels in the order of execution."""
    groups: list[list[Delegated] | Kernel] = []
    for node in _taken_apart(graph):
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


def _taken_apart(graph: Graph) -> Iterator[Delegated | Kernel]:
    """Attention and experts as what XNNPACK computes of them and what kernels do."""
    for node in graph:
        match node:
            case Attention():
                yield from _attention(node)
            case MixtureOfExperts():
                yield from _experts(node)
            case _:
                yield node


def _attention(node: Attention) -> Iterator[Delegated | Kernel]:
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


def _experts(node: MixtureOfExperts) -> Iterator[Delegated | Kernel]:
    shares = Value(f"{node.output.name}_shares", (1, SEQUENCE, len(node.gates)))
    yield RouterShares(x=node.x, router=node.router, output=shares)
    rows, sums, new_sums = (
        Value(f"expert_{name}", (1, SEQUENCE, node.x.width)) for name in ("rows", "sums", "new_sums")
    )
    share = Value("expert_share", (1, SEQUENCE, 1))
    yield ChosenExperts(
        x=node.x, shares=shares, chosen=node.chosen, renormalize=node.renormalize,
        experts=tuple(
            _expert(matrices, rows, share, sums, new_sums)
            for matrices in zip(node.gates, node.ups, node.downs, strict=True)
        ),
        rows=rows, share=share, sums=sums, new_sums=new_sums, output=node.output,
    )  # fmt: skip


def _expert(
    matrices: tuple[WeightInfo, WeightInfo, WeightInfo], rows: Value, share: Value, sums: Value, new_sums: Value
) -> Delegate:
    """``new_sums = sums + share * down(silu(gate(rows)) * up(rows))``."""
    gate, up, down = matrices
    gated, wide, active, inner = (
        Value(f"expert_{name}", (1, SEQUENCE, gate.shape[0])) for name in ("gate", "up", "active", "inner")
    )
    made, weighted = (Value(f"expert_{name}", rows.shape) for name in ("made", "weighted"))
    nodes = (
        Linear(x=rows, weights=(gate, up), biases=(None, None), outputs=(gated, wide)),
        Activation(kind="silu", x=gated, output=active),
        Multiply(left=active, right=wide, output=inner),
        Linear(x=inner, weights=(down,), biases=(None,), outputs=(made,)),
        Multiply(left=made, right=share, output=weighted),
        Add(left=sums, right=weighted, output=new_sums),
    )
    return Delegate(nodes, frozenset({new_sums}))


def _read_by(node: Delegated | Kernel) -> set[Value]:
    values = (getattr(node, field.name) for field in fields(node) if field.name not in {"output", "outputs"})
    return {value for value in values if isinstance(value, Value)}


def _made_by(node: Delegated) -> tuple[Value, ...]:
    if isinstance(node, SplitHeads | MergeHeads | RouterShares):
        return (node.output,)
    return outputs_of(node)
