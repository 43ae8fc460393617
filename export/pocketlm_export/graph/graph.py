"""The graph that every backend lowers: a list of typed nodes over named values.

A node states everything that its operator means; a backend translates every field or refuses it by name. Weights are
names (Hugging Face's) and never values. Positions of the sequence are the one dynamic dimension, :data:`SEQUENCE`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pocketlm_export.graph.rotary import Rotary

__all__ = [
    "SEQUENCE",
    "Activation",
    "Add",
    "Attention",
    "BlockSparsity",
    "Clamp",
    "Embedding",
    "Graph",
    "LastPositions",
    "LayerNorm",
    "Linear",
    "MixtureOfExperts",
    "Multiply",
    "Node",
    "Norm",
    "RmsNorm",
    "Scale",
    "Value",
    "WeightInfo",
]

SEQUENCE = "sequence"
Dimension = int | str


@dataclass(frozen=True, slots=True)
class Value:
    """What flows between nodes: float32 ``[1, sequence, width]``, or the token ids, int64 ``[1, sequence]``."""

    name: str
    shape: tuple[Dimension, ...]

    @property
    def width(self) -> int:
        """The static last axis."""
        last = self.shape[-1]
        assert isinstance(last, int)
        return last


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """A weight by its Hugging Face name, with the shape that the graph expects."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """``output = weight[ids]``; weight ``[vocabulary, width]``."""

    ids: Value
    weight: WeightInfo
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """``outputs[i] = x @ weights[i].T + biases[i]``: one input, one or several matrices ``[N_i, K]`` side by side."""

    x: Value
    weights: tuple[WeightInfo, ...]
    biases: tuple[WeightInfo | None, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNorm:
    """``output = x / sqrt(mean(x^2) + epsilon) * (weight + offset)`` over the last axis."""

    x: Value
    weight: WeightInfo
    epsilon: float
    offset: float
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorm:
    """``output = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`` over the last axis; bias None: none."""

    x: Value
    weight: WeightInfo
    bias: WeightInfo | None
    epsilon: float
    output: Value


@dataclass(frozen=True, slots=True)
class BlockSparsity:
    """Which keys a block-sparse attention sees: those of the last ``local_blocks`` blocks of ``block_size`` positions,
    and of every ``stride``-th block, shifted by ``head_shift`` blocks from one query head to the next.

    Query ``i`` of head ``h`` sees key ``j <= i`` if ``i // block_size - j // block_size < local_blocks`` or
    ``(j // block_size + h * head_shift + 1) % stride == 0``.
    """

    block_size: int
    local_blocks: int
    stride: int
    head_shift: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal attention of layer ``layer`` over its KV cache, after normalization and rotation of queries and keys.

    ``query`` is ``[1, S, heads * head_dim]``, ``key`` and ``value`` ``[1, S, kv_heads * head_dim]``; query head ``h``
    reads key/value head ``h // (heads / kv_heads)``. ``query_norm`` and ``key_norm`` (``[head_dim]``, RMS with
    ``norm_epsilon``, times weight + ``norm_offset``) come first, then ``rotary`` (None: no rotation) at the absolute
    position. Key ``j`` is seen by query ``i`` if ``i - window < j <= i`` (window None: ``j <= i``) and, where
    ``sparsity`` is given, as it says. Scores are multiplied by ``scale``, then, with a ``softcap`` c, replaced by
    ``c * tanh(score / c)``.
    """

    layer: int
    query: Value
    key: Value
    value: Value
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: Rotary | None
    window: int | None
    softcap: float | None
    query_norm: WeightInfo | None
    key_norm: WeightInfo | None
    norm_epsilon: float
    norm_offset: float
    sparsity: BlockSparsity | None
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """``output = sum of p[e] * downs[e](silu(gates[e](x)) * ups[e](x))`` over the ``chosen`` experts of each position.

    ``p`` is the softmax of ``x @ router.T`` over all experts; the ``chosen`` largest are taken, divided by their sum if
    ``renormalize``. ``router`` ``[E, D]``; of each expert ``gates`` and ``ups`` ``[I, D]``, ``downs`` ``[D, I]``.
    """

    x: Value
    router: WeightInfo
    gates: tuple[WeightInfo, ...]
    ups: tuple[WeightInfo, ...]
    downs: tuple[WeightInfo, ...]
    chosen: int
    renormalize: bool
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """``output = left + right``, of one shape."""

    left: Value
    right: Value
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiply:
    """``output = left * right``, of one shape."""

    left: Value
    right: Value
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """``output = x * factor``."""

    x: Value
    factor: float
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Clamp:
    """``output = min(max(x, least), most)``; None: no such bound."""

    x: Value
    least: float | None
    most: float | None
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """``kind``: ``silu`` (x sigmoid(x)), ``gelu`` (erf), ``gelu_tanh``, ``tanh`` or ``sigmoid``, element by element."""

    kind: str
    x: Value
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class LastPositions:
    """The last ``min(rows, sequence)`` positions of ``x``."""

    x: Value
    rows: int
    output: Value


Norm = RmsNorm | LayerNorm
Node = (
    Embedding
    | Linear
    | Norm
    | Attention
    | MixtureOfExperts
    | Add
    | Multiply
    | Scale
    | Clamp
    | Activation
    | LastPositions
)


def inputs_of(node: Node) -> tuple[Value, ...]:
    """The values that a node reads."""
    names = {"output", "outputs"}
    return tuple(
        value
        for field in fields(node)
        if field.name not in names and isinstance(value := getattr(node, field.name), Value)
    )


def outputs_of(node: Node) -> tuple[Value, ...]:
    """The values that a node makes."""
    return node.outputs if isinstance(node, Linear) else (node.output,)


def weights_of(node: Node) -> tuple[WeightInfo, ...]:
    """The weights that a node reads."""
    match node:
        case Linear():
            return node.weights + tuple(bias for bias in node.biases if bias is not None)
        case Embedding() | RmsNorm():
            return (node.weight,)
        case LayerNorm():
            return (node.weight,) if node.bias is None else (node.weight, node.bias)
        case MixtureOfExperts():
            return (node.router, *node.gates, *node.ups, *node.downs)
        case Attention():
            return tuple(norm for norm in (node.query_norm, node.key_norm) if norm is not None)
        case _:
            return ()


@dataclass(frozen=True, slots=True)
class Graph:
    """``nodes`` in an order in which every value is made before it is read. ``ids`` is ``[1, sequence]``.

    ``logits`` is ``[1, sequence or rows, vocabulary]``. Every attention layer owns a key and a value cache of
    ``[1, kv_heads, context_length, head_dim]``; the first position of a call is its other input.
    """

    nodes: tuple[Node, ...]
    ids: Value
    logits: Value
    context_length: int

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention nodes, in the order of their layers."""
        return tuple(sorted((node for node in self.nodes if isinstance(node, Attention)), key=lambda node: node.layer))

    @property
    def embedding(self) -> Embedding:
        """The one embedding."""
        (node,) = (node for node in self.nodes if isinstance(node, Embedding))
        return node

    @property
    def head(self) -> Linear:
        """The linear that makes the logits; a scale or a soft cap may follow it."""
        makers = {value: node for node in self.nodes for value in outputs_of(node)}
        node = makers[self.logits]
        while isinstance(node, Scale | Activation):
            node = makers[node.x]
        assert isinstance(node, Linear)
        return node

    @property
    def tied(self) -> bool:
        """Whether the head's matrix is the embedding."""
        return self.head.weights[0].name == self.embedding.weight.name

    def weights(self) -> dict[str, WeightInfo]:
        """Every weight once, in the order of first use."""
        return {weight.name: weight for node in self.nodes for weight in weights_of(node)}

    def readers(self, value: Value) -> list[Node]:
        """The nodes that read ``value``."""
        return [node for node in self.nodes if value in inputs_of(node)]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)


def substitute(node: Node, values: Mapping[Value, Value]) -> Node:
    """``node`` reading ``values[v]`` wherever it read ``v``."""
    changes: dict[str, Any] = {
        field.name: values[value]
        for field in fields(node)
        if field.name not in {"output", "outputs"}
        and isinstance(value := getattr(node, field.name), Value)
        and value in values
    }
    return replace(node, **changes) if changes else node


def with_outputs(node: Node, values: Mapping[Value, Value]) -> Node:
    """``node`` making ``values[v]`` wherever it made ``v``."""
    if isinstance(node, Linear):
        return replace(node, outputs=tuple(values.get(value, value) for value in node.outputs))
    return replace(node, output=values.get(node.output, node.output))
