"""From the graph to ONNX: one emitter a node type, in :data:`EMITTERS`.

Operators, in the oldest form that ``onnx.checker`` and ONNX Runtime both take; ``com.microsoft`` ones are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from pocketlm_export.backends.onnx.attention import cache_head_dim, rotates_inside
from pocketlm_export.backends.onnx.emission import MICROSOFT, Emission
from pocketlm_export.backends.onnx.emit_attention import emit_attention
from pocketlm_export.backends.onnx.emit_experts import emit_experts
from pocketlm_export.backends.onnx.layout import Matrix, Scales, Vector
from pocketlm_export.graph.graph import (
    Activation,
    Add,
    Attention,
    Clamp,
    Embedding,
    Graph,
    LastPositions,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Multiply,
    Node,
    Norm,
    RmsNorm,
    Scale,
    Value,
)

__all__ = ["ROWS_SUFFIX", "emit"]

ROWS_SUFFIX = ".rows"  # a matrix of codes as a table of rows


def emit(emission: Emission, node: Node) -> None:
    """Append what computes ``node``."""
    EMITTERS[type(node)](emission, node)


def _embedding(emission: Emission, node: Embedding) -> None:
    ids, name = emission.values[node.ids], node.output.name
    rows, columns = node.weight.shape
    codes = emission.layout.codes((node.weight.name,), rows, columns)
    if codes is None:
        matrix = emission.stored(Matrix((node.weight.name,), node.weight.shape))
        emission.values[node.output] = emission.call("Gather", [matrix, ids], name, {"axis": 0})
        return
    # The same bytes as the head's, if the two are tied; rows there end in zeros up to the block.
    data = emission.stored(codes, (rows, codes.shape[1] * codes.shape[2]), ROWS_SUFFIX)
    scales = emission.stored(Scales(codes))
    attributes = {"bits": codes.bits, "block_size": codes.block, "gather_axis": 0, "quantize_axis": 1}
    padded = codes.blocks * codes.block
    whole = name if padded == columns else f"{name}.padded"
    x = emission.call("GatherBlockQuantized", [data, ids, scales], whole, attributes, MICROSOFT)
    if padded != columns:
        x = emission.call(
            "Slice", [x, emission.integers([0]), emission.integers([columns]), emission.integers([2])], name
        )
    emission.values[node.output] = x


def _linear(emission: Emission, node: Linear) -> None:
    names = tuple(weight.name for weight in node.weights)
    widths = [value.width for value in node.outputs]
    rows, columns = sum(widths), node.weights[0].shape[1]
    name = node.outputs[0].name if len(widths) == 1 else "+".join(value.name for value in node.outputs)
    x = emission.values[node.x]
    bias = None
    if any(node.biases):
        parts = tuple((part.name if part else None, width) for part, width in zip(node.biases, widths, strict=True))
        bias = emission.stored(Vector(parts))
    codes = emission.layout.codes(names, rows, columns)
    if codes is None:
        # Untransposed, so that a tied embedding is the same bytes.
        inputs = [x, emission.stored(Matrix(names, (rows, columns)))]
        y = emission.call("FusedMatMul", inputs, name if bias is None else f"{name}.product", {"transB": 1}, MICROSOFT)
        if bias is not None:
            y = emission.call("Add", [y, bias], name)
    else:
        attributes = {"K": columns, "N": rows, "bits": codes.bits, "block_size": codes.block, "accuracy_level": 4}
        inputs = [x, emission.stored(codes), emission.stored(Scales(codes))]
        y = emission.call(
            "MatMulNBits", inputs if bias is None else [*inputs, None, None, bias], name, attributes, MICROSOFT
        )
    pieces = _pieces(emission.graph, node.outputs)
    made = [y]
    if len(pieces) > 1:
        sizes = emission.integers([sum(value.width for value in piece) for piece in pieces])
        emission.call("Split", [y, sizes], ["+".join(value.name for value in piece) for piece in pieces], {"axis": 2})
        made = [emission.last(index) for index in range(len(pieces))]
    for piece, value in zip(pieces, made, strict=True):
        if len(piece) == 1:
            emission.values[piece[0]] = value
        else:
            emission.packed[piece] = value


def _pieces(graph: Graph, outputs: tuple[Value, ...]) -> list[tuple[Value, ...]]:
    """Outputs that lie side by side, each alone, but query, key and value together where attention takes them so."""
    pieces: list[tuple[Value, ...]] = []
    rest = outputs
    while rest:
        count = 3 if len(rest) >= 3 and _takes_packed(graph, rest[:3]) else 1
        pieces.append(rest[:count])
        rest = rest[count:]
    return pieces


def _takes_packed(graph: Graph, outputs: tuple[Value, ...]) -> bool:
    readers = [reader for value in outputs for reader in graph.readers(value)]
    reader = readers[0]
    return (
        isinstance(reader, Attention)
        and all(other is reader for other in readers)
        and (reader.query, reader.key, reader.value) == outputs
        and reader.query_norm is None
        and reader.key_norm is None
        and (reader.rotary is None or rotates_inside(reader))
        and cache_head_dim(reader.head_dim) == reader.head_dim
    )


def _norm(emission: Emission, node: Norm) -> None:
    if node.output in emission.values:  # made together with the sum before it
        return
    operator = "RMSNormalization" if isinstance(node, RmsNorm) else "LayerNormalization"
    inputs = [emission.values[node.x], *_norm_vectors(emission, node)]
    attributes = {"epsilon": node.epsilon, "axis": -1}
    emission.values[node.output] = emission.call(operator, inputs, node.output.name, attributes)


def _norm_vectors(emission: Emission, node: Norm) -> list[ir.Value]:
    if isinstance(node, RmsNorm):
        return [emission.vector(node.weight, node.offset)]
    return [emission.vector(weight) for weight in (node.weight, node.bias) if weight is not None]


def _add(emission: Emission, node: Add) -> None:
    inputs = [emission.values[node.left], emission.values[node.right]]
    norms = [reader for reader in emission.graph.readers(node.output) if isinstance(reader, Norm)]
    if len(norms) != 1:
        emission.values[node.output] = emission.call("Add", inputs, node.output.name)
        return
    (norm,) = norms
    operator = "SkipSimplifiedLayerNormalization" if isinstance(norm, RmsNorm) else "SkipLayerNormalization"
    inputs += _norm_vectors(emission, norm)
    outputs = [norm.output.name, None, None, node.output.name]
    emission.values[norm.output] = emission.call(operator, inputs, outputs, {"epsilon": norm.epsilon}, MICROSOFT)
    emission.values[node.output] = emission.last(3)


def _multiply(emission: Emission, node: Multiply) -> None:
    inputs = [emission.values[node.left], emission.values[node.right]]
    emission.values[node.output] = emission.call("Mul", inputs, node.output.name)


def _scale(emission: Emission, node: Scale) -> None:
    inputs = [emission.values[node.x], emission.scalar(node.factor)]
    emission.values[node.output] = emission.call("Mul", inputs, node.output.name)


def _clamp(emission: Emission, node: Clamp) -> None:
    bounds = [None if bound is None else emission.scalar(bound) for bound in (node.least, node.most)]
    emission.values[node.output] = emission.call("Clip", [emission.values[node.x], *bounds], node.output.name)


def _activation(emission: Emission, node: Activation) -> None:
    x, name = emission.values[node.x], node.output.name
    match node.kind:
        case "silu":
            y = emission.call("Mul", [x, emission.call("Sigmoid", [x], f"{name}.sigmoid")], name)
        case "gelu":
            y = emission.call("Gelu", [x], name, {"approximate": "none"})
        case "gelu_tanh":
            y = emission.call("Gelu", [x], name, {"approximate": "tanh"})
        case kind:
            y = emission.call({"tanh": "Tanh", "sigmoid": "Sigmoid"}[kind], [x], name)
    emission.values[node.output] = y


def _last_positions(emission: Emission, node: LastPositions) -> None:
    assert node.rows == 1  # onnxruntime-genai allocates logits by their static shape
    inputs = [emission.values[node.x], emission.integers([-1])]
    emission.values[node.output] = emission.call("Gather", inputs, node.output.name, {"axis": 1})


EMITTERS: Mapping[type, Callable[[Emission, Any], None]] = {
    Activation: _activation,
    Add: _add,
    Attention: emit_attention,
    Clamp: _clamp,
    Embedding: _embedding,
    LastPositions: _last_positions,
    LayerNorm: _norm,
    Linear: _linear,
    MixtureOfExperts: emit_experts,
    Multiply: _multiply,
    RmsNorm: _norm,
    Scale: _scale,
}
