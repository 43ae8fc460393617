"""Writes a graph down, operator by operator: what an architecture's decoder is told in.

Each method is one operator of the set that every backend lowers; it appends a node and returns its output. Nothing is
computed and no weight is read, so the graph of any model is made in milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pocketlm_export.graph.graph import (
    SEQUENCE,
    Activation,
    Add,
    Attention,
    BlockSparsity,
    Clamp,
    Embedding,
    Graph,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Multiply,
    Node,
    RmsNorm,
    Scale,
    Value,
    WeightInfo,
)
from pocketlm_export.graph.rotary import Rotary

__all__ = ["GraphBuilder"]


@dataclass(slots=True)
class GraphBuilder:
    """The nodes so far. Values are named by their operator and counted: ``linear``, ``linear_1``, and so on."""

    ids: Value = field(default=Value("ids", (1, SEQUENCE)))
    _nodes: list[Node] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)

    def graph(self, logits: Value, context_length: int) -> Graph:
        """All of it, for caches of ``context_length`` positions."""
        return Graph(tuple(self._nodes), self.ids, logits, context_length)

    def embedding(self, ids: Value, weight: WeightInfo) -> Value:
        """:class:`Embedding`."""
        output = self._value("embedding", weight.shape[1])
        self._nodes.append(Embedding(ids=ids, weight=weight, output=output))
        return output

    def linear(self, x: Value, weight: WeightInfo, bias: WeightInfo | None = None) -> Value:
        """:class:`Linear` of one matrix."""
        output = self._value("linear", weight.shape[0])
        self._nodes.append(Linear(x=x, weights=(weight,), biases=(bias,), outputs=(output,)))
        return output

    def rms_norm(self, x: Value, weight: WeightInfo, epsilon: float, offset: float = 0.0) -> Value:
        """:class:`RmsNorm`."""
        output = self._value("rms_norm", x.width)
        self._nodes.append(RmsNorm(x=x, weight=weight, epsilon=epsilon, offset=offset, output=output))
        return output

    def layer_norm(self, x: Value, weight: WeightInfo, bias: WeightInfo | None, epsilon: float) -> Value:
        """:class:`LayerNorm`."""
        output = self._value("layer_norm", x.width)
        self._nodes.append(LayerNorm(x=x, weight=weight, bias=bias, epsilon=epsilon, output=output))
        return output

    def attention(
        self,
        query: Value,
        key: Value,
        value: Value,
        *,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        rotary: Rotary | None,
        window: int | None = None,
        softcap: float | None = None,
        query_norm: WeightInfo | None = None,
        key_norm: WeightInfo | None = None,
        norm_epsilon: float = 0.0,
        norm_offset: float = 0.0,
        sparsity: BlockSparsity | None = None,
    ) -> Value:
        """:class:`Attention`."""
        output = self._value("attention", heads * head_dim)
        self._nodes.append(
            Attention(
                layer=layer, query=query, key=key, value=value, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                scale=scale, rotary=rotary, window=window, softcap=softcap, query_norm=query_norm, key_norm=key_norm,
                norm_epsilon=norm_epsilon, norm_offset=norm_offset, sparsity=sparsity, output=output,
            )
        )  # fmt: skip
        return output

    def mixture_of_experts(
        self,
        x: Value,
        router: WeightInfo,
        gates: Sequence[WeightInfo],
        ups: Sequence[WeightInfo],
        downs: Sequence[WeightInfo],
        *,
        chosen: int,
        renormalize: bool,
    ) -> Value:
        """:class:`MixtureOfExperts`."""
        output = self._value("experts", x.width)
        self._nodes.append(
            MixtureOfExperts(
                x=x, router=router, gates=tuple(gates), ups=tuple(ups), downs=tuple(downs), chosen=chosen,
                renormalize=renormalize, output=output,
            )
        )  # fmt: skip
        return output

    def add(self, left: Value, right: Value) -> Value:
        """:class:`Add`."""
        output = self._value("add", left.width)
        self._nodes.append(Add(left=left, right=right, output=output))
        return output

    def multiply(self, left: Value, right: Value) -> Value:
        """:class:`Multiply`."""
        output = self._value("mul", left.width)
        self._nodes.append(Multiply(left=left, right=right, output=output))
        return output

    def scale(self, x: Value, factor: float) -> Value:
        """:class:`Scale`; a factor of one is nothing."""
        if factor == 1:
            return x
        output = self._value("scale", x.width)
        self._nodes.append(Scale(x=x, factor=factor, output=output))
        return output

    def clamp(self, x: Value, least: float | None, most: float | None) -> Value:
        """:class:`Clamp`."""
        output = self._value("clamp", x.width)
        self._nodes.append(Clamp(x=x, least=least, most=most, output=output))
        return output

    def softcap(self, x: Value, cap: float) -> Value:
        """``cap * tanh(x / cap)``."""
        return self.scale(self.activation("tanh", self.scale(x, 1 / cap)), cap)

    def activation(self, kind: str, x: Value) -> Value:
        """:class:`Activation`."""
        output = self._value(kind, x.width)
        self._nodes.append(Activation(kind=kind, x=x, output=output))
        return output

    def _value(self, operator: str, width: int) -> Value:
        count = self._counts.get(operator, 0)
        self._counts[operator] = count + 1
        return Value(f"{operator}_{count}" if count else operator, (1, SEQUENCE, width))
