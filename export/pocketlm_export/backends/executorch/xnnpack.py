"""Builds one XNNPACK graph in the wheel's schema dataclasses.

Shapes are upper bounds: the runtime reshapes the graph for each call. A zero in a reshape or a slice stands for the
dimension that changes. Only what XNNPACK packs (filters, their scales and biases) is a constant of the graph; every
other constant is an input, because with a weight cache XNNPACK frees the constants once they are packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pocketlm_export.backends.executorch.importing import serialize_xnnpack_binary
from pocketlm_export.backends.executorch.importing import xnnpack_schema as schema
from pocketlm_export.backends.executorch.layout import NamedConstant

__all__ = ["XnnpackGraph", "number_key"]

NONE = 2**32 - 1
NAMED = 2**64 - 1  # the offset of a constant that is found by its key
EXTERNAL_INPUT, EXTERNAL_OUTPUT = 1, 2

Shape = tuple[int, ...]
Datatype = schema.XNNDatatype


@dataclass(frozen=True, slots=True)
class _Value:
    datatype: schema.XNNDatatype
    shape: Shape
    flags: int = 0
    constant: int = 0
    quantization: schema.XNNQuantParams | None = None


def number_key(number: int) -> str:
    """What stands for the key of a graph's constant ``number`` until the key is known, of the same length."""
    return f"{number:064x}"


class XnnpackGraph:
    """Values are small integers; every operation returns the value that it makes, or ``output`` if one is given."""

    def __init__(self) -> None:
        self._values: list[_Value] = []
        self._nodes: list[schema.XNode] = []
        self._constants: list[NamedConstant] = []

    def input(self, shape: Shape) -> int:
        """A float32 argument of the delegate."""
        return self._add(_Value(Datatype.xnn_datatype_fp32, shape, EXTERNAL_INPUT))

    def output(self, shape: Shape) -> int:
        """A float32 result of the delegate."""
        return self._add(_Value(Datatype.xnn_datatype_fp32, shape, EXTERNAL_OUTPUT))

    def shape(self, value: int) -> Shape:
        """The bounds of a value."""
        return self._values[value].shape

    def constant(self, shape: Shape, constant: NamedConstant) -> int:
        """A float32 filter or bias."""
        return self._add(_Value(Datatype.xnn_datatype_fp32, shape, constant=self._data(constant)))

    def int4_filter(self, shape: Shape, group: int, codes: NamedConstant, scales: NamedConstant) -> int:
        """``[N, K]`` with a bfloat16 scale for each ``group`` columns."""
        count = shape[0] * shape[1] // group
        quantization = schema.PerChannelGroupQuant(
            scale=[], channel_dim=0, group_size=group, scale_buffer_idx=self._data(scales), num_scales=count
        )
        return self._add(_Value(Datatype.xnn_datatype_qbint4, shape, 0, self._data(codes), quantization))

    def int8_filter(self, shape: Shape, codes: NamedConstant, scales: NamedConstant) -> int:
        """``[N, K]`` with a float32 scale for each row."""
        index = self._data(scales)
        quantization = schema.PerChannelQuant(scale=[], channel_dim=0, scale_buffer_idx=index, num_scales=shape[0])
        return self._add(_Value(Datatype.xnn_datatype_qcint8, shape, 0, self._data(codes), quantization))

    def to_int8(self, x: int) -> int:
        """Activations as asymmetric int8 with scale and zero point of each row of the last axis."""
        quantization = schema.PerTokenDynamicQuant(num_nonbatch_dims=1)
        value = self._add(_Value(Datatype.xnn_datatype_qdint8, self.shape(x), quantization=quantization))
        self._node(schema.XNNConvert(input_id=x, output_id=value, flags=0))
        return value

    def fully_connected(self, x: int, weight: int, bias: int | None, output: int | None = None) -> int:
        """``x @ weight.T + bias`` over the last axis."""
        made = self._result((*self.shape(x)[:-1], self.shape(weight)[0]), output)
        bias_id = NONE if bias is None else bias
        self._node(schema.XNNFullyConnected(input1_id=x, filter_id=weight, bias_id=bias_id, output_id=made, flags=0))
        return made

    def binary(self, kind: str, left: int, right: int, output: int | None = None) -> int:
        """``kind``: the schema's name of an operation of two broadcast inputs, without ``XNN``."""
        a, b = self.shape(left), self.shape(right)
        length = max(len(a), len(b))
        wide = zip((1,) * (length - len(a)) + a, (1,) * (length - len(b)) + b, strict=True)
        made = self._result(tuple(max(pair) for pair in wide), output)
        self._node(getattr(schema, f"XNN{kind}")(input1_id=left, input2_id=right, output_id=made, flags=0))
        return made

    def matrix_multiply(self, left: int, right: int, output: int | None = None) -> int:
        """``[..., M, K] @ [..., K, N]``, their other dimensions alike or 1."""
        a, b = self.shape(left), self.shape(right)
        batch = tuple(max(pair) for pair in zip(a[:-2], b[:-2], strict=True))
        made = self._result((*batch, a[-2], b[-1]), output)
        self._node(schema.XNNBatchMatrixMultiply(input1_id=left, input2_id=right, output_id=made, flags=0))
        return made

    def transpose(self, x: int, order: Sequence[int], output: int | None = None) -> int:
        """Dimension ``i`` of the result is dimension ``order[i]`` of ``x``."""
        made = self._result(tuple(self.shape(x)[dimension] for dimension in order), output)
        self._node(
            schema.XNNStaticTranspose(num_dims=len(order), perm=list(order), input_id=x, output_id=made, flags=0)
        )
        return made

    def unary(self, kind: str, x: int, output: int | None = None) -> int:
        """``kind``: the schema's name of an operation of one input, without ``XNN``."""
        made = self._result(self.shape(x), output)
        self._node(getattr(schema, f"XNN{kind}")(input_id=x, output_id=made, flags=0))
        return made

    def reshape(self, x: int, inner: Shape, output: int | None = None) -> int:
        """``[1, S, ...]`` -> ``[1, S, *inner]``."""
        made = self._result((*self.shape(x)[:2], *inner), output)
        shape = [1, 0, *inner]
        self._node(schema.XNNStaticReshape(num_dims=len(shape), new_shape=shape, input_id=x, output_id=made, flags=0))
        return made

    def slice_last(self, x: int, start: int, width: int, output: int | None = None) -> int:
        """``x[..., start : start + width]`` of ``[1, S, ...]``."""
        shape = self.shape(x)
        made = self._result((*shape[:-1], width), output)
        offsets, sizes = [0] * (len(shape) - 1) + [start], [1, 0, *shape[2:-1], width]
        self._node(
            schema.XNNStaticSlice(
                num_dims=len(shape), offsets=offsets, sizes=sizes, input_id=x, output_id=made, flags=0
            )
        )  # fmt: skip
        return made

    def concatenate_last(self, parts: Sequence[int], output: int | None = None) -> int:
        """Two or three values side by side on the last axis."""
        shape = self.shape(parts[0])
        made = self._result((*shape[:-1], sum(self.shape(part)[-1] for part in parts)), output)
        ids = [*parts, *[NONE] * (5 - len(parts))]
        kind = {2: schema.XNNConcatenate2, 3: schema.XNNConcatenate3}[len(parts)]
        self._node(
            kind(axis=len(shape) - 1, input1_id=ids[0], input2_id=ids[1], input3_id=ids[2], input4_id=ids[3],
                 input5_id=ids[4], output_id=made, flags=0)
        )  # fmt: skip
        return made

    @property
    def constants(self) -> list[NamedConstant]:
        """What the delegate finds by keys, in the order of their :func:`number_key`."""
        return self._constants

    def to_bytes(self, alike: dict[str, bytes]) -> bytes:
        """The delegate's payload, with :func:`number_key` of each constant in the place of its key. Its arguments:
        inputs, then outputs, as they were made.

        Serializing takes 20 ms, and thousands of experts differ in their keys alone: ``alike`` keeps what was made.
        """
        inputs = [i for i, value in enumerate(self._values) if value.flags == EXTERNAL_INPUT]
        outputs = [i for i, value in enumerate(self._values) if value.flags == EXTERNAL_OUTPUT]
        external = {value: index for index, value in enumerate([*inputs, *outputs])}
        values = []
        for index, value in enumerate(self._values):
            tensor = schema.XNNTensorValue(
                datatype=value.datatype, num_dims=len(value.shape), dims=list(value.shape),
                constant_buffer_idx=value.constant, external_id=external.get(index, NONE), flags=value.flags,
                id_out=index,
            )  # fmt: skip
            quantization = value.quantization
            values.append(
                schema.XValue(tensor if quantization is None else schema.XNNQuantizedTensorValue(tensor, quantization))
            )
        constants = [schema.ConstantDataOffset(offset=0, size=0)]
        constants += [
            schema.ConstantDataOffset(NAMED, item.piece.size, number_key(number))
            for number, item in enumerate(self._constants)
        ]
        graph = schema.XNNGraph(
            version="0", xnodes=self._nodes, xvalues=values, num_externs=len(external), input_ids=inputs,
            output_ids=outputs, constant_data=constants,
        )  # fmt: skip
        description = repr(graph)
        if description not in alike:
            alike[description] = bytes(serialize_xnnpack_binary(graph, bytearray()))
        return alike[description]

    def _add(self, value: _Value) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def _result(self, shape: Shape, output: int | None) -> int:
        return self._add(_Value(Datatype.xnn_datatype_fp32, shape)) if output is None else output

    def _data(self, constant: NamedConstant) -> int:
        if constant not in self._constants:
            self._constants.append(constant)
        return self._constants.index(constant) + 1

    def _node(self, node: schema.XNodeUnion) -> None:
        self._nodes.append(schema.XNode(xnode_union=node, debug_handle=len(self._nodes)))
