"""The reference as a session: the graph in torch, on the very weights that the artifacts hold, all in memory."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketlm.errors import UnsupportedError
from pocketlm.session import Session
from pocketlm_export.graph.graph import (
    Activation,
    Add,
    Attention,
    Clamp,
    Embedding,
    Graph,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Multiply,
    RmsNorm,
    Scale,
    Value,
    WeightInfo,
)
from pocketlm_export.graph.rotary import Rotary, rotary_tables
from pocketlm_export.quantization.weights import Weights
from pocketlm_export.verify.operators import attend, choose_experts, layer_norm, normalize, pointwise

__all__ = ["ReferenceSession"]


class ReferenceSession(Session):
    """A session over ``graph``; ``dtype`` float64 computes in float64 and returns float32."""

    def __init__(self, graph: Graph, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(
            runtime="reference",
            context_length=graph.context_length,
            vocabulary_size=graph.logits.width,
            longest_call=graph.context_length,
            rows=graph.context_length,
        )
        self._graph = graph
        self._dtype = dtype
        self._weights = {name: _load(weights, info, dtype) for name, info in graph.weights().items()}
        self._tables = {node.rotary: self._make_tables(node.rotary) for node in graph.attentions}
        self._caches = {
            node.layer: torch.zeros(2, 1, node.kv_heads, graph.context_length, node.head_dim, dtype=dtype)
            for node in graph.attentions
        }

    def _run(self, tokens: npt.NDArray[np.int64], position: int, rows: int) -> npt.NDArray[np.float32]:
        values: dict[Value, Tensor] = {self._graph.ids: torch.from_numpy(tokens)[None]}
        with torch.no_grad():
            for node in self._graph:
                match node:
                    case Embedding():
                        values[node.output] = self._weights[node.weight.name][values[node.ids]]
                    case Linear():
                        for weight, bias, output in zip(node.weights, node.biases, node.outputs, strict=True):
                            values[output] = torch.nn.functional.linear(
                                values[node.x], self._weights[weight.name], self._optional(bias)
                            )
                    case RmsNorm():
                        values[node.output] = self._normalize(values[node.x], node.weight, node.epsilon, node.offset)
                    case LayerNorm():
                        values[node.output] = layer_norm(
                            values[node.x], self._weights[node.weight.name], self._optional(node.bias), node.epsilon,
                            1 / node.weight.shape[0],
                        )  # fmt: skip
                    case Attention():
                        values[node.output] = self._attend(node, values, position)
                    case MixtureOfExperts():
                        values[node.output] = self._mix_experts(node, values[node.x])
                    case Add() | Multiply() | Scale() | Clamp() | Activation():
                        values[node.output] = pointwise(node, values)
                    case _:
                        raise UnsupportedError(f"the reference does not compute {type(node).__name__}")
        logits = values[self._graph.logits][0]
        result: npt.NDArray[np.float32] = logits[len(logits) - rows :].float().numpy()
        return result

    def _close(self) -> None:
        self._caches = {}

    def all_logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 ``[len(tokens), vocabulary]`` of one prefill from position 0."""
        self.rewind(0)
        return self.extend(tokens, logits=len(tokens))

    def _attend(self, node: Attention, values: dict[Value, Tensor], position: int) -> Tensor:
        query, key, value = (
            values[x].view(1, -1, heads, node.head_dim)
            for x, heads in ((node.query, node.heads), (node.key, node.kv_heads), (node.value, node.kv_heads))
        )
        if node.query_norm is not None:
            query = self._normalize(query, node.query_norm, node.norm_epsilon, node.norm_offset)
        if node.key_norm is not None:
            key = self._normalize(key, node.key_norm, node.norm_epsilon, node.norm_offset)
        rows = slice(position, position + query.shape[1])
        tables = self._tables[node.rotary]
        k_cache, v_cache = self._caches[node.layer]
        return attend(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), k_cache, v_cache, position,
            tables and (tables[0][rows], tables[1][rows]), scale=node.scale, window=node.window, softcap=node.softcap,
            sparsity=node.sparsity,
        )  # fmt: skip

    def _mix_experts(self, node: MixtureOfExperts, x: Tensor) -> Tensor:
        linear, weights = torch.nn.functional.linear, self._weights
        shares = choose_experts(linear(x, weights[node.router.name]), node.chosen, node.renormalize)
        result = torch.zeros_like(x)
        for index, (gate, up, down) in enumerate(zip(node.gates, node.ups, node.downs, strict=True)):
            here = shares[..., index] > 0
            inner = torch.nn.functional.silu(linear(x[here], weights[gate.name])) * linear(x[here], weights[up.name])
            result[here] += shares[here][:, index, None] * linear(inner, weights[down.name])
        return result

    def _normalize(self, x: Tensor, weight: WeightInfo, epsilon: float, offset: float) -> Tensor:
        return normalize(x, self._weights[weight.name] + offset, epsilon, 1 / x.shape[-1])

    def _optional(self, weight: WeightInfo | None) -> Tensor | None:
        return None if weight is None else self._weights[weight.name]

    def _make_tables(self, rotary: Rotary | None) -> tuple[Tensor, Tensor] | None:
        if rotary is None:
            return None
        cosine, sine = rotary_tables(rotary, self._graph.context_length)
        return torch.from_numpy(cosine).to(self._dtype), torch.from_numpy(sine).to(self._dtype)


def _load(weights: Weights, info: WeightInfo, dtype: torch.dtype) -> Tensor:
    values = torch.empty(info.shape, dtype=dtype)
    for start, block in weights.blocks(info.name):
        values[start : start + len(block)] = torch.tensor(block)
    return values
