"""Translates the graph: one table from node to emitter. Delegated nodes go into the open XNNPACK graph, others into
instructions of the method."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocketlm_export.backends.base import Entry
from pocketlm_export.backends.executorch.importing import ScalarType
from pocketlm_export.backends.executorch.layout import NamedConstant
from pocketlm_export.backends.executorch.packing import Packing, Piece, array_piece
from pocketlm_export.backends.executorch.partition import CachedAttention, Delegate, MergeHeads, SplitHeads, partition
from pocketlm_export.backends.executorch.program import MethodBuilder
from pocketlm_export.backends.executorch.xnnpack import XnnpackGraph
from pocketlm_export.graph.graph import (
    SEQUENCE,
    Activation,
    Add,
    Embedding,
    Graph,
    LastPositions,
    Linear,
    Multiply,
    RmsNorm,
    Value,
    WeightInfo,
)
from pocketlm_export.graph.rotary import Rotary, rotary_tables
from pocketlm_export.quantization.schemes import SchemeRow

__all__ = ["Emission", "emit"]

FLOAT_SCALAR_TYPE = 6
END = 2**63 - 1
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Emission:
    """The method as built, its output, the constants that its delegates find by key, and the place of each weight.

    An entry is named ``constant/I``, the program's constant I, or by the placeholder of a named constant.
    """

    method: MethodBuilder
    output: int
    named: Sequence[NamedConstant]
    entries: Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class _Open:
    """The delegate being built: where each value is in its graph, and its arguments in the method."""

    graph: XnnpackGraph
    outputs: frozenset[Value]
    values: dict[Value, int] = field(default_factory=dict)
    int8: dict[int, int] = field(default_factory=dict)
    constants: dict[int, int] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)


def emit(graph: Graph, packing: Packing, longest_call: int) -> Emission:
    """Translate ``graph``, whose calls take up to ``longest_call`` tokens."""
    emitter = _Emitter(graph, packing, longest_call)
    for step in partition(graph):
        if isinstance(step, Delegate):
            emitter.emit_delegate(step)
        else:
            EMITTERS[type(step)](emitter, step)
    return Emission(emitter.method, emitter.tensors[graph.logits], emitter.named, emitter.entries)


class _Emitter:
    def __init__(self, graph: Graph, packing: Packing, longest_call: int) -> None:
        self.graph = graph
        self.packing = packing
        self.longest_call = longest_call
        self.method = method = MethodBuilder()
        self.named: list[NamedConstant] = []
        self.entries: dict[str, Entry] = {}
        self.tied: tuple[Piece, Piece | None] | None = None
        self.open: _Open
        self._shared: dict[object, Any] = {}

        ids = method.input(ScalarType.LONG, (1, longest_call))
        position = method.input(ScalarType.LONG, (1,), static=True)
        self.tensors: dict[Value, int] = {graph.ids: ids}
        first = method.activation((), ScalarType.LONG)
        method.kernel("aten::select_copy.int_out", [position, method.scalar(0), method.scalar(0)], first)
        self.start = method.kernel("aten::_local_scalar_dense", [first], method.integer())
        self.length = method.kernel("aten::sym_size.int", [ids, method.scalar(1)], method.integer())
        self.stop = self.add_integers(self.start, self.length)

    # The method

    def shape(self, value: Value) -> Shape:
        return tuple(self.longest_call if size == SEQUENCE else int(size) for size in value.shape)

    def add_integers(self, left: int, right: int) -> int:
        return self.method.kernel("executorch_prim::add.Scalar", [left, right], self.method.integer())

    def slice(self, x: int, dimension: int, start: int, stop: int, shape: Shape) -> int:
        scalar = self.method.scalar
        result = self.method.activation(shape)
        return self.method.kernel("aten::slice_copy.Tensor_out", [x, scalar(dimension), start, stop, scalar(1)], result)

    def make(self, value: Value) -> int:
        self.tensors[value] = self.method.activation(self.shape(value))
        return self.tensors[value]

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for this key the first time."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def vector(self, weight: WeightInfo, offset: float = 0.0) -> int:
        """A vector as a constant of the program."""

        def make() -> int:
            piece = self.packing.vectors([(weight.name, weight.shape[0])], offset)
            constant = self.method.constant(weight.shape, ScalarType.FLOAT, piece)
            self.entries[weight.name] = Entry(f"constant/{self.method.buffer_index(constant)}")
            return constant

        return self.once(("vector", weight.name, offset), make)

    def rotary(self, rotary: Rotary, head_dim: int) -> tuple[int, int]:
        """Rows of the two tables at the positions of the call: cosine, and sine with the sign of its half."""

        def make() -> tuple[int, int]:
            context, half, width = self.graph.context_length, len(rotary.frequencies), head_dim
            rest = width - 2 * half

            def cosine() -> np.ndarray[Any, Any]:
                cos, _ = rotary_tables(rotary, context)
                return np.concatenate((cos, cos, np.ones((context, rest), np.float32)), 1)

            def sine() -> np.ndarray[Any, Any]:
                _, sin = rotary_tables(rotary, context)
                return np.concatenate((-sin, sin, np.zeros((context, rest), np.float32)), 1)

            rows = []
            for table in (cosine, sine):
                piece = array_piece(table, 4 * context * width)
                constant = self.method.constant((context, 1, width), ScalarType.FLOAT, piece)
                rows.append(self.slice(constant, 0, self.start, self.stop, (self.longest_call, 1, width)))
            return rows[0], rows[1]

        return self.once(("rotary", rotary, head_dim), make)

    def mask(self, window: int) -> int:
        """Scores' addend float32 [S, context]: 0 where query i sees key j, minus infinity elsewhere.

        Only i - j matters, so a table of [longest call, 2 * context] serves all positions: its columns are shifted by
        the first position.
        """

        def make() -> int:
            context, longest = self.graph.context_length, self.longest_call

            def table() -> np.ndarray[Any, Any]:
                distance = np.arange(longest)[:, None] - (np.arange(2 * context)[None, :] - context)
                return np.where((distance >= 0) & (distance < window), 0, -np.inf).astype(np.float32)

            scalar = self.method.scalar
            piece = array_piece(table, 8 * longest * context)
            constant = self.method.constant((longest, 2 * context), ScalarType.FLOAT, piece)
            rows = self.slice(constant, 0, scalar(0), self.length, (longest, 2 * context))
            first = self.method.integer()
            self.method.kernel("executorch_prim::sub.Scalar", [scalar(context), self.start], first)
            last = self.add_integers(first, scalar(context))
            return self.slice(rows, 1, first, last, (longest, context))

        return self.once(("mask", window), make)

    # The open delegate

    def emit_delegate(self, delegate: Delegate) -> None:
        self.open = _Open(XnnpackGraph(), delegate.outputs)
        for node in delegate.nodes:
            EMITTERS[type(node)](self, node)
        self.method.delegate(self.open.graph, [*self.open.inputs, *self.open.results])

    def read(self, value: Value) -> int:
        """``value`` in the open delegate; an input of it if it was made outside."""
        if value not in self.open.values:
            self.open.values[value] = self.open.graph.input(self.shape(value))
            self.open.inputs.append(self.tensors[value])
        return self.open.values[value]

    def read_constant(self, tensor: int, shape: Shape) -> int:
        """A constant tensor of the program as an input of the open delegate."""
        if tensor not in self.open.constants:
            self.open.constants[tensor] = self.open.graph.input(shape)
            self.open.inputs.append(tensor)
        return self.open.constants[tensor]

    def output(self, value: Value) -> int | None:
        """An output of the open delegate if ``value`` is read outside, else None."""
        if value not in self.open.outputs:
            return None
        self.open.results.append(self.make(value))
        return self.open.graph.output(self.shape(value))

    def name(self, description: str, *parts: Piece) -> NamedConstant:
        """A constant that XNNPACK packs; ``parts`` are all the bytes that are packed with it."""
        placeholder = hashlib.sha256(f"placeholder {len(self.named)}".encode()).hexdigest()
        self.named.append(NamedConstant(description, parts, placeholder))
        return self.named[-1]

    def mean_and_epsilon(self, width: int, epsilon: float) -> tuple[int, int]:
        """A filter of 1/width and a bias of epsilon: XNNPACK's schema has no mean."""

        def filled(length: int, value: float) -> NamedConstant:
            piece = array_piece(lambda: np.full(length, value, np.float32), 4 * length)
            return self.once(("filled", length, value), lambda: self.name(f"float32 [{length}] {value}", piece))

        graph = self.open.graph
        return graph.constant((1, width), filled(width, 1 / width)), graph.constant((1,), filled(1, epsilon))

    def normalize(self, x: int, epsilon: float) -> int:
        """x / sqrt(mean(x^2) + epsilon) over the last axis."""
        graph = self.open.graph
        mean = graph.fully_connected(graph.unary("Square", x), *self.mean_and_epsilon(graph.shape(x)[-1], epsilon))
        return graph.multiply(x, graph.unary("ReciprocalSquareRoot", mean))


def _embedding(emitter: _Emitter, node: Embedding) -> None:
    method, packing = emitter.method, emitter.packing
    name, (rows, width) = node.weight.name, node.weight.shape
    row = packing.weights.row(name)
    ids, result = emitter.tensors[node.ids], emitter.make(node.output)
    if row is None:
        codes = packing.values([name])
        emitter.tied = codes, None
        weight = method.constant((rows, width), ScalarType.FLOAT, codes)
        padding, flag = method.scalar(-1), method.scalar(False)
        method.kernel("aten::embedding.out", [weight, ids, padding, flag, flag], result)
    else:
        codes = packing.codes([name], even_high=True)
        half = row.bits == 4
        scales = packing.scales([name], "float16" if half else "float32")
        emitter.tied = codes, None if half else scales
        weight = method.constant((rows, width // (8 // row.bits)), ScalarType.BYTE if half else ScalarType.CHAR, codes)
        groups = width // (row.group or width)
        steps = method.constant((rows, groups), ScalarType.HALF if half else ScalarType.FLOAT, scales)
        lowest, highest = -(2 ** (row.bits - 1)), 2 ** (row.bits - 1) - 1
        method.kernel(
            f"quantized_decomposed::embedding_{'4bit' if half else 'byte'}.dtype_out",
            [weight, steps, *map(method.scalar, (None, lowest, highest)), ids, method.scalar(FLOAT_SCALAR_TYPE)],
            result,
        )
    emitter.entries[name] = Entry(f"constant/{method.buffer_index(weight)}")


def _cached_attention(emitter: _Emitter, node: CachedAttention) -> None:
    method, scalar = emitter.method, emitter.method.scalar
    unused = emitter.once("unused", lambda: method.activation((1,)))  # update_cache's result, which nobody needs
    caches = []
    for value in (node.key, node.value):
        _, _, heads, head_dim = emitter.shape(value)
        cache = method.cache((1, emitter.graph.context_length, heads, head_dim))
        method.kernel("llama::update_cache.out", [emitter.tensors[value], cache, emitter.start], unused)
        caches.append(cache)
    mask = scalar(None) if node.window is None else emitter.mask(node.window)
    rest = [scalar(0.0), scalar(node.window is None), scalar(float(node.scale))]
    arguments = [emitter.tensors[node.query], *caches, emitter.start, mask, *rest]
    method.kernel("llama::custom_sdpa.out", arguments, emitter.make(node.output))


def _last_positions(emitter: _Emitter, node: LastPositions) -> None:
    method = emitter.method
    start, stop, shape = method.scalar(-node.rows), method.scalar(END), emitter.shape(node.output)
    emitter.tensors[node.output] = emitter.slice(emitter.tensors[node.x], 1, start, stop, shape)


def _linear(emitter: _Emitter, node: Linear) -> None:
    graph, x = emitter.open.graph, emitter.read(node.x)
    triples = zip(node.weights, node.biases, node.outputs, strict=True)
    # What shares a row of the scheme is one matrix.
    for row, run in itertools.groupby(triples, key=lambda triple: emitter.packing.weights.row(triple[0].name)):
        weights, biases, outputs = zip(*run, strict=True)
        y_input, weight = _filter(emitter, row, x, weights)
        bias = _bias(emitter, weights, biases)
        if len(outputs) == 1:
            result = emitter.output(outputs[0])
            emitter.open.values[outputs[0]] = graph.fully_connected(y_input, weight, bias, result)
            continue
        whole = graph.fully_connected(y_input, weight, bias)
        start = 0
        for output in outputs:
            emitter.open.values[output] = graph.slice_last(whole, start, output.width, emitter.output(output))
            start += output.width


def _filter(emitter: _Emitter, row: SchemeRow | None, x: int, weights: Sequence[WeightInfo]) -> tuple[int, int]:
    """The input as the filter wants it, and the filter."""
    graph, packing = emitter.open.graph, emitter.packing
    names = [weight.name for weight in weights]
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    tied = names == [emitter.graph.embedding.weight.name] and emitter.tied is not None
    tied_codes, tied_scales = emitter.tied if tied and emitter.tied is not None else (None, None)
    if row is None:
        values = emitter.name(f"float32 {list(shape)}", tied_codes or packing.values(names))
        _enter(emitter, weights, values)
        return x, graph.constant(shape, values)
    codes = tied_codes or packing.codes(names)
    scales = tied_scales or packing.scales(names, "bfloat16" if row.bits == 4 else "float32")
    datatype = f"{'qbint4' if row.bits == 4 else 'qcint8'} {list(shape)} {row.group}"
    named_codes = emitter.name(datatype, codes, scales)
    named_scales = emitter.name(f"scales of {datatype}", scales)
    _enter(emitter, weights, named_codes)
    if row.bits == 4:
        if tied:
            x = _swap_pairs(graph, x)
        weight = graph.int4_filter(shape, row.group or shape[1], named_codes, named_scales)
    else:
        weight = graph.int8_filter(shape, named_codes, named_scales)
    if x not in emitter.open.int8:
        emitter.open.int8[x] = graph.to_int8(x)
    return emitter.open.int8[x], weight


def _swap_pairs(graph: XnnpackGraph, x: int) -> int:
    """The embedding's nibbles are in the other order, so the head reads its input in that order too."""
    width = graph.shape(x)[-1]
    pairs = graph.reshape(x, (width // 2, 2))
    swapped = graph.concatenate_last([graph.slice_last(pairs, 1, 1), graph.slice_last(pairs, 0, 1)])
    return graph.reshape(swapped, (width,))


def _bias(emitter: _Emitter, weights: Sequence[WeightInfo], biases: Sequence[WeightInfo | None]) -> int | None:
    if all(bias is None for bias in biases):
        return None
    names = [bias.name if bias is not None else None for bias in biases]
    parts = [(name, weight.shape[0]) for name, weight in zip(names, weights, strict=True)]
    length = sum(size for _, size in parts)
    constant = emitter.name(f"float32 [{length}]", emitter.packing.vectors(parts))
    first = 0
    for name, size in parts:
        if name is not None:
            emitter.entries[name] = Entry(constant.placeholder, first)
        first += size
    return emitter.open.graph.constant((length,), constant)


def _enter(emitter: _Emitter, weights: Sequence[WeightInfo], constant: NamedConstant) -> None:
    first = 0
    for weight in weights:
        emitter.entries.setdefault(weight.name, Entry(constant.placeholder, first))
        first += weight.shape[0]


def _rms_norm(emitter: _Emitter, node: RmsNorm) -> None:
    graph = emitter.open.graph
    normalized = emitter.normalize(emitter.read(node.x), node.epsilon)
    weight = emitter.read_constant(emitter.vector(node.weight, node.offset), node.weight.shape)
    emitter.open.values[node.output] = graph.multiply(normalized, weight, emitter.output(node.output))


def _add(emitter: _Emitter, node: Add) -> None:
    left, right = emitter.read(node.left), emitter.read(node.right)
    emitter.open.values[node.output] = emitter.open.graph.add(left, right, emitter.output(node.output))


def _multiply(emitter: _Emitter, node: Multiply) -> None:
    left, right = emitter.read(node.left), emitter.read(node.right)
    emitter.open.values[node.output] = emitter.open.graph.multiply(left, right, emitter.output(node.output))


UNARY = {"gelu": "Gelu", "tanh": "Tanh", "sigmoid": "Sigmoid"}


def _activation(emitter: _Emitter, node: Activation) -> None:
    graph, x = emitter.open.graph, emitter.read(node.x)
    result = emitter.output(node.output)
    if node.kind == "silu":
        emitter.open.values[node.output] = graph.multiply(x, graph.unary("Sigmoid", x), result)
    else:
        emitter.open.values[node.output] = graph.unary(UNARY[node.kind], x, result)


def _split_heads(emitter: _Emitter, node: SplitHeads) -> None:
    graph, x = emitter.open.graph, emitter.read(node.x)
    result, inner = emitter.output(node.output), (node.heads, node.head_dim)
    steps: list[Callable[[int, int | None], int]] = [lambda x, out: graph.reshape(x, inner, out)]
    if node.norm is not None:
        weight = emitter.read_constant(emitter.vector(node.norm), node.norm.shape)
        steps.append(lambda x, out: graph.multiply(emitter.normalize(x, node.norm_epsilon), weight, out))
    if node.rotary is not None:
        rotary = node.rotary
        steps.append(lambda x, out: _rotate(emitter, x, rotary, out))
    for step in steps[:-1]:
        x = step(x, None)
    emitter.open.values[node.output] = steps[-1](x, result)


def _rotate(emitter: _Emitter, x: int, rotary: Rotary, output: int | None) -> int:
    graph = emitter.open.graph
    head_dim, half = graph.shape(x)[-1], len(rotary.frequencies)
    cosine, sine = (
        emitter.read_constant(rows, (emitter.longest_call, 1, head_dim)) for rows in emitter.rotary(rotary, head_dim)
    )
    parts = [graph.slice_last(x, half, half), graph.slice_last(x, 0, half)]
    if head_dim > 2 * half:
        parts.append(graph.slice_last(x, 2 * half, head_dim - 2 * half))
    turned = graph.concatenate_last(parts)
    return graph.add(graph.multiply(x, cosine), graph.multiply(turned, sine), output)


def _merge_heads(emitter: _Emitter, node: MergeHeads) -> None:
    x, result = emitter.read(node.x), emitter.output(node.output)
    emitter.open.values[node.output] = emitter.open.graph.reshape(x, (node.output.width,), result)


EMITTERS: Mapping[type, Callable[[_Emitter, Any], None]] = {
    Embedding: _embedding,
    CachedAttention: _cached_attention,
    LastPositions: _last_positions,
    Linear: _linear,
    RmsNorm: _rms_norm,
    Add: _add,
    Multiply: _multiply,
    Activation: _activation,
    SplitHeads: _split_heads,
    MergeHeads: _merge_heads,
}
