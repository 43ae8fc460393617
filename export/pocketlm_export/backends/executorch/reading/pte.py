"""One .pte, opened as if it came from a stranger: everything that points somewhere is checked before it is followed.

The program's flatbuffer is schema/program.fbs, the header in front of it runtime/executor's extended header.
"""

import math
import mmap
import struct
from collections import Counter
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.executorch.importing import (
    ScalarType,
    flatbuffer_to_program,
    program_schema_sources,
    schema,
)
from pocketlm_export.backends.executorch.reading.flatc import FlatcError, to_json
from pocketlm_export.backends.executorch.reading.payload import Payload, parse_payloads
from pocketlm_export.backends.executorch.reading.steps import JumpStep, KernelStep, Step, read_steps

__all__ = ["DTYPES", "PteFile"]

DTYPES: dict[ScalarType, np.dtype[Any]] = {
    ScalarType.FLOAT: np.dtype("<f4"),
    ScalarType.HALF: np.dtype("<f2"),
    ScalarType.LONG: np.dtype("<i8"),
    ScalarType.BYTE: np.dtype("u1"),
    ScalarType.CHAR: np.dtype("i1"),
    ScalarType.BOOL: np.dtype("?"),
}
HEADER = struct.Struct("<4sIQQQ")  # magic, its own length, bytes of header and program, first segment, all segments
HEADER_START = 8
OPTIONAL = {
    "allocation_info", "backend_delegate_data", "compile_specs", "constant_buffer", "extra_tensor_info",
    "fully_qualified_name", "mutable_data_segments", "named_data", "non_const_buffer_device", "stacktrace", "storage",
    "data", "value",
}  # fmt: skip
LARGEST_PROGRAM = 64 << 20
LARGEST_TENSOR = 1 << 40
MEMORIES = 3  # memory ids 0..2: the schema's own, activations, caches

Array = npt.NDArray[Any]


class PteFile:
    """A program whose method ``forward`` calls kernels and XNNPACK delegates one after another.

    Raises :class:`BundleError` naming the file for what is malformed, :class:`UnsupportedError` for what a program
    may hold but this reader does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _mapped(path)
        self._bytes = np.frombuffer(self._map, np.uint8)
        program_size, self._base = self._header()
        self.program: schema.Program = self._parse(self._bytes[:program_size].tobytes())
        self._check_segments()
        self.named = {item.key: item.segment_index for item in self.program.named_data or []}
        plans = {plan.name: plan for plan in self.program.execution_plan}
        if "forward" not in plans:
            raise self._broken("no method 'forward'")
        self.forward: schema.ExecutionPlan = plans["forward"]
        self._constant_plans = {name: plan for name, plan in plans.items() if name != "forward"}
        self._check_values()

    def release(self) -> None:
        """Let the kernel drop the mapped pages: resident memory counts them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    # The pieces of the file

    def segment(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of a segment."""
        segment = self.program.segments[index]
        return self._bytes[self._base + segment.offset :][: segment.size]

    def segments(self) -> npt.NDArray[np.uint8]:
        """The bytes behind the program, to which the offsets of segments refer."""
        return self._bytes[self._base :]

    def position(self, segment: int) -> int:
        """Where a segment begins in the file."""
        offset: int = self.program.segments[segment].offset
        return self._base + offset

    def named_data(self, key: str, size: int) -> npt.NDArray[np.uint8]:
        """The first ``size`` bytes of what delegates find under ``key``."""
        if key not in self.named:
            raise self._broken(f"no data named {key[:80]!r}")
        content = self.segment(self.named[key])
        if len(content) < size:
            raise self._broken(f"{key[:80]}: {len(content)} bytes where {size} are needed")
        return content[:size]

    def fact(self, name: str) -> list[int]:
        """What a constant method returns; empty if there is none of that name."""
        plan = self._constant_plans.get(name)
        values = [plan.values[index].val for index in plan.outputs] if plan is not None else []
        return [value.bool_val if isinstance(value, schema.Bool) else value.int_val for value in values]

    # The method

    @cached_property
    def delegates(self) -> list[Payload]:
        """The payloads of ``forward``, in the order of their indices."""
        contents = (self.segment(item.processed.index).tobytes() for item in self.forward.delegates)
        return parse_payloads(contents, str(self.path))

    @cached_property
    def steps(self) -> list[Step]:
        """The instructions of ``forward``."""
        return read_steps(self.path, self.forward, self.delegates)

    @cached_property
    def producers(self) -> dict[int, KernelStep]:
        """The kernel that makes each value that only one makes."""
        made = [(value, step) for step in self.steps if isinstance(step, KernelStep) for value in step.results]
        counts = Counter(value for value, _ in made)
        return {value: step for value, step in made if counts[value] == 1}

    @cached_property
    def passed_over(self) -> frozenset[int]:
        """The numbers of the steps that a jump may pass over."""
        jumps = ((number, step) for number, step in enumerate(self.steps) if isinstance(step, JumpStep))
        return frozenset(inside for number, jump in jumps for inside in range(number + 1, jump.destination))

    def tensor(self, index: int) -> schema.Tensor:
        """The tensor that value ``index`` is."""
        value = self.forward.values[index].val
        if not isinstance(value, schema.Tensor):
            raise self._broken(f"value {index} is {type(value).__name__}, not a tensor")
        return value

    def shape(self, index: int) -> tuple[int, ...]:
        """The sizes of a tensor: bounds of what a call makes."""
        return tuple(self.tensor(index).sizes)

    def scalar(self, index: int) -> int | float | bool | list[int] | None:
        """A constant argument of a kernel."""
        match self.forward.values[index].val:
            case schema.Null():
                return None
            case schema.IntList() as value:
                return [int(self.forward.values[item].val.int_val) for item in value.items]
            case schema.Bool() as value:
                return bool(value.bool_val)
            case schema.Int() as value:
                return int(value.int_val)
            case schema.Double() as value:
                return float(value.double_val)
            case value:
                raise self._broken(f"value {index} is {type(value).__name__}, not a scalar")

    def constant(self, index: int) -> Array:
        """Constant ``index`` of the program (from 1), in its own dtype and shape; a mapped view."""
        for item in self.forward.values:
            if isinstance(item.val, schema.Tensor) and index and item.val.data_buffer_idx == index:
                return self._content(item.val)
        raise self._broken(f"no constant {index}")

    def constant_tensor(self, index: int) -> Array | None:
        """The content of the tensor that value ``index`` is; None if it is no constant."""
        tensor = self.tensor(index)
        return self._content(tensor) if tensor.data_buffer_idx else None

    def constant_position(self, index: int) -> int:
        """Where constant ``index`` of the program begins in the file."""
        where = self.program.constant_segment
        return self.position(where.segment_index) + int(where.offsets[index])

    def _content(self, tensor: schema.Tensor) -> Array:
        where, dtype = self.program.constant_segment, DTYPES[tensor.scalar_type]
        start = where.offsets[tensor.data_buffer_idx]
        size = math.prod(tensor.sizes) * dtype.itemsize
        return self.segment(where.segment_index)[start : start + size].view(dtype).reshape(tensor.sizes)

    # Opening

    def _broken(self, what: str) -> BundleError:
        return BundleError(f"{self.path}: {what}")

    def _header(self) -> tuple[int, int]:
        """The bytes of header and program, and where the first segment begins."""
        size = len(self._bytes)
        head = self._bytes[: HEADER_START + HEADER.size].tobytes()
        if head[4:6] != b"ET":
            raise self._broken("not an ExecuTorch program")
        if len(head) < HEADER_START + HEADER.size or head[HEADER_START : HEADER_START + 4] != b"eh00":
            raise self._broken("an ExecuTorch program without segments: PocketLM writes none such")
        _, length, program_size, base, segment_bytes = HEADER.unpack_from(head, HEADER_START)
        if length < HEADER.size or not HEADER_START + HEADER.size <= program_size <= min(size, LARGEST_PROGRAM):
            raise self._broken(f"its header states a program of {program_size} bytes in a file of {size}")
        if base < program_size or base + segment_bytes > size:
            raise self._broken(f"its header states segments of {segment_bytes} bytes at {base} in a file of {size}")
        return program_size, base

    def _parse(self, content: bytes) -> schema.Program:
        try:  # first in a bounded process: offsets that share a target can make a small file enormous
            to_json(program_schema_sources(), content)
            program = flatbuffer_to_program(content)
        except FlatcError as error:
            raise self._broken(f"malformed program: {error}") from error
        except Exception as error:  # the vendor's parser checks nothing: any error can come out of it
            raise self._broken(f"malformed program: {type(error).__name__}") from error
        absent = _absent_field(program)
        if absent is not None:
            raise self._broken(f"malformed program: no {absent}")
        return program

    def _check_segments(self) -> None:
        program = self.program
        if program.constant_buffer or program.backend_delegate_data:
            raise self._broken("keeps its constants in the program, a deprecated form that PocketLM never writes")
        if program.mutable_data_segments:
            raise UnsupportedError(f"{self.path}: initial content of mutable tensors")
        room = len(self._bytes) - self._base
        for index, segment in enumerate(program.segments):
            if segment.offset + segment.size > room:
                raise self._broken(f"segment {index}: {segment.size} bytes at {segment.offset} of {room}")
        for item in program.named_data or []:
            if item.segment_index >= len(program.segments):
                raise self._broken(f"{item.key[:80]}: segment {item.segment_index} of {len(program.segments)}")
        constants = program.constant_segment
        if constants is None or constants.segment_index >= len(program.segments):
            raise self._broken("no segment of constants")

    def _check_values(self) -> None:
        plan = self.forward
        if len(plan.chains) != 1 or len(plan.inputs) != 2 or len(plan.outputs) != 1:
            raise UnsupportedError(
                f"{self.path}: forward has {len(plan.inputs)} inputs, {len(plan.outputs)} outputs and "
                f"{len(plan.chains)} chains; PocketLM's takes tokens and a position and returns logits"
            )
        if any(not 0 <= index < len(plan.values) for index in (*plan.inputs, *plan.outputs)):
            raise self._broken("an input or output of forward is no value")
        for index, delegate in enumerate(plan.delegates):
            if delegate.id != "XnnpackBackend":
                raise UnsupportedError(f"{self.path}: delegate {index} is for {delegate.id[:80]!r}, not XnnpackBackend")
            place = delegate.processed
            if place.location != schema.DataLocation.SEGMENT or place.index >= len(self.program.segments):
                raise self._broken(f"delegate {index}: segment {place.index} of {len(self.program.segments)}")
        for index, item in enumerate(plan.values):
            if isinstance(item.val, schema.Tensor):
                self._check_tensor(index, item.val)
            elif isinstance(item.val, schema.IntList | schema.TensorList | schema.OptionalTensorList):
                self._check_list(index, item.val)
            elif not isinstance(item.val, schema.Null | schema.Bool | schema.Int | schema.Double):
                raise UnsupportedError(f"{self.path}: value {index} is {type(item.val).__name__}")
        for index in (*plan.inputs, *plan.outputs):
            self.tensor(index)
        for name, constant in self._constant_plans.items():
            if any(not 0 <= index < len(constant.values) for index in constant.outputs) or not all(
                isinstance(item.val, schema.Bool | schema.Int) for item in constant.values
            ):
                raise UnsupportedError(f"{self.path}: method {name[:80]!r} returns no constant")

    def _check_list(self, index: int, value: schema.IntList | schema.TensorList | schema.OptionalTensorList) -> None:
        values, lowest = self.forward.values, -1 if isinstance(value, schema.OptionalTensorList) else 0
        kind = schema.Int if isinstance(value, schema.IntList) else schema.Tensor
        if not value.items or any(
            not lowest <= item < len(values) or (item >= 0 and not isinstance(values[item].val, kind))
            for item in value.items
        ):
            raise self._broken(f"value {index}: a list of {value.items}, not all of which are {kind.__name__}s")

    def _check_tensor(self, index: int, tensor: schema.Tensor) -> None:
        if tensor.scalar_type not in DTYPES:
            raise UnsupportedError(f"{self.path}: value {index} is a tensor of {tensor.scalar_type!r}")
        sizes = tensor.sizes
        if any(size < 0 for size in sizes) or math.prod(sizes) > LARGEST_TENSOR:
            raise self._broken(f"value {index}: impossible sizes {sizes}")
        extra = tensor.extra_tensor_info
        if (
            list(tensor.dim_order) != list(range(len(sizes)))
            or tensor.storage_offset
            or (extra is not None and extra.location != schema.TensorDataLocation.SEGMENT)
        ):
            raise UnsupportedError(f"{self.path}: value {index}: another layout than a contiguous tensor of the file")
        size = math.prod(sizes) * DTYPES[tensor.scalar_type].itemsize
        if tensor.data_buffer_idx:
            where = self.program.constant_segment
            if tensor.data_buffer_idx >= len(where.offsets):
                raise self._broken(f"value {index}: constant {tensor.data_buffer_idx} of {len(where.offsets)}")
            start, room = where.offsets[tensor.data_buffer_idx], self.program.segments[where.segment_index].size
            if start + size > room:
                raise self._broken(f"value {index}: {size} bytes at {start} of {room} bytes of constants")
        elif (place := tensor.allocation_info) is not None:
            memories = self.forward.non_const_buffer_sizes
            if not 0 < place.memory_id < min(len(memories), MEMORIES):
                raise self._broken(f"value {index}: memory {place.memory_id} of {len(memories)}")
            if place.memory_offset + size > memories[place.memory_id]:
                raise self._broken(
                    f"value {index}: {size} bytes at {place.memory_offset} of memory {place.memory_id}, "
                    f"which has {memories[place.memory_id]}"
                )


def _absent_field(table: Any) -> str | None:
    """The name of a field that a table of the program lacks and that none may lack; None if it is complete."""
    for item in fields(table):
        value = getattr(table, item.name)
        if value is None and item.name not in OPTIONAL:
            return f"{item.name} in {type(table).__name__}"
        for part in value if isinstance(value, list) else [value]:
            absent = _absent_field(part) if is_dataclass(part) else None
            if absent is not None:
                return absent
    return None


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
        raise BundleError(f"{path}: can't be read: {error}") from error
