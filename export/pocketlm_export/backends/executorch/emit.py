"""Translates the graph: one table from node to emitter. Delegated nodes go into the open XNNPACK graph, others into
instructions of the method."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pocketlm_export.backends.base import Entry
from pocketlm_export.backends.executorch.attention import emit_attention
from pocketlm_export.backends.executorch.emission import Emission, Emitter, OpenDelegate, Table
from pocketlm_export.backends.executorch.experts import emit_experts
from pocketlm_export.backends.executorch.importing import ScalarType
from pocketlm_export.backends.executorch.layout import NamedConstant
from pocketlm_export.backends.executorch.packing import Packing
from pocketlm_export.backends.executorch.partition import (
    CachedAttention,
    ChosenExperts,
    Delegate,
    MergeHeads,
    RouterShares,
    SplitHeads,
    partition,
)
from pocketlm_export.backends.executorch.xnnpack import XnnpackGraph
from pocketlm_export.graph.graph import (
    Activation,
    Add,
    Clamp,
    Embedding,
    Graph,
    LastPositions,
    LayerNorm,
    Linear,
    Multiply,
    RmsNorm,
    Scale,
    WeightInfo,
)
from pocketlm_export.graph.rotary import Rotary
from pocketlm_export.quantization.schemes import SchemeRow

__all__ = ["emit"]

FLOAT_SCALAR_TYPE = 6
END = 2**63 - 1


def emit(graph: Graph, packing: Packing, longest_call: int) -> Emission:
    """Translate ``graph``, whose calls take up to ``longest_call`` tokens."""
    emitter = Emitter(graph, packing, longest_call)
    for step in partition(graph):
        if isinstance(step, Delegate):
            _delegate(emitter, step)
        else:
            EMITTERS[type(step)](emitter, step)
    return Emission(emitter.method, emitter.tensors[graph.logits], emitter.named, emitter.entries)


def _delegate(emitter: Emitter, step: Delegate) -> None:
    emitter.open = OpenDelegate(XnnpackGraph(), step.outputs)
    for node in step.nodes:
        EMITTERS[type(node)](emitter, node)
    emitter.method.delegate(emitter.open.graph, [*emitter.open.inputs, *emitter.open.results])


def _embedding(emitter: Emitter, node: Embedding) -> None:
    method, packing = emitter.method, emitter.packing
    name, (rows, width) = node.weight.name, node.weight.shape
    row = packing.weights.row(name)
    ids, result = emitter.tensors[node.ids], emitter.make(node.output)
    if row is None:
        codes = packing.values([name])
        emitter.table = Table(codes, None)
        weight = method.constant((rows, width), ScalarType.FLOAT, codes)
        padding, flag = method.scalar(-1), method.scalar(False)
        method.kernel("aten::embedding.out", [weight, ids, padding, flag, flag], result)
    else:
        codes = packing.codes([name], even_high=True)
        half = row.bits == 4
        scales = packing.scales([name], "float16" if half else "float32")
        emitter.table = Table(codes, None if half else scales)
        weight = method.constant((rows, width // (8 // row.bits)), ScalarType.BYTE if half else ScalarType.CHAR, codes)
        groups = row.groups(width)
        steps = method.constant((rows, groups), ScalarType.HALF if half else ScalarType.FLOAT, scales)
        lowest, highest = -(2 ** (row.bits - 1)), 2 ** (row.bits - 1) - 1
        method.kernel(
            f"quantized_decomposed::embedding_{'4bit' if half else 'byte'}.dtype_out",
            [weight, steps, *map(method.scalar, (None, lowest, highest)), ids, method.scalar(FLOAT_SCALAR_TYPE)],
            result,
        )
    emitter.entries[name] = Entry(f"constant/{method.buffer_index(weight)}")


def _last_positions(emitter: Emitter, node: LastPositions) -> None:
    method = emitter.method
    start, stop, shape = method.scalar(-node.rows), method.scalar(END), emitter.shape(node.output)
    emitter.tensors[node.output] = emitter.slice(emitter.tensors[node.x], 1, start, stop, shape)


def _linear(emitter: Emitter, node: Linear) -> None:
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


def _filter(emitter: Emitter, row: SchemeRow | None, x: int, weights: Sequence[WeightInfo]) -> tuple[int, int]:
    """The input as the filter wants it, and the filter."""
    graph, packing = emitter.open.graph, emitter.packing
    names = [weight.name for weight in weights]
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    tied = names == [emitter.graph.embedding.weight.name]
    table = emitter.table if tied else Table(None, None)
    if row is None:
        values = emitter.name(f"float32 {list(shape)}", table.codes or packing.values(names))
        _enter(emitter, weights, values)
        return x, graph.constant(shape, values)
    codes = table.codes or packing.codes(names)
    scales = table.float_scales or packing.scales(names, "bfloat16" if row.bits == 4 else "float32")
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


def _bias(emitter: Emitter, weights: Sequence[WeightInfo], biases: Sequence[WeightInfo | None]) -> int | None:
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


def _enter(emitter: Emitter, weights: Sequence[WeightInfo], constant: NamedConstant) -> None:
    first = 0
    for weight in weights:
        emitter.entries.setdefault(weight.name, Entry(constant.placeholder, first))
        first += weight.shape[0]


def _rms_norm(emitter: Emitter, node: RmsNorm) -> None:
    x, result = emitter.read(node.x), emitter.output(node.output)
    emitter.open.values[node.output] = emitter.normalize(x, node.epsilon, node.weight, node.offset, result)


def _layer_norm(emitter: Emitter, node: LayerNorm) -> None:
    centered, result = emitter.center(emitter.read(node.x)), emitter.output(node.output)
    if node.bias is None:
        emitter.open.values[node.output] = emitter.normalize(centered, node.epsilon, node.weight, output=result)
        return
    normal = emitter.normalize(centered, node.epsilon, node.weight)
    bias = emitter.read_constant(emitter.vector(node.bias), node.bias.shape)
    emitter.open.values[node.output] = emitter.open.graph.binary("Add", normal, bias, result)


def _add(emitter: Emitter, node: Add) -> None:
    _binary(emitter, "Add", node)


def _multiply(emitter: Emitter, node: Multiply) -> None:
    _binary(emitter, "Multiply", node)


def _binary(emitter: Emitter, kind: str, node: Add | Multiply) -> None:
    left, right = emitter.read(node.left), emitter.read(node.right)
    emitter.open.values[node.output] = emitter.open.graph.binary(kind, left, right, emitter.output(node.output))


def _scale(emitter: Emitter, node: Scale) -> None:
    x, result = emitter.read(node.x), emitter.output(node.output)
    emitter.open.values[node.output] = emitter.with_number("Multiply", x, node.factor, result)


def _clamp(emitter: Emitter, node: Clamp) -> None:
    """Not XNNPACK's clamp: its bounds must be two, and infinity is none that its schema's JSON can hold."""
    x, result = emitter.read(node.x), emitter.output(node.output)
    if node.least is not None:
        x = emitter.with_number("Maximum", x, node.least, result if node.most is None else None)
    if node.most is not None:
        x = emitter.with_number("Minimum", x, node.most, result)
    emitter.open.values[node.output] = x


UNARY = {"gelu": "Gelu", "tanh": "Tanh", "sigmoid": "Sigmoid"}
# gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) x (1 + 0.044715 x^2)) = x sigmoid(A x (B + (C x)^2)), with float32 values whose
# products A B and A C^2 are right to 2e-11. XNNPACK's own gelu is the one with erf.
GELU_A, GELU_B, GELU_C = 1.5861966609954834, 1.0060348510742188, 0.21209631860256195


def _activation(emitter: Emitter, node: Activation) -> None:
    graph, x = emitter.open.graph, emitter.read(node.x)
    result = emitter.output(node.output)
    match node.kind:
        case "silu":
            made = graph.binary("Multiply", x, graph.unary("Sigmoid", x), result)
        case "gelu_tanh":
            squared = graph.unary("Square", emitter.with_number("Multiply", x, GELU_C))
            cubic = emitter.with_number("Add", squared, GELU_B)
            inner = graph.binary("Multiply", emitter.with_number("Multiply", x, GELU_A), cubic)
            made = graph.binary("Multiply", x, graph.unary("Sigmoid", inner), result)
        case kind:
            made = graph.unary(UNARY[kind], x, result)
    emitter.open.values[node.output] = made


def _split_heads(emitter: Emitter, node: SplitHeads) -> None:
    graph, x = emitter.open.graph, emitter.read(node.x)
    result, inner = emitter.output(node.output), (node.heads, node.head_dim)
    steps: list[Callable[[int, int | None], int]] = [lambda x, out: graph.reshape(x, inner, out)]
    if node.norm is not None:
        norm = node.norm
        steps.append(lambda x, out: emitter.normalize(x, node.norm_epsilon, norm, node.norm_offset, out))
    if node.rotary is not None:
        rotary = node.rotary
        steps.append(lambda x, out: _rotate(emitter, x, rotary, out))
    for step in steps[:-1]:
        x = step(x, None)
    emitter.open.values[node.output] = steps[-1](x, result)


def _rotate(emitter: Emitter, x: int, rotary: Rotary, output: int | None) -> int:
    graph = emitter.open.graph
    head_dim, half = graph.shape(x)[-1], len(rotary.frequencies)
    cosine, sine = (
        emitter.read_constant(rows, (emitter.longest_call, 1, head_dim)) for rows in emitter.rotary(rotary, head_dim)
    )
    parts = [graph.slice_last(x, half, half), graph.slice_last(x, 0, half)]
    if head_dim > 2 * half:
        parts.append(graph.slice_last(x, 2 * half, head_dim - 2 * half))
    turned = graph.binary("Multiply", graph.concatenate_last(parts), sine)
    return graph.binary("Add", graph.binary("Multiply", x, cosine), turned, output)


def _router_shares(emitter: Emitter, node: RouterShares) -> None:
    row = emitter.packing.weights.row(node.router.name)
    x, router = _filter(emitter, row, emitter.read(node.x), (node.router,))
    scores = emitter.open.graph.fully_connected(x, router, None)
    emitter.open.values[node.output] = emitter.open.graph.unary("Softmax", scores, emitter.output(node.output))


def _chosen_experts(emitter: Emitter, node: ChosenExperts) -> None:
    emit_experts(emitter, node, _delegate)


def _merge_heads(emitter: Emitter, node: MergeHeads) -> None:
    x, result = emitter.read(node.x), emitter.output(node.output)
    emitter.open.values[node.output] = emitter.open.graph.reshape(x, (node.output.width,), result)


EMITTERS: Mapping[type, Callable[[Emitter, Any], None]] = {
    Embedding: _embedding,
    CachedAttention: emit_attention,
    ChosenExperts: _chosen_experts,
    LastPositions: _last_positions,
    Linear: _linear,
    RmsNorm: _rms_norm,
    LayerNorm: _layer_norm,
    Add: _add,
    Multiply: _multiply,
    Scale: _scale,
    Clamp: _clamp,
    Activation: _activation,
    SplitHeads: _split_heads,
    MergeHeads: _merge_heads,
    RouterShares: _router_shares,
}
