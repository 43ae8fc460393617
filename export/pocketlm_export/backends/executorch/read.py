"""Reads a written .pte back with ExecuTorch's own schemas; shares nothing with the writer.

Codes and scales come back in the store's convention, whatever the packing of the file.
"""

import json
import mmap
import struct
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError
from pocketlm_export.backends.executorch.importing import (
    ScalarType,
    XNNHeader,
    flatbuffer_to_program,
    flatc_decompile,
    schema,
    xnnpack_schema_source,
)
from pocketlm_export.backends.reading import WrittenMatrix

__all__ = ["PteFile", "XnnpackPayload"]

DTYPES: dict[ScalarType, str] = {
    ScalarType.FLOAT: "<f4",
    ScalarType.HALF: "<f2",
    ScalarType.LONG: "<i8",
    ScalarType.BYTE: "u1",
    ScalarType.CHAR: "i1",
}

Array = npt.NDArray[Any]


class XnnpackPayload:
    """One delegate's graph as the schema's JSON: ``nodes``, ``values`` by id, ``inputs`` and ``outputs`` as ids."""

    def __init__(self, payload: bytes) -> None:
        header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
        start = header.flatbuffer_offset
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "schema.fbs").write_bytes(xnnpack_schema_source())
            (folder / "graph.bin").write_bytes(payload[start : start + header.flatbuffer_size])
            flatc_decompile(str(folder), str(folder / "schema.fbs"), str(folder / "graph.bin"))
            graph = json.loads((folder / "graph.json").read_bytes())
        self.nodes: list[dict[str, Any]] = graph["xnodes"]
        self.inputs: list[int] = graph["input_ids"]
        self.outputs: list[int] = graph["output_ids"]
        self.constants: list[dict[str, Any]] = graph["constant_data"]
        self.values: dict[int, tuple[dict[str, Any], dict[str, Any] | None]] = {}
        for item in graph["xvalues"]:
            union = item["xvalue_union"]
            tensor = union.get("tensor_value", union)
            self.values[tensor["id_out"]] = tensor, union.get("quant_params")

    def key(self, constant: int) -> str:
        """The key under which the file holds a constant of the graph; empty for the unused constant 0."""
        return str(self.constants[constant].get("named_key", ""))

    def find(self, key: str) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """The tensor and quantization of the value whose data has this key."""
        return next((value for value in self.values.values() if self.key(value[0]["constant_buffer_idx"]) == key), None)


class PteFile:
    """A .pte mapped read-only. Raises :class:`BundleError` for a file that is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        header = self._bytes[8:40].tobytes()
        if self._bytes[4:6].tobytes() != b"ET" or header[:4] != b"eh00":
            raise BundleError(f"{path}: not an ExecuTorch program with an extended header")
        program_size, self._base = struct.unpack_from("<QQ", header, 8)
        self.program: schema.Program = flatbuffer_to_program(self._bytes[:program_size].tobytes())
        self.plans: dict[str, schema.ExecutionPlan] = {plan.name: plan for plan in self.program.execution_plan}
        self.forward = self.plans["forward"]
        self.named: dict[str, int] = {}
        for item in self.program.named_data or []:
            self.named.setdefault(item.key, item.segment_index)

    @cached_property
    def delegates(self) -> list[XnnpackPayload]:
        """The delegates of ``forward``, in the order of their indices."""
        return [XnnpackPayload(self.segment(item.processed.index).tobytes()) for item in self.forward.delegates]

    def segment(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of a segment."""
        segment = self.program.segments[index]
        start = self._base + segment.offset
        return self._bytes[start : start + segment.size]

    def fact(self, name: str) -> list[int]:
        """What a constant method returns."""
        values = [value.val for value in self.plans[name].values]
        return [value.bool_val if isinstance(value, schema.Bool) else value.int_val for value in values]

    def constant(self, index: int) -> Array:
        """Constant ``index`` of the program, in its own dtype and shape."""
        tensor = self._tensor_of_constant(index)
        dtype = np.dtype(DTYPES[tensor.scalar_type])
        where = self.program.constant_segment
        start = where.offsets[index]
        content = self.segment(where.segment_index)[start : start + int(np.prod(tensor.sizes)) * dtype.itemsize]
        return content.view(dtype).reshape(tensor.sizes)

    def entry(self, name: str) -> WrittenMatrix | npt.NDArray[np.float32]:
        """An entry of the manifest: a quantized matrix, or float32 values (a matrix, or vectors end to end)."""
        kind, _, index = name.partition("/")
        return self._constant_entry(int(index)) if kind == "constant" else self._named_entry(name)

    def _constant_entry(self, index: int) -> WrittenMatrix | npt.NDArray[np.float32]:
        values = self.constant(index)
        for call in self._kernel_calls():
            operator = self.forward.operators[call.op_index].name
            weight = self.forward.values[call.args[0]].val
            if operator.startswith("quantized_decomposed::embedding") and weight.data_buffer_idx == index:
                scales = self.constant(self.forward.values[call.args[1]].val.data_buffer_idx).astype(np.float32)
                if operator.endswith("4bit"):  # code + 8, the even column in the high nibble
                    values = _interleave(values >> 4, values & 15)
                return WrittenMatrix(operator, 4 if operator.endswith("4bit") else 8, values.view(np.int8), scales)
        return values.astype(np.float32)

    def _named_entry(self, key: str) -> WrittenMatrix | npt.NDArray[np.float32]:
        for delegate in self.delegates:
            found = delegate.find(key)
            if found is None:
                continue
            tensor, quantization = found
            content, dims = self.segment(self.named[key]), tensor["dims"]
            if quantization is None:
                return content.view("<f4").reshape(dims)
            scales = self.segment(self.named[delegate.key(quantization["scale_buffer_idx"])])
            if tensor["datatype"] == "xnn_datatype_qcint8":
                return WrittenMatrix(
                    key, 8, content.view(np.int8).reshape(dims), scales.view("<f4").reshape(dims[0], -1)
                )
            if tensor["datatype"] == "xnn_datatype_qbint4":  # code + 8, the even column in the low nibble
                packed = content.reshape(dims[0], -1)
                wide = scales.view("<u2").astype(np.uint32) << 16
                return WrittenMatrix(
                    key, 4, _interleave(packed & 15, packed >> 4), wide.view(np.float32).reshape(dims[0], -1)
                )
            raise BundleError(f"{self.path}: {key}: unknown datatype {tensor['datatype']}")
        raise BundleError(f"{self.path}: no delegate reads {key!r}")

    def _kernel_calls(self) -> list[schema.KernelCall]:
        arguments = [instruction.instr_args for instruction in self.forward.chains[0].instructions]
        return [argument for argument in arguments if isinstance(argument, schema.KernelCall)]

    def _tensor_of_constant(self, index: int) -> schema.Tensor:
        for item in self.forward.values:
            if isinstance(item.val, schema.Tensor) and index and item.val.data_buffer_idx == index:
                return item.val
        raise BundleError(f"{self.path}: no constant {index}")


def _interleave(even: Array, odd: Array) -> npt.NDArray[np.int8]:
    """Nibbles of code + 8 to codes, even columns from the first."""
    nibbles = np.stack((even, odd), -1).reshape(even.shape[0], -1)
    return nibbles.astype(np.int8) - np.int8(8)
