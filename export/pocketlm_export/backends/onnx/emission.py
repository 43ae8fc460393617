"""A model under construction: operators, values, and constants as places in the data file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from pocketlm_export.backends.onnx.attention import cache_head_dim
from pocketlm_export.backends.onnx.block_mask import block_mask
from pocketlm_export.backends.onnx.layout import DATA_FILE, Codes, Content, Layout, Region, Table, Vector
from pocketlm_export.graph.graph import Attention, Graph, Value, WeightInfo

__all__ = ["MICROSOFT", "Emission", "tensor_value"]

MICROSOFT = "com.microsoft"


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

    def block_mask(self, node: Attention) -> list[ir.Value]:
        """Rows and columns of a block-sparse layer's mask, inside the model: older runtimes infer shapes from them."""
        assert node.sparsity is not None
        sparsity, parts = node.sparsity, []
        parameters = sparsity.block_size, sparsity.local_blocks, sparsity.stride, sparsity.head_shift, node.heads
        mask = block_mask(sparsity, node.heads, self.graph.context_length)
        for part, indices in zip(("rows", "columns"), mask, strict=True):
            name = f"block_mask_{'_'.join(map(str, parameters))}.{part}"
            if name not in self.initializers:
                constant = ir.tensor(indices, name=name)
                self.initializers[name] = tensor_value(name, ir.DataType.INT32, indices.shape, constant)
            parts.append(self.initializers[name])
        return parts

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
