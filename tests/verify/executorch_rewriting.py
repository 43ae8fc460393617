"""A written .pte changed: bytes in place, or the program written anew around the same segments."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm_export.backends.executorch.importing import ScalarType, schema
from pocketlm_export.backends.executorch.reading.payload import NAMED, Payload, PayloadConstant, payload_bytes
from pocketlm_export.backends.executorch.reading.pte import DTYPES, PteFile
from pocketlm_export.backends.executorch.reading.rebuilding import Segment, program_bytes
from pocketlm_export.backends.executorch.reading.steps import KernelStep, Step

__all__ = ["Rewriting", "constant_table", "reader_of", "stored_codes", "stored_scales"]

ACTIVATIONS = 1  # the memory of the method that holds them
ALIGNMENT = 64


def mapped(file: PteFile, position: int, like: np.ndarray) -> np.memmap:
    """Bytes of the file, as they can be changed, in the dtype and shape of ``like``."""
    return np.memmap(file.path, like.dtype, "r+", position, like.shape)


def constant_table(file: PteFile, index: int) -> np.memmap:
    """Constant ``index`` of the program."""
    return mapped(file, file.constant_position(index), file.constant(index))


def named(file: PteFile, constant: PayloadConstant, dtype: str, rows: int) -> np.memmap:
    """What delegates find under a key, as ``rows``."""
    content = file.named_data(constant.key, constant.size).view(dtype)
    return mapped(file, file.position(file.named[constant.key]), content.reshape(rows, -1))


def stored_codes(file: PteFile, entry: str) -> np.memmap:
    """The packed codes of a matrix, or the values of a matrix or a vector, by rows."""
    if entry.startswith("constant/"):
        return constant_table(file, int(entry.partition("/")[2]))
    payload, number = reader_of(file, entry)
    value = payload.values[number]
    return named(file, value.constant, "<f4" if value.datatype == "fp32" else "u1", value.shape[0])


def stored_scales(file: PteFile, entry: str) -> np.memmap:
    """The scales of a quantized matrix ``[rows, groups]``."""
    if entry.startswith("constant/"):
        index = int(entry.partition("/")[2])
        step = next(
            step
            for step in file.steps
            if isinstance(step, KernelStep)
            and "embedding" in step.operator
            and file.tensor(step.arguments[0]).data_buffer_idx == index
        )
        return constant_table(file, file.tensor(step.arguments[1]).data_buffer_idx)
    payload, number = reader_of(file, entry)
    value = payload.values[number]
    return named(file, value.scales, "<u2" if value.datatype == "qbint4" else "<f4", value.shape[0])


def reader_of(file: PteFile, key: str) -> tuple[Payload, int]:
    return next(
        (payload, value.id)
        for payload in file.delegates
        for value in payload.values.values()
        if value.constant is not None and value.constant.key == key
    )


class Rewriting:
    """A program with changes: new values and instructions, edited graphs of delegates, further segments."""

    def __init__(self, path: Path) -> None:
        self.file = PteFile(path)
        self.program = copy.deepcopy(self.file.program)
        self.forward = next(plan for plan in self.program.execution_plan if plan.name == "forward")
        self.instructions = self.forward.chains[0].instructions
        self._written = list(self.instructions)
        # Instructions move when others come between them: a jump leads to one of those that were written.
        self._destinations = [
            (instruction.instr_args, self._written[instruction.instr_args.destination_instruction])
            for instruction in self._written
            if isinstance(instruction.instr_args, schema.JumpFalseCall)
        ]
        self._tables: dict[int, dict[str, Any]] = {}
        self._added: list[Segment] = []
        self._constants: list[tuple[int, bytes]] = []

    def value(self, value: Any) -> int:
        """A further value of the method."""
        self.forward.values.append(schema.EValue(value))
        return len(self.forward.values) - 1

    def kernel(self, position: int, operator: str, arguments: list[int]) -> None:
        """A further instruction at ``position``; the operator must be in use."""
        names = [f"{item.name}.{item.overload}" for item in self.forward.operators]
        call = schema.KernelCall(op_index=names.index(operator), args=arguments)
        self.instructions.insert(position, schema.Instruction(call))

    def jump(self, position: int, condition: int, step: int) -> None:
        """A further instruction at ``position``: to step ``step`` of the written file where ``condition`` is false."""
        jump = schema.JumpFalseCall(cond_value_index=condition, destination_instruction=0)
        self.instructions.insert(position, schema.Instruction(jump))
        self._destinations.append((jump, self._written[step]))

    def lead(self, jump: int, step: int) -> None:
        """Let the jump that is step ``jump`` of the written file lead to its step ``step`` where its condition is
        false; where it is true the next instruction follows, as ever."""
        call = self._written[jump].instr_args
        self._destinations = [(c, self._written[step] if c is call else to) for c, to in self._destinations]

    def constant(self, content: np.ndarray, dtype: ScalarType) -> int:
        """A further constant of the program."""
        where = self.program.constant_segment
        self._constants.append((len(where.offsets), content.tobytes()))
        tensor = schema.Tensor(
            scalar_type=dtype, storage_offset=0, sizes=list(content.shape), dim_order=list(range(content.ndim)),
            requires_grad=False, layout=0, data_buffer_idx=len(where.offsets), allocation_info=None,
            shape_dynamism=schema.TensorShapeDynamism.STATIC,
        )  # fmt: skip
        where.offsets.append(0)
        return self.value(tensor)

    def call(self, step: Step) -> Any:
        """The call that is a step of the written file."""
        return self._written[self.file.steps.index(step)].instr_args

    def position_of(self, step: Step) -> int:
        """Where a step of the written file is now."""
        return self.position_at(self.file.steps.index(step))

    def position_at(self, number: int) -> int:
        """Where step ``number`` of the written file is now."""
        written = self._written[number]
        return next(i for i, instruction in enumerate(self.instructions) if instruction is written)

    def graph(self, delegate: int) -> dict[str, Any]:
        """The graph of a delegate, to be edited."""
        return self._tables.setdefault(delegate, copy.deepcopy(dict(self.file.delegates[delegate].table)))

    def named_constant(self, delegate: int, content: bytes) -> int:
        """The index of a further constant of a delegate's graph."""
        entries = self.graph(delegate)["constant_data"]
        key = f"altered {delegate} {len(entries)}"
        self.program.named_data.append(schema.NamedData(key, self._segment(content)))
        entries.append({"offset": NAMED, "size": len(content), "named_key": key})
        return len(entries) - 1

    def with_other_content(self, value: int, change: Callable[[np.ndarray], np.ndarray]) -> int:
        """A copy of a constant, or of slices of one, with the constant changed."""
        tensor = copy.deepcopy(self.file.tensor(value))
        if tensor.data_buffer_idx:
            where = self.program.constant_segment
            self._constants.append((len(where.offsets), change(self.file.constant_tensor(value).copy()).tobytes()))
            tensor.data_buffer_idx = len(where.offsets)
            where.offsets.append(0)
            return self.value(tensor)
        step = self.file.producers[value]
        source = self.with_other_content(step.arguments[0], change)
        size = int(np.prod(tensor.sizes)) * DTYPES[tensor.scalar_type].itemsize
        offset = aligned(self.forward.non_const_buffer_sizes[ACTIVATIONS])
        tensor.allocation_info = schema.AllocationDetails(ACTIVATIONS, offset, 0)
        self.forward.non_const_buffer_sizes[ACTIVATIONS] = offset + aligned(size)
        result = self.value(tensor)
        arguments = [source, *step.arguments[1:], result, result]
        self.kernel(self.position_of(step) + 1, step.operator, arguments)
        return result

    def save(self) -> None:
        """Write the file."""
        for jump, written in self._destinations:
            jump.destination_instruction = next(i for i, item in enumerate(self.instructions) if item is written)
        for delegate, graph in self._tables.items():
            self.forward.delegates[delegate].processed.index = self._segment(payload_bytes(graph))
        if self._constants:
            self._move_constants()
        content = program_bytes(self.program, self.file.segments(), self._added)
        self.file.path.write_bytes(content)

    def _segment(self, content: bytes) -> int:
        self._added.append(Segment(len(content), lambda: [content]))
        return len(self.file.program.segments) + len(self._added) - 1

    def _move_constants(self) -> None:
        where = self.program.constant_segment
        content = bytearray(self.file.segment(where.segment_index).tobytes())
        for index, added in self._constants:
            content.extend(bytes(aligned(len(content)) - len(content)))
            where.offsets[index] = len(content)
            content.extend(added)
        where.segment_index = self._segment(bytes(content))


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
