"""From the graph to ONNX: one emitter a node type, in :data:`EMITTERS`.

Operators, in the oldest form that ``onnx.checker`` and ONNX Runtime both take; ``com.microsoft`` ones are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from pocketlm_export.backends.onnx.attention import cache_head_dim, rotates_inside
from pocketlm_export.backends.onnx.layout import (
    DATA_FILE,
    Codes,
    Content,
    Layout,
    Matrix,
    Region,
    Scales,
    Table,
    Vector,
)
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
    Multiply,
    Node,
    Norm,
    RmsNorm,
    Scale,
    Value,
    WeightInfo,
)

__all__ = ["HEAD_INPUT", "MICROSOFT", "ROWS_SUFFIX", "Emission", "tensor_value"]

MICROSOFT = "com.microsoft"
HEAD_INPUT = "hidden_states"
ROWS_SUFFIX = ".rows"  # a matrix of codes as a table of rows


@dataclass(slots=True)
class Emission:
    """A model under construction. ``values`` maps the graph's values to ONNX's."""

    graph: Graph
    layout: Layout
    nodes: list[ir.Node] = field(default_factory=list)
    values: dict[Value, ir.Value] = field(default_factory=dict)
    packed: dict[tuple[Value, ...], ir.Value] = field(default_factory=dict)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    caches: dict[str, ir.Value] = field(default_factory=dict)
    presents: dict[str, ir.Value] = field(default_factory=dict)
    mask: ir.Value = field(
        default_factory=lambda: tensor_value("attention_mask", ir.DataType.INT64, (1, "total_sequence"))
    )
    _shared: dict[str, ir.Value] = field(default_factory=dict)

    def emit(self, node: Node) -> None:
        """Append what computes ``node``."""
        EMITTERS[type(node)](self, node)

    def call(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        outputs: str | Sequence[str | None],
        attributes: Mapping[str, int | float | str | Sequence[int]] = {},
        domain: str = "",
    ) -> ir.Value:
        """Append an operator; returns the first output."""
        names = [outputs] if isinstance(outputs, str) else outputs
        made = [ir.Value(name=name or "") for name in names]
        self.nodes.append(ir.node(operator, inputs, attributes, domain=domain, outputs=made, name=names[0]))
        return made[0]

    def last(self, index: int) -> ir.Value:
        """An output of the operator just appended."""
        return self.nodes[-1].outputs[index]

    def integers(self, values: Sequence[int]) -> ir.Value:
        """A constant int64 vector inside the model."""
        name = "int64_" + "_".join(map(str, values)).replace("-", "minus")
        if name not in self.initializers:
            constant = ir.tensor(np.array(values, np.int64), name=name)
            self.initializers[name] = tensor_value(name, ir.DataType.INT64, (len(values),), constant)
        return self.initializers[name]

    def stored(self, content: Content, shape: tuple[int, ...] | None = None, suffix: str = "") -> ir.Value:
        """A constant in the data file; a second ``shape`` with a ``suffix`` is another view of the same bytes."""
        region = self.layout.place(content)
        name = region.name + suffix
        if name not in self.initializers:
            self.initializers[name] = _external(name, region, shape or content.shape)
        return self.initializers[name]

    def scalar(self, value: float) -> ir.Value:
        """A constant float32 scalar inside the model."""
        name = f"float32_{value!r}".replace("-", "minus")
        if name not in self.initializers:
            constant = ir.tensor(np.float32(value), name=name)
            self.initializers[name] = tensor_value(name, ir.DataType.FLOAT, (), constant)
        return self.initializers[name]

    def vector(self, weight: WeightInfo, offset: float = 0.0) -> ir.Value:
        """The values of one vector, plus ``offset``: added when the model is loaded, because a sum of float32 would no
        longer tell the weight."""
        values = self.stored(Vector(((weight.name, weight.shape[0]),)))
        if not offset:
            return values
        name = f"{weight.name}.with_offset"
        return self._once(name, lambda: self.call("Add", [values, self.scalar(offset)], name))

    def tables(self, node: Attention) -> list[ir.Value]:
        """Cosine and sine of a layer's rotation."""
        assert node.rotary is not None
        return [self.stored(Table(node.rotary, self.graph.context_length, part)) for part in ("cos", "sin")]

    def total(self) -> ir.Value:
        """Positions after this call, int64 ``[1]``: the sum of the mask."""
        return self._once(
            "total_int64",
            lambda: self.call("ReduceSum", [self.mask, self.integers([1])], "total_int64", {"keepdims": 0}),
        )

    def last_position(self) -> ir.Value:
        """int32 ``[1]``."""

        def emit() -> ir.Value:
            last = self.call("Sub", [self.total(), self.integers([1])], "last_position_int64")
            return self.call("Cast", [last], "last_position", {"to": ir.DataType.INT32})

        return self._once("last_position", emit)

    def mask_length(self) -> ir.Value:
        """int32 ``[1]``."""

        def emit() -> ir.Value:
            length = self.call("Shape", [self.mask], "mask_length_int64", {"start": 1, "end": 2})
            return self.call("Cast", [length], "mask_length", {"to": ir.DataType.INT32})

        return self._once("mask_length", emit)

    def first_position(self) -> ir.Value:
        """Position of the call's first token, int64 ``[1]``."""

        def emit() -> ir.Value:
            length = self.call("Shape", [self.values[self.graph.ids]], "call_length", {"start": 1, "end": 2})
            return self.call("Sub", [self.total(), length], "first_position")

        return self._once("first_position", emit)

    def cache(self, node: Attention, part: str) -> tuple[ir.Value, str]:
        """The past of a layer's ``key`` or ``value``, and the name of its present."""
        shape = (1, node.kv_heads, "past_sequence", cache_head_dim(node.head_dim))
        name = f"past_key_values.{node.layer}.{part}"
        self.caches[name] = tensor_value(name, ir.DataType.FLOAT, shape)
        return self.caches[name], f"present.{node.layer}.{part}"

    def _once(self, name: str, emit: Callable[[], ir.Value]) -> ir.Value:
        if name not in self._shared:
            self._shared[name] = emit()
        return self._shared[name]


def tensor_value(name: str, dtype: ir.DataType, shape: Sequence[int | str], constant: Any = None) -> ir.Value:
    """A typed value."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=constant)


def _external(name: str, region: Region, shape: tuple[int, ...]) -> ir.Value:
    dtype = ir.DataType.UINT8 if isinstance(region.content, Codes) else ir.DataType.FLOAT
    tensor = ir.ExternalTensor(DATA_FILE, region.offset, region.size, dtype, shape=ir.Shape(shape), name=name)
    return tensor_value(name, dtype, shape, tensor)


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


def _attention(emission: Emission, node: Attention) -> None:
    name, width = node.output.name, cache_head_dim(node.head_dim)
    query: ir.Value | None
    key: ir.Value | None
    value: ir.Value | None
    inside = rotates_inside(node)
    packed = emission.packed.get((node.query, node.key, node.value))
    if packed is not None:
        query, key, value = packed, None, None
    else:
        parts = (("query", node.query, node.query_norm, node.heads), ("key", node.key, node.key_norm, node.kv_heads))
        query, key = (_prepare(emission, node, f"{name}.{part}", x, norm, heads) for part, x, norm, heads in parts)
        value = _pad_heads(emission, emission.values[node.value], f"{name}.value", node.kv_heads, node.head_dim)
    past_key, present_key = emission.cache(node, "key")
    past_value, present_value = emission.cache(node, "value")
    inputs = [query, key, value, past_key, past_value, emission.last_position(), emission.mask_length()]
    attributes: dict[str, int | float] = {
        "num_heads": node.heads,
        "kv_num_heads": node.kv_heads,
        "scale": node.scale,
        "do_rotary": int(inside),
        "rotary_interleaved": 0,
        "local_window_size": node.window or -1,
        "softcap": node.softcap or 0.0,
    }
    mixed = name if width == node.head_dim else f"{name}.padded"
    y = emission.call(
        "GroupQueryAttention",
        [*inputs, *emission.tables(node)] if inside else inputs,
        [mixed, present_key, present_value],
        attributes,
        MICROSOFT,
    )
    emission.presents[present_key], emission.presents[present_value] = emission.last(1), emission.last(2)
    emission.values[node.output] = (
        y if width == node.head_dim else _unpad_heads(emission, y, name, node.heads, node.head_dim)
    )


def _prepare(emission: Emission, node: Attention, name: str, x: Value, norm: WeightInfo | None, heads: int) -> ir.Value:
    """Queries or keys as GroupQueryAttention takes them: normalized, rotated where it can't, filled up."""
    y = emission.values[x]
    if norm is not None:
        # The CPU kernel refuses the norms that the operator's schema has.
        y = emission.call("Reshape", [y, emission.integers([0, 0, heads, node.head_dim])], f"{name}.heads")
        inputs = [y, emission.vector(norm, node.norm_offset)]
        y = emission.call("RMSNormalization", inputs, f"{name}.norm", {"epsilon": node.norm_epsilon, "axis": -1})
        y = emission.call("Reshape", [y, emission.integers([0, 0, heads * node.head_dim])], f"{name}.normalized")
    if node.rotary is not None and not rotates_inside(node):
        width = 2 * len(node.rotary.frequencies)
        attributes = {
            "num_heads": heads,
            "rotary_embedding_dim": width if width < node.head_dim else 0,
            "interleaved": 0,
        }
        inputs = [y, emission.first_position(), *emission.tables(node)]
        y = emission.call("RotaryEmbedding", inputs, f"{name}.rotated", attributes, MICROSOFT)
    return _pad_heads(emission, y, name, heads, node.head_dim)


def _pad_heads(emission: Emission, x: ir.Value, name: str, heads: int, head_dim: int) -> ir.Value:
    width = cache_head_dim(head_dim)
    if width == head_dim:
        return x
    y = emission.call("Reshape", [x, emission.integers([0, 0, heads, head_dim])], f"{name}.narrow")
    y = emission.call(
        "Pad", [y, emission.integers([0, width - head_dim]), None, emission.integers([3])], f"{name}.wide"
    )
    return emission.call("Reshape", [y, emission.integers([0, 0, heads * width])], f"{name}.padded")


def _unpad_heads(emission: Emission, x: ir.Value, name: str, heads: int, head_dim: int) -> ir.Value:
    wide = emission.integers([0, 0, heads, cache_head_dim(head_dim)])
    y = emission.call("Reshape", [x, wide], f"{name}.wide")
    y = emission.call(
        "Slice", [y, emission.integers([0]), emission.integers([head_dim]), emission.integers([3])], f"{name}.narrow"
    )
    return emission.call("Reshape", [y, emission.integers([0, 0, heads * head_dim])], name)


EMITTERS: Mapping[type, Callable[[Emission, Any], None]] = {
    Activation: _activation,
    Add: _add,
    Attention: _attention,
    Clamp: _clamp,
    Embedding: _embedding,
    LastPositions: _last_positions,
    LayerNorm: _norm,
    Linear: _linear,
    Multiply: _multiply,
    RmsNorm: _norm,
    Scale: _scale,
}
