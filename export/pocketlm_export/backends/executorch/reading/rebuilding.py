"""Programs for the real runtime, built in memory from the pieces of a written one.

A whole program keeps its bytes and gets new segments behind them; a delegate alone gets a program around its payload.
"""

import copy
import io
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm_export.backends.executorch.importing import (
    CONSTANT_ALIGNMENT,
    ScalarType,
    program_to_flatbuffer,
    schema,
)
from pocketlm_export.backends.executorch.reading.matrices import Matrix, filter_matrix, row_blocks
from pocketlm_export.backends.executorch.reading.payload import NAMED, OUTPUT, Payload, payload_bytes
from pocketlm_export.backends.executorch.reading.pte import HEADER, PteFile

__all__ = ["Segment", "delegate_program", "exposing", "float32_program", "program_bytes", "with_float32_filters"]

PAGE = 4096
ARENA_ALIGNMENT = 64
MAGIC_END = 8

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Segment:
    """``size`` bytes, made block by block when they are written."""

    size: int
    blocks: Callable[[], Iterable[npt.NDArray[Any] | bytes]]


@dataclass(slots=True)
class _Float32Payload:
    """A payload without int8, and the segments of its filters by key."""

    table: dict[str, Any]
    filters: dict[str, Segment] = field(default_factory=dict)


def program_bytes(program: schema.Program, kept: Bytes, added: Sequence[Segment]) -> bytes:
    """The .pte of ``program`` with the segment bytes ``kept`` as they are, and ``added`` as further segments.

    Segments of ``program`` that lie in ``kept`` keep their offsets; it gets one more for each of ``added``.
    """
    cursor = len(kept)
    for segment in added:
        cursor = _aligned(cursor, PAGE)
        program.segments.append(schema.DataSegment(offset=cursor, size=segment.size))
        cursor += segment.size
    flatbuffer = program_to_flatbuffer(program, constant_tensor_alignment=CONSTANT_ALIGNMENT)
    head = _with_header(flatbuffer.data, flatbuffer.max_alignment, cursor)
    base = _aligned(len(head), PAGE)
    buffer = io.BytesIO()  # hands its bytes over without a copy
    buffer.write(head)
    buffer.seek(base)
    buffer.write(kept.data)
    for segment, place in zip(added, program.segments[len(program.segments) - len(added) :], strict=True):
        buffer.seek(base + place.offset)
        for block in segment.blocks():
            buffer.write(block if isinstance(block, bytes) else np.ascontiguousarray(block).data)
        if buffer.tell() != base + place.offset + segment.size:
            raise AssertionError(f"{buffer.tell() - base - place.offset} bytes where {segment.size} were planned")
    return buffer.getvalue()


def float32_program(file: PteFile) -> bytes:
    """The whole program without int8: quantized filters as the float32 values that they stand for, everything else,
    kernels, memory plan and shared bytes, as written."""
    program = copy.deepcopy(file.program)
    (forward,) = (plan for plan in program.execution_plan if plan.name == "forward")
    added: list[Segment] = []
    for index, (payload, delegate) in enumerate(zip(file.delegates, forward.delegates, strict=True)):
        changed = with_float32_filters(file, payload, f"float32.{index}")
        if not changed.filters:
            continue
        delegate.processed.index = len(program.segments) + len(added)
        added.append(_whole(payload_bytes(changed.table)))
        for key, segment in changed.filters.items():
            program.named_data.append(schema.NamedData(key, len(program.segments) + len(added)))
            added.append(segment)
    return program_bytes(program, file.segments(), added)


def delegate_program(file: PteFile, table: dict[str, Any], filters: dict[str, Segment]) -> bytes:
    """A program whose method ``forward`` is one delegate: the graph ``table``, with its named data from ``filters`` or
    from the file. Its arguments are the delegate's, in the order of their external ids."""
    tensors = {item["id_out"]: item for item in map(_tensor_of, table["xvalues"])}
    arguments = sorted((item["external_id"], number) for number, item in tensors.items() if item["flags"])
    values, offset = [], 0
    for _, number in arguments:
        sizes = tensors[number]["dims"]
        values.append(schema.EValue(_planned_tensor(sizes, offset)))
        offset = _aligned(offset + 4 * int(np.prod(sizes)), ARENA_ALIGNMENT)
    outputs = [i for i, (_, number) in enumerate(arguments) if tensors[number]["flags"] == OUTPUT]
    inputs = [i for i in range(len(arguments)) if i not in outputs]
    call = schema.DelegateCall(delegate_index=0, args=list(range(len(arguments))))
    plan = schema.ExecutionPlan(
        name="forward", container_meta_type=schema.ContainerMetadata("", ""), values=values, inputs=inputs,
        outputs=outputs, chains=[schema.Chain([], [], [schema.Instruction(call)], None)], operators=[],
        delegates=[
            schema.BackendDelegate(
                "XnnpackBackend", schema.BackendDelegateDataReference(schema.DataLocation.SEGMENT, 1), []
            )
        ],
        non_const_buffer_sizes=[0, offset],
    )  # fmt: skip
    sizes = {entry["named_key"]: entry["size"] for entry in table["constant_data"] if entry.get("named_key")}
    needed = {key: filters[key] if key in filters else _named(file, key, size) for key, size in sizes.items()}
    program = schema.Program(
        version=0, execution_plan=[plan], constant_buffer=[], backend_delegate_data=[],
        segments=[schema.DataSegment(offset=0, size=CONSTANT_ALIGNMENT)],
        constant_segment=schema.SubsegmentOffsets(segment_index=0, offsets=[0]),
        named_data=[schema.NamedData(key, 2 + index) for index, key in enumerate(needed)],
    )  # fmt: skip
    return program_bytes(
        program, np.zeros(CONSTANT_ALIGNMENT, np.uint8), [_whole(payload_bytes(table)), *needed.values()]
    )


def with_float32_filters(file: PteFile, payload: Payload, prefix: str, rows: slice | None = None) -> _Float32Payload:
    """``payload`` with Convert nodes taken out and each quantized filter dequantized, under keys after ``prefix``.

    ``rows``: of the only output, which a FullyConnected must make, these columns alone: rows of its filter and bias.
    """
    last = payload.producers[payload.outputs[0]] if rows is not None else None
    cut = set(last.inputs[1:]) if last is not None else set()
    table = copy.deepcopy(dict(payload.table))
    sources = {node.output: node.inputs[0] for node in payload.nodes if node.kind == "Convert"}
    table["xnodes"] = [item for item in table["xnodes"] if item["xnode_union_type"] != "XNNConvert"]
    for item in table["xnodes"]:
        fields = item["xnode_union"]
        fields.update({name: sources[number] for name, number in fields.items()
                       if name.startswith("input") and number in sources})  # fmt: skip
    changed = _Float32Payload(table)
    kept = []
    for item in table["xvalues"]:
        tensor = _tensor_of(item)
        number = tensor["id_out"]
        if number in sources:
            continue
        kept.append(item)
        if last is not None and rows is not None and number == last.output:
            tensor["dims"] = [*tensor["dims"][:-1], rows.stop - rows.start]
        if payload.values[number].scales is None and number not in cut:
            continue
        chosen = rows if number in cut else None
        key, segment = f"{prefix}.{number}", _float32(filter_matrix(file, payload, number), chosen)
        if chosen is not None:
            tensor["dims"] = [chosen.stop - chosen.start, *tensor["dims"][1:]]
        changed.filters[key] = segment
        table["constant_data"].append({"offset": NAMED, "size": segment.size, "named_key": key})
        tensor.update(datatype="xnn_datatype_fp32", constant_buffer_idx=len(table["constant_data"]) - 1)
        item.update(xvalue_union=tensor, xvalue_union_type="XNNTensorValue")
    table["xvalues"] = kept
    _drop_unused_constants(table)
    return changed


def exposing(payload: Payload, numbers: Iterable[int]) -> dict[str, Any]:
    """``payload``'s graph with the values ``numbers`` as further outputs, in their order."""
    table = copy.deepcopy(dict(payload.table))
    tensors = {item["id_out"]: item for item in map(_tensor_of, table["xvalues"])}
    for number in numbers:
        tensors[number].update(external_id=table["num_externs"], flags=OUTPUT)
        table["num_externs"] += 1
        table["output_ids"].append(number)
    return table


def _drop_unused_constants(table: dict[str, Any]) -> None:
    """The runtime would not look for them, but a program around the payload would have to hold their bytes."""
    used = {0}
    for item in table["xvalues"]:
        used.add(_tensor_of(item)["constant_buffer_idx"])
        used.add(item["xvalue_union"].get("quant_params", {}).get("scale_buffer_idx", 0))
    for index, entry in enumerate(table["constant_data"]):
        if index not in used:
            entry.update(offset=0, size=0, named_key="")


def _tensor_of(item: dict[str, Any]) -> dict[str, Any]:
    union: dict[str, Any] = item["xvalue_union"]
    return union.get("tensor_value", union)


def _whole(content: bytes) -> Segment:
    return Segment(len(content), lambda: [content])


def _float32(matrix: Matrix, rows: slice | None = None) -> Segment:
    count, *width = matrix.shape
    chosen = slice(0, count) if rows is None else rows
    size = 4 * (chosen.stop - chosen.start) * int(np.prod(width))
    return Segment(size, lambda: (block for _, block in row_blocks(matrix, chosen)))


def _named(file: PteFile, key: str, size: int) -> Segment:
    return Segment(size, lambda: [file.named_data(key, size)])


def _planned_tensor(sizes: Sequence[int], offset: int) -> schema.Tensor:
    return schema.Tensor(
        scalar_type=ScalarType.FLOAT, storage_offset=0, sizes=list(sizes), dim_order=list(range(len(sizes))),
        requires_grad=False, layout=0, data_buffer_idx=0,
        allocation_info=schema.AllocationDetails(1, offset & 0xFFFFFFFF, offset >> 32),
        shape_dynamism=schema.TensorShapeDynamism.DYNAMIC_BOUND,
    )  # fmt: skip


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _with_header(flatbuffer: bytes, alignment: int, segment_bytes: int) -> bytes:
    """The extended header stands between the flatbuffer's first 8 bytes and the rest; the root's offset grows by it."""
    width = _aligned(HEADER.size, alignment)
    size = width + len(flatbuffer)
    header = HEADER.pack(b"eh00", HEADER.size, size, _aligned(size, PAGE), segment_bytes)
    root = struct.pack("<I", int.from_bytes(flatbuffer[:4], "little") + width)
    return root + flatbuffer[4:MAGIC_END] + header.ljust(width, b"\0") + flatbuffer[MAGIC_END:]
