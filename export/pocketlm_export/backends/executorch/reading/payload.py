"""One XNNPACK payload (backends/xnnpack/serialization/schema.fbs) as a typed graph, and its JSON back to bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.executorch.importing import XNNHeader, xnnpack_schema_source
from pocketlm_export.backends.executorch.reading.flatc import FlatcError, from_json, to_json_together

__all__ = [
    "NAMED",
    "OUTPUT",
    "Payload",
    "PayloadConstant",
    "PayloadNode",
    "PayloadValue",
    "parse_payloads",
    "payload_bytes",
]

NONE = 2**32 - 1
NAMED = 2**64 - 1
INPUT, OUTPUT = 1, 2  # XNN_VALUE_FLAG_EXTERNAL_*
ALIGNMENT = 16
BATCH, BATCH_BYTES = 256, 16 << 20  # payloads that one process parses
QUANTIZED = ("qcint8", "qbint4")


@dataclass(frozen=True, slots=True)
class PayloadConstant:
    """``size`` bytes that the program holds under ``key``."""

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class PayloadValue:
    """A value: ``shape`` is its bound. ``external`` is its index among the delegate's arguments, None inside; ``flags``
    tell an input (1) from an output (2).

    ``datatype`` is the schema's without ``xnn_datatype_``; ``group`` the columns that share a scale of a ``qbint4``.
    """

    id: int
    datatype: str
    shape: tuple[int, ...]
    external: int | None
    flags: int
    constant: PayloadConstant | None
    scales: PayloadConstant | None
    group: int | None


@dataclass(frozen=True, slots=True)
class PayloadNode:
    """``kind`` is the schema's without ``XNN``; ``inputs`` in its order, an absent bias left out; ``attributes`` holds
    the other fields."""

    kind: str
    inputs: tuple[int, ...]
    output: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Payload:
    """A delegate's graph. ``inputs`` and ``outputs`` are ids of values in the order of the delegate's arguments, and
    ``table`` is the schema's JSON, to be edited and written again."""

    values: Mapping[int, PayloadValue]
    nodes: Sequence[PayloadNode]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    table: Mapping[str, Any]

    @cached_property
    def producers(self) -> dict[int, PayloadNode]:
        """The node that makes each value made inside."""
        return {node.output: node for node in self.nodes}

    def is_quantized(self, node: PayloadNode) -> bool:
        """Whether ``node`` multiplies int8 activations with a quantized filter."""
        return node.kind == "FullyConnected" and self.values[node.inputs[1]].datatype in QUANTIZED


def parse_payloads(contents: Iterable[bytes], where: str) -> list[Payload]:
    """Parse and check payloads. Raises :class:`BundleError` that begins with ``where`` and the payload's number for a
    malformed one, :class:`UnsupportedError` for what this reader does not know."""
    payloads: list[Payload] = []
    batch: list[tuple[str, bytes]] = []
    for number, content in enumerate(contents):
        name = f"{where}: delegate {number}"
        batch.append((name, _flatbuffer(content, name)))
        if len(batch) == BATCH or sum(len(graph) for _, graph in batch) > BATCH_BYTES:
            payloads += _parsed(batch)
            batch = []
    return payloads + _parsed(batch)


def _flatbuffer(content: bytes, where: str) -> bytes:
    try:
        header = XNNHeader.from_bytes(content[: XNNHeader.EXPECTED_LENGTH])
    except ValueError as error:
        raise BundleError(f"{where}: no XNNPACK payload: {error}") from error
    start, stop = header.flatbuffer_offset, header.flatbuffer_offset + header.flatbuffer_size
    if stop > len(content):
        raise BundleError(f"{where}: its graph ends at byte {stop} of {len(content)}")
    return content[start:stop]


def _parsed(batch: Sequence[tuple[str, bytes]]) -> list[Payload]:
    if not batch:
        return []
    schemas = {"schema.fbs": xnnpack_schema_source()}
    try:
        tables = to_json_together(schemas, [content for _, content in batch])
    except (FlatcError, ValueError) as error:
        if len(batch) > 1:  # which of them is it?
            return [payload for one in batch for payload in _parsed([one])]
        raise BundleError(f"{batch[0][0]}: malformed XNNPACK graph: {error}") from error
    return [_complete(table, where) for table, (where, _) in zip(tables, batch, strict=True)]


def _complete(table: Mapping[str, Any], where: str) -> Payload:
    try:
        return _checked(_graph(table, where), where)
    except (KeyError, IndexError, TypeError, AttributeError) as error:  # a table or a vector that is absent
        raise BundleError(f"{where}: incomplete XNNPACK graph: {error!r}") from error


def payload_bytes(table: Mapping[str, Any]) -> bytes:
    """The payload of a graph in the schema's JSON, whose constants are all named."""
    flatbuffer = from_json({"schema.fbs": xnnpack_schema_source()}, table)
    head = -(-XNNHeader.EXPECTED_LENGTH // ALIGNMENT) * ALIGNMENT
    tail = -(-len(flatbuffer) // ALIGNMENT) * ALIGNMENT
    header: bytes = XNNHeader(head, len(flatbuffer), head + tail, 0).to_bytes()
    return header.ljust(head, b"\0") + flatbuffer.ljust(tail, b"\0")


def _graph(table: Mapping[str, Any], where: str) -> Payload:
    values = {}
    for item in table["xvalues"]:
        value = _value(item["xvalue_union"], table["constant_data"], where)
        if value.id in values:
            raise BundleError(f"{where}: value {value.id} stands twice")
        values[value.id] = value
    nodes = tuple(_node(item, where) for item in table["xnodes"])
    inputs, outputs = _arguments(table, values, where)
    return Payload(values, nodes, inputs, outputs, table)


def _value(union: Mapping[str, Any], constants: Sequence[Mapping[str, Any]], where: str) -> PayloadValue:
    tensor, quantization = union.get("tensor_value", union), union.get("quant_params", {})
    number = int(tensor["id_out"])
    name = f"{where}: value {number}"

    def constant(index: int) -> PayloadConstant | None:
        if index == 0:
            return None
        entry = constants[index]
        if not entry.get("named_key") or entry["offset"] != NAMED:
            raise UnsupportedError(f"{name}: a constant inside the payload; constants must be named data")
        return PayloadConstant(str(entry["named_key"]), int(entry["size"]))

    if len(tensor["dims"]) != tensor["num_dims"]:
        raise BundleError(f"{name}: {len(tensor['dims'])} sizes for {tensor['num_dims']} dimensions")
    if quantization.get("channel_dim", 0) != 0:
        raise UnsupportedError(f"{name}: scales along dimension {quantization['channel_dim']}")
    if quantization.get("num_nonbatch_dims", 1) != 1:
        raise UnsupportedError(f"{name}: int8 with a scale for {quantization['num_nonbatch_dims']} dimensions")
    if quantization.get("scale"):
        raise UnsupportedError(f"{name}: scales inside the graph")
    if tensor["flags"] not in (0, INPUT, OUTPUT):
        raise UnsupportedError(f"{name}: flags {tensor['flags']}")
    external = None if tensor["external_id"] == NONE else int(tensor["external_id"])
    if (external is None) != (tensor["flags"] == 0):
        raise BundleError(f"{name}: external id {external} with flags {tensor['flags']}")
    return PayloadValue(
        number,
        str(tensor["datatype"]).removeprefix("xnn_datatype_"),
        tuple(tensor["dims"]),
        external,
        tensor["flags"],
        constant(tensor["constant_buffer_idx"]),
        constant(quantization.get("scale_buffer_idx", 0)),
        quantization.get("group_size"),
    )


def _node(item: Mapping[str, Any], where: str) -> PayloadNode:
    kind, fields = str(item["xnode_union_type"]).removeprefix("XNN"), dict(item["xnode_union"])
    if fields.pop("flags", 0) != 0:
        raise UnsupportedError(f"{where}: {kind} with flags {item['xnode_union']['flags']}")
    if item.get("output_min_max") is not None:
        raise UnsupportedError(f"{where}: {kind} that clamps its output")
    output = fields.pop("output_id")
    names = [name for name in ("input_id", *(f"input{i}_id" for i in range(1, 6)), "filter_id", "bias_id")
             if name in fields]  # fmt: skip
    inputs = tuple(fields.pop(name) for name in names)
    if kind.startswith("Concatenate"):
        count = int(kind[-1])
        if any(number != NONE for number in inputs[count:]):
            raise BundleError(f"{where}: {kind} of more than {count} values")
        inputs = inputs[:count]
    elif kind == "FullyConnected" and inputs[-1] == NONE:
        inputs = inputs[:-1]
    return PayloadNode(kind, inputs, output, fields)


def _arguments(
    table: Mapping[str, Any], values: Mapping[int, PayloadValue], where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The runtime finds arguments by external id (XNNExecutor::prepare_args); the graph's own lists must agree."""
    arguments = {value.external: value for value in values.values() if value.external is not None}
    if sorted(arguments) != list(range(table["num_externs"])):
        raise BundleError(f"{where}: arguments {sorted(arguments)} of {table['num_externs']}")
    ordered = [arguments[external] for external in sorted(arguments)]
    inputs, outputs = (tuple(value.id for value in ordered if value.flags == flags) for flags in (INPUT, OUTPUT))
    if sorted(inputs) != sorted(table["input_ids"]) or sorted(outputs) != sorted(table["output_ids"]):
        raise BundleError(f"{where}: inputs and outputs differ from the values marked as such")
    return inputs, outputs


def _checked(payload: Payload, where: str) -> Payload:
    """Every value is made once, before it is read, and int8 goes from a Convert into FullyConnected alone."""
    values = payload.values
    for value in values.values():
        _check_datatype(value, where)
    known = {*payload.inputs, *(value.id for value in values.values() if value.constant is not None)}
    for node in payload.nodes:
        for number in node.inputs:
            if number not in known:
                raise BundleError(f"{where}: {node.kind} reads value {number} before it is made")
        if node.output in known:
            raise BundleError(f"{where}: {node.kind} makes value {node.output} a second time")
        known.add(node.output)
        datatypes = [values[number].datatype for number in node.inputs]
        if not _fits(node.kind, datatypes, values[node.output].datatype):
            raise UnsupportedError(f"{where}: {node.kind} of {', '.join(datatypes)}")
    for number in payload.outputs:
        if number not in known:
            raise BundleError(f"{where}: nothing makes its output {number}")
    return payload


def _check_datatype(value: PayloadValue, where: str) -> None:
    known = ("fp32", "qcint8", "qbint4") if value.constant is not None else ("fp32", "qdint8")
    if value.datatype not in known or (value.external is not None and value.datatype != "fp32"):
        raise UnsupportedError(f"{where}: value {value.id} is {value.datatype}")
    if (value.scales is not None) != (value.datatype in QUANTIZED) or (value.group is not None) != (
        value.datatype == "qbint4"
    ):
        raise BundleError(f"{where}: value {value.id}, {value.datatype}: scales or groups missing or unexpected")


def _fits(kind: str, inputs: Sequence[str], output: str) -> bool:
    if kind == "Convert":
        return list(inputs) == ["fp32"] and output == "qdint8"
    if kind != "FullyConnected":
        return {*inputs, output} == {"fp32"}
    x, weight, *bias = inputs
    # int4 or int8 filters on float32 activations are silently wrong in XNNPACK
    return weight in (QUANTIZED if x == "qdint8" else ("fp32",)) and bias in ([], ["fp32"]) and output == "fp32"
