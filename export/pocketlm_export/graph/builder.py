"""Writes a graph down, operator by operator: what an architecture's decoder is told in.

Each method is one operator of the set that every backend lowers; it appends a node and returns its output. Nothing is
computed and no weight is read, so the graph of any model is made in milliseconds.
"""

from dataclasses import dataclass, field

from pocketlm_export.graph.graph import (
    SEQUENCE,
    Activation,
    Add,
    Attention,
    Embedding,
    Graph,
    Linear,
    Multiply,
    Node,
    RmsNorm,
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
    ) -> Value:
        """:class:`Attention`."""
        output = self._value("attention", heads * head_dim)
        self._nodes.append(
            Attention(
                layer=layer, query=query, key=key, value=value, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                scale=scale, rotary=rotary, window=window, softcap=softcap, query_norm=query_norm, key_norm=key_norm,
                norm_epsilon=norm_epsilon, output=output,
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

    def activation(self, kind: str, x: Value) -> Value:
        """:class:`Activation`."""
        output = self._value(kind, x.width)
        self._nodes.append(Activation(kind=kind, x=x, output=output))
        return output

    def _value(self, operator: str, width: int) -> Value:
        count = self._counts.get(operator, 0)
        self._counts[operator] = count + 1
        return Value(f"{operator}_{count}" if count else operator, (1, SEQUENCE, width))
