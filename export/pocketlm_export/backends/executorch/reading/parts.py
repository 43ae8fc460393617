"""The program cut into parts, so that ExecuTorch holds a few delegates at a time.

XNNPACK packs a delegate's weights into memory of its own when a program is loaded, and all caches are allocated at
once. Where all tokens are known a part can take all calls of all runs before the next one is loaded: the instructions,
their kernels and their bytes are those of the file.
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm_export.backends.executorch.importing import CONSTANT_ALIGNMENT, schema
from pocketlm_export.backends.executorch.reading.kernels import TOP, UPDATE_CACHE
from pocketlm_export.backends.executorch.reading.matrices import embedding_table
from pocketlm_export.backends.executorch.reading.pte import DTYPES, PteFile
from pocketlm_export.backends.executorch.reading.rebuilding import Segment, program_bytes
from pocketlm_export.backends.executorch.reading.runtime import LoadedProgram
from pocketlm_export.backends.executorch.reading.steps import DelegateStep, JumpStep, KernelStep, Step
from pocketlm_export.backends.reading import Run, Trace

__all__ = ["LARGEST_PART", "Part", "constant_bytes", "cut_parts", "run_parts", "run_to_choices"]

LARGEST_PART = 256 << 20  # bytes of constants, unless one delegate has more: the program and its packed copy are twice
CACHES = 2  # the memory that holds caches alone

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Part:
    """Instructions of ``forward`` by number, what they read of the program's inputs and of earlier parts' values, and
    what later parts, or the caller, read of theirs. ``repeated`` are those of ``steps`` that other parts have too."""

    steps: tuple[int, ...]
    repeated: frozenset[int]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def run_parts(file: PteFile, runs: Sequence[Run]) -> list[Trace]:
    """The logits of ``runs``, which begin empty, as a session over the file computes them."""
    (output,) = file.forward.outputs
    logits = (values[output][0] for values in _run(file, runs, (output,)))
    return [Trace([next(logits)[-call.rows :] for call in run.calls]) for run in runs]


def run_to_choices(file: PteFile, runs: Sequence[Run]) -> list[Trace]:
    """Which experts every mixture of the file chooses for ``runs``, which begin empty."""
    choices = [step.results[1] for step in file.steps if isinstance(step, KernelStep) and step.operator == TOP]
    calls = iter(_run(file, runs, choices))
    traces = []
    for run in runs:
        own = [next(calls) for _ in run.calls]
        traces.append(Trace(experts=[np.concatenate([values[index][0] for values in own]) for index in choices]))
    return traces


def _run(file: PteFile, runs: Sequence[Run], wanted: Sequence[int]) -> list[dict[int, Array]]:
    """The values ``wanted`` of each call of ``runs``."""
    tokens, position = file.forward.inputs
    calls: list[dict[int, Array]] = []
    for run in runs:
        start = 0
        for call in run.calls:
            calls.append({tokens: np.array([call.tokens], np.int64), position: np.array([start], np.int64)})
            start += len(call.tokens)
    parts = cut_parts(file, wanted)
    for number, part in enumerate(parts):
        program = LoadedProgram(_part_program(file, part, wanted), f"{file.path}: part {number + 1} of {len(parts)}")
        needed = {index for later in parts[number + 1 :] for index in later.inputs} | set(wanted)
        for values in calls:
            values.update(zip(part.outputs, program.call(*(values[index] for index in part.inputs)), strict=True))
            for index in set(values) - needed:
                del values[index]
        del program  # before the next one is built
        file.release()
    return calls


def cut_parts(file: PteFile, wanted: Sequence[int]) -> list[Part]:
    """``forward`` cut before delegates, or jumps over them: a cache is written and read in the part of the delegate
    before it. ``wanted``: the values that the parts shall give; what they don't need is in no part."""
    timing = _independent_of_tokens(file)
    groups = _groups(file, [number for number in range(len(file.steps)) if number not in timing])
    parts: list[Part] = []
    later = set(wanted)
    for group in reversed(groups):
        repeated = frozenset(_needed(file, timing, group))
        steps = tuple(sorted(repeated.union(group)))
        made = dict.fromkeys(value for number in group for value in file.steps[number].made)
        outputs = tuple(value for value in made if value in later)
        if not outputs:
            continue
        inputs = _read_before_made(file, steps)
        parts.append(Part(steps, repeated, inputs, outputs))
        later |= set(inputs)
    return parts[::-1]


def _read_before_made(file: PteFile, steps: Iterable[int]) -> tuple[int, ...]:
    """What ``steps`` read of earlier parts, or of the caller: no scalar, no constant and no cache."""
    inputs: dict[int, None] = {}
    known = _caches(file)
    for number in steps:
        for value in file.steps[number].read:
            tensor = file.forward.values[value].val
            if value not in known and isinstance(tensor, schema.Tensor) and not tensor.data_buffer_idx:
                inputs[value] = None
        known.update(file.steps[number].made)
    return tuple(inputs)


def constant_bytes(file: PteFile, steps: Iterable[Step]) -> int:
    """Of weights and tables that ``steps`` read."""
    named: dict[str, int] = {}
    tables: dict[int, int] = {}
    for step in steps:
        if isinstance(step, DelegateStep):
            values = file.delegates[step.index].values.values()
            named |= {c.key: c.size for value in values for c in (value.constant, value.scales) if c is not None}
        for index in step.read:
            tensor = file.forward.values[index].val
            if isinstance(tensor, schema.Tensor) and tensor.data_buffer_idx:
                tables[tensor.data_buffer_idx] = _size(tensor)
    return sum(named.values()) + sum(tables.values())


def _groups(file: PteFile, numbers: Sequence[int]) -> list[list[int]]:
    """Each delegate with the kernels behind it, together as long as their constants fit; none begins with what a jump
    passes over."""
    pieces: list[list[int]] = [[]]
    for number in numbers:
        may_begin = isinstance(file.steps[number], DelegateStep | JumpStep) and number not in file.passed_over
        if may_begin and any(isinstance(file.steps[other], DelegateStep) for other in pieces[-1]):
            pieces.append([])
        pieces[-1].append(number)
    groups: list[list[int]] = []
    for piece in pieces:
        joined = [*groups[-1], *piece] if groups else piece
        if groups and constant_bytes(file, (file.steps[number] for number in joined)) <= LARGEST_PART:
            groups[-1] = joined
        else:
            groups.append(piece)
    return groups


def _independent_of_tokens(file: PteFile) -> set[int]:
    """Instructions that count positions and slice tables by them: every part has its own."""
    dependent = _caches(file)
    found = set()
    for number, step in enumerate(file.steps):
        if (
            not isinstance(step, KernelStep)
            or embedding_table(file, step) is not None
            or step.operator == UPDATE_CACHE
            or dependent & set(step.read)
        ):
            dependent.update(step.made)
        else:
            found.add(number)
    return found


def _needed(file: PteFile, timing: set[int], group: Sequence[int]) -> set[int]:
    wanted = {value for number in group for value in file.steps[number].read}
    needed = set()
    for number in sorted(timing, reverse=True):
        if wanted & set(file.steps[number].made):
            needed.add(number)
            wanted.update(file.steps[number].read)
    return needed


def _caches(file: PteFile) -> set[int]:
    updates = (step for step in file.steps if isinstance(step, KernelStep) and step.operator == UPDATE_CACHE)
    return {step.arguments[1] for step in updates}


def _part_program(file: PteFile, part: Part, wanted: Sequence[int]) -> bytes:
    """A program whose ``forward`` is ``part``. Values keep their numbers, and their places but for caches, which move
    together, and for what is computed again or ``wanted``: in the file's plan others have its place before or after."""
    plan = copy.copy(file.forward)
    steps = [file.steps[number] for number in part.steps]
    instructions = [copy.deepcopy(file.forward.chains[0].instructions[number]) for number in part.steps]
    used = {value for step in steps for value in (*step.read, *step.made)} | set(part.inputs)
    used |= {value for instruction in instructions for value in getattr(instruction.instr_args, "args", ())}  # lists
    plan.values = [
        copy.deepcopy(value) if index in used else schema.EValue(schema.Null())
        for index, value in enumerate(file.forward.values)
    ]
    plan.inputs, plan.outputs = list(part.inputs), list(part.outputs)
    plan.container_meta_type = schema.ContainerMetadata("", "")
    again = {value for number in part.repeated for value in file.steps[number].made}
    again |= set(wanted) & set(part.outputs)
    plan.non_const_buffer_sizes = _place_anew(plan, again)
    called = list(dict.fromkeys(step.index for step in steps if isinstance(step, DelegateStep)))
    for instruction in instructions:
        match instruction.instr_args:
            case schema.DelegateCall() as call:
                call.delegate_index = called.index(call.delegate_index)
            case schema.JumpFalseCall() as jump:
                jump.destination_instruction = bisect_left(part.steps, jump.destination_instruction)
    plan.chains = [schema.Chain([], [], instructions, None)]
    plan.delegates = [copy.deepcopy(file.forward.delegates[index]) for index in called]

    constants, offsets = _constants(file, plan)
    added = [constants]
    for delegate in plan.delegates:
        added.append(_whole(file.segment(delegate.processed.index)))
        delegate.processed.index = len(added) - 1
    named = []
    for key in dict.fromkeys(key for index in called for key in _keys(file, index)):
        added.append(_whole(file.segment(file.named[key])))
        named.append(schema.NamedData(key, len(added) - 1))
    program = schema.Program(
        version=file.program.version, execution_plan=[plan], constant_buffer=[], backend_delegate_data=[], segments=[],
        constant_segment=schema.SubsegmentOffsets(segment_index=0, offsets=offsets), named_data=named,
    )  # fmt: skip
    return program_bytes(program, np.empty(0, np.uint8), added)


def _place_anew(plan: schema.ExecutionPlan, again: set[int]) -> list[int]:
    """Move the caches of ``plan`` together, and the values ``again`` behind all others; returns the memories' sizes."""
    sizes = list(plan.non_const_buffer_sizes)
    if len(sizes) > CACHES:
        sizes[CACHES] = 0
    for index, value in enumerate(plan.values):
        place = value.val.allocation_info if isinstance(value.val, schema.Tensor) else None
        if place is not None and (place.memory_id == CACHES or index in again):
            offset = _aligned(sizes[place.memory_id])
            place.memory_offset_low, place.memory_offset_high = offset & 0xFFFFFFFF, offset >> 32
            sizes[place.memory_id] = offset + _size(value.val)
    return sizes


def _constants(file: PteFile, plan: schema.ExecutionPlan) -> tuple[Segment, list[int]]:
    """A segment of the constants of ``plan``, which are numbered anew from 1, and where each begins."""
    offsets, contents, cursor = [0], list[Array](), 0
    numbers: dict[int, int] = {}
    for value in plan.values:
        if not isinstance(value.val, schema.Tensor) or not value.val.data_buffer_idx:
            continue
        old = value.val.data_buffer_idx
        if old not in numbers:
            numbers[old] = len(offsets)
            offsets.append(cursor)
            contents.append(file.constant(old))
            cursor += _aligned(contents[-1].nbytes)
        value.val.data_buffer_idx = numbers[old]

    def blocks() -> Iterable[Array | bytes]:
        yield bytes(CONSTANT_ALIGNMENT if not contents else 0)
        for content in contents:
            yield content
            yield bytes(_aligned(content.nbytes) - content.nbytes)

    return Segment(cursor or CONSTANT_ALIGNMENT, blocks), offsets


def _keys(file: PteFile, delegate: int) -> list[str]:
    values = file.delegates[delegate].values.values()
    return [c.key for value in values for c in (value.constant, value.scales) if c is not None]


def _whole(content: npt.NDArray[np.uint8]) -> Segment:
    return Segment(len(content), lambda: [content])


def _size(tensor: schema.Tensor) -> int:
    return math.prod(tensor.sizes) * DTYPES[tensor.scalar_type].itemsize


def _aligned(size: int) -> int:
    return -(-size // CONSTANT_ALIGNMENT) * CONSTANT_ALIGNMENT
