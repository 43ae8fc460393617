"""The reference over given tokens: the graph node by node over all calls, so that each weight is read once.

The tokens are known, so nothing waits for a choice: call t needs, at a node, only what the same node and those before
it gave for calls up to t. Memory is one block of a weight, the activations of all calls, and one layer's caches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketlm.errors import UnsupportedError
from pocketlm_export.backends.reading import EXACT, Run, StoredConstants, Trace
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
    Node,
    RmsNorm,
    Scale,
    Value,
    WeightInfo,
    inputs_of,
)
from pocketlm_export.graph.rotary import Rotary, rotary_tables
from pocketlm_export.quantization.schemes import SchemeRow
from pocketlm_export.verify.operators import attend, layer_norm, normalize, pointwise, share_experts

__all__ = ["Lane", "WeightSource", "run_lanes"]

Floats = npt.NDArray[np.float32]


class WeightSource(Protocol):
    """Where the reference reads its weights, by Hugging Face's names."""

    def row(self, name: str) -> SchemeRow | None:
        """How the weight is quantized; None if its values are kept."""

    def values(self, name: str) -> Floats:
        """A whole vector."""

    def blocks(self, name: str) -> Iterator[tuple[int, Floats]]:
        """``(first row, values)`` of a matrix, dequantized where it is quantized."""

    def release(self) -> None:
        """Let the kernel drop mapped pages: resident memory counts them."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Lane:
    """One way to compute ``runs``: on ``weights``, in ``dtype``, with constants as ``stored`` says, and with the inputs
    of quantized linears rounded where ``round_activations`` is given. ``followed``: for each run a trace whose choices
    of experts are taken where they concede no more than ``tie``, over the deviation of the router's scores."""

    name: str
    runs: Sequence[Run]
    weights: WeightSource
    dtype: torch.dtype = torch.float64
    stored: StoredConstants = EXACT
    round_activations: Callable[[str, Floats], Floats] | None = None
    followed: Sequence[Trace] | None = None
    tie: float = 0.0


def run_lanes(graph: Graph, lanes: Sequence[Lane]) -> dict[str, list[Trace]]:
    """Each lane's traces by its name, in the order of its runs; arrays are of the lane's dtype."""
    states = [_State(graph, lane) for lane in lanes]
    last_reader = {value: index for index, node in enumerate(graph) for value in inputs_of(node)}
    with torch.no_grad():
        for index, node in enumerate(graph):
            match node:
                case Embedding():
                    _embed(node, states)
                case Linear():
                    if node is graph.head:
                        for state in states:
                            state.keep_judged_rows(node.x)
                    _multiply_weights(node, states)
                case MixtureOfExperts():
                    _mix_experts(node, states)
                case _:
                    for state in states:
                        state.compute(node)
            for value in inputs_of(node):
                if last_reader[value] == index:
                    for state in states:
                        state.values.pop(value, None)
    return {state.lane.name: state.finish(graph.logits) for state in states}


def _embed(node: Embedding, states: Sequence["_State"]) -> None:
    for state in states:
        state.values[node.output] = torch.empty(len(state.tokens), node.weight.shape[1], dtype=state.lane.dtype)
    for group in _by_weights(states, node.weight.name):
        weights = states[group[0]].lane.weights
        for start, block in weights.blocks(node.weight.name):
            for state in (states[index] for index in group):
                here = (state.tokens >= start) & (state.tokens < start + len(block))
                rows = state.rounded(node.weight.name, block[state.tokens[here] - start])
                state.values[node.output][torch.from_numpy(here)] = rows
        weights.release()


def _multiply_weights(node: Linear, states: Sequence["_State"]) -> None:
    for weight, bias, output in zip(node.weights, node.biases, node.outputs, strict=True):
        products = _products(weight, states, [state.values[node.x] for state in states])
        for state, product in zip(states, products, strict=True):
            state.values[output] = product if bias is None else product.add_(state.vector(bias))


def _mix_experts(node: MixtureOfExperts, states: Sequence["_State"]) -> None:
    """Expert by expert; each sees the rows that chose it."""
    inputs = [state.values[node.x] for state in states]
    scores = _products(node.router, states, inputs)
    shares = [
        share_experts(each, state.choose(each, node.chosen), node.renormalize)
        for state, each in zip(states, scores, strict=True)
    ]
    results = [torch.zeros_like(x) for x in inputs]
    for index, (gate, up, down) in enumerate(zip(node.gates, node.ups, node.downs, strict=True)):
        here = [share[:, index] > 0 for share in shares]
        rows = [x[chosen] for x, chosen in zip(inputs, here, strict=True)]
        inner = [
            torch.nn.functional.silu(g) * u
            for g, u in zip(_products(gate, states, rows), _products(up, states, rows), strict=True)
        ]
        for result, share, chosen, made in zip(results, shares, here, _products(down, states, inner), strict=True):
            result[chosen] += share[chosen][:, index, None] * made
    for state, result in zip(states, results, strict=True):
        state.values[node.output] = result


def _products(weight: WeightInfo, states: Sequence["_State"], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``inputs[i] @ weight.T`` on the weights of lane i. Lanes of one dtype on the same values are one product."""
    products = [torch.empty(len(x), weight.shape[0], dtype=x.dtype) for x in inputs]
    for group in _by_weights(states, weight.name):
        first = states[group[0]]
        x = torch.cat([states[index].linear_input(inputs[index], weight) for index in group])
        for start, block in first.lane.weights.blocks(weight.name):
            y = x @ first.rounded(weight.name, block).T
            row = 0
            for index in group:
                made = products[index]
                made[:, start : start + len(block)] = y[row : row + len(made)]
                row += len(made)
        first.lane.weights.release()
    return products


def _by_weights(states: Sequence["_State"], name: str) -> list[list[int]]:
    """Indices of the lanes that multiply with the very same numbers."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, state in enumerate(states):
        lane = state.lane
        value = lane.stored.value if lane.weights.row(name) is None else None
        groups.setdefault((id(lane.weights), lane.dtype, value), []).append(index)
    return list(groups.values())


def _conceded(scores: Tensor, experts: Tensor) -> Tensor:
    """See :class:`Trace`."""
    last = scores.gather(-1, experts).amin(-1)
    best = scores.scatter(-1, experts, -torch.inf).amax(-1)
    return (best - last).clamp(min=0) / (float(scores.std(correction=0)) or 1.0)


@dataclass(frozen=True, slots=True)
class _Span:
    """The rows of one call among the rows of all calls of a lane, and its first position."""

    run: int
    start: int
    stop: int
    position: int
    judged: int


@dataclass(slots=True)
class _State:
    graph: Graph
    lane: Lane
    values: dict[Value, Tensor] = field(default_factory=dict)
    tokens: npt.NDArray[np.int64] = field(init=False)
    spans: list[_Span] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    _tables: dict[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = np.array([token for run in self.lane.runs for token in run.tokens], np.int64)
        row = 0
        for index, run in enumerate(self.lane.runs):
            self.traces.append(Trace())
            position = run.start
            for call in run.calls:
                count = len(call.tokens)
                self.spans.append(_Span(index, row, row + count, position, call.rows))
                row += count
                position += count

    def compute(self, node: Node) -> None:
        values = self.values
        match node:
            case Add() | Multiply() | Scale() | Clamp() | Activation():
                values[node.output] = pointwise(node, values, self.lane.stored.constant)
            case RmsNorm():
                values[node.output] = self._normalize(values[node.x], node.weight, node.epsilon, node.offset)
            case LayerNorm():
                values[node.output] = self._layer_norm(values[node.x], node)
            case Attention():
                self._attend(node)
            case _:
                raise UnsupportedError(f"the reference does not compute {type(node).__name__}")

    def vector(self, weight: WeightInfo) -> Tensor:
        return self.rounded(weight.name, self.lane.weights.values(weight.name))

    def rounded(self, name: str, values: Floats) -> Tensor:
        """Values that aren't quantized are as the artifact stores them."""
        if self.lane.weights.row(name) is None:
            values = values.astype(self.lane.stored.value)
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.lane.dtype)

    def linear_input(self, values: Tensor, weight: WeightInfo) -> Tensor:
        """As the shipped kernel takes it."""
        rounding = self.lane.round_activations
        if rounding is None or self.lane.weights.row(weight.name) is None:
            return values
        return torch.from_numpy(rounding(weight.name, values.float().numpy())).to(values.dtype)

    def keep_judged_rows(self, x: Value) -> None:
        """Logits are computed where they are compared only."""
        rows = [row for span in self.spans for row in range(span.stop - span.judged, span.stop)]
        self.values[x] = self.values[x][rows]

    def choose(self, scores: Tensor, chosen: int) -> Tensor:
        """``[rows, E]`` -> the experts of each row, ``[rows, chosen]``: noted in the traces, with the scores and what
        the choices that could be followed concede."""
        experts = torch.topk(scores, chosen).indices
        if self.lane.followed is not None:
            mixture = len(self.traces[0].experts)
            given = torch.from_numpy(np.concatenate([trace.experts[mixture] for trace in self.lane.followed])).long()
            conceded = _conceded(scores, given)
            self._share_out("conceded", conceded)
            experts = torch.where(conceded[:, None] <= self.lane.tie, given, experts)
        self._share_out("experts", experts)
        self._share_out("scores", scores)
        return experts

    def _share_out(self, name: str, rows: Tensor) -> None:
        """To each run's trace the rows of its tokens."""
        ends = np.cumsum([len(run.tokens) for run in self.lane.runs])
        for trace, part in zip(self.traces, np.split(rows.numpy(), ends[:-1]), strict=True):
            getattr(trace, name).append(part)

    def finish(self, logits: Value) -> list[Trace]:
        rows, first = self.values[logits].numpy(), 0
        for span in self.spans:
            self.traces[span.run].logits.append(rows[first : first + span.judged])
            first += span.judged
        return self.traces

    def _normalize(self, x: Tensor, weight: WeightInfo, epsilon: float, offset: float) -> Tensor:
        stored = self.lane.stored
        return normalize(x, self.vector(weight) + offset, stored.epsilon(epsilon), stored.reciprocal(x.shape[-1]))

    def _layer_norm(self, x: Tensor, node: LayerNorm) -> Tensor:
        stored, bias = self.lane.stored, None if node.bias is None else self.vector(node.bias)
        return layer_norm(
            x, self.vector(node.weight), bias, stored.epsilon(node.epsilon), stored.reciprocal(x.shape[-1])
        )

    def _attend(self, node: Attention) -> None:
        query, key, value = (
            self.values[x].view(-1, heads, node.head_dim)
            for x, heads in ((node.query, node.heads), (node.key, node.kv_heads), (node.value, node.kv_heads))
        )
        if node.query_norm is not None:
            query = self._normalize(query, node.query_norm, node.norm_epsilon, node.norm_offset)
        if node.key_norm is not None:
            key = self._normalize(key, node.key_norm, node.norm_epsilon, node.norm_offset)
        softcap = None if node.softcap is None else self.lane.stored.constant(node.softcap)
        result = torch.empty(len(self.tokens), node.heads * node.head_dim, dtype=query.dtype)
        for index, run in enumerate(self.lane.runs):
            k_cache, v_cache = self._caches(node, run)
            for span in self.spans:
                if span.run != index:
                    continue
                rows = slice(span.start, span.stop)
                positions = slice(span.position, span.position + span.stop - span.start)
                tables = None
                if node.rotary is not None:
                    cosine, sine = self._rotary(node.rotary)
                    tables = cosine[positions], sine[positions]
                q, k, v = (t[rows].transpose(0, 1)[None] for t in (query, key, value))
                result[rows] = attend(
                    q, k, v, k_cache, v_cache, span.position, tables,
                    scale=self.lane.stored.scale(node.scale), window=node.window,
                    softcap=softcap, sparsity=node.sparsity,
                )[0]  # fmt: skip
            keys, values = (cache[0, :, run.start :].numpy().copy() for cache in (k_cache, v_cache))
            self.traces[index].keys.append(keys)
            self.traces[index].values.append(values)
        self.values[node.output] = result

    def _caches(self, node: Attention, run: Run) -> tuple[Tensor, Tensor]:
        shape = (1, node.kv_heads, run.start + len(run.tokens), node.head_dim)
        caches = torch.zeros(shape, dtype=self.lane.dtype), torch.zeros(shape, dtype=self.lane.dtype)
        if run.past is not None:
            for cache, past in zip(caches, run.past.layer(node.layer, node.kv_heads, node.head_dim), strict=True):
                cache[0, :, : run.start] = torch.from_numpy(past)
        return caches

    def _rotary(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        if rotary not in self._tables:
            longest = max(run.start + len(run.tokens) for run in self.lane.runs)
            cosine, sine = (
                torch.from_numpy(table.astype(self.lane.stored.table)).to(self.lane.dtype)
                for table in rotary_tables(rotary, longest)
            )
            self._tables[rotary] = cosine, sine
        return self._tables[rotary]
