"""A static check of the memory plan: what is alive at the same time shares no bytes."""

import math
from dataclasses import dataclass

from pocketlm.errors import BundleError
from pocketlm_export.backends.executorch.reading.kernels import UPDATE_CACHE
from pocketlm_export.backends.executorch.reading.pte import DTYPES, PteFile
from pocketlm_export.backends.executorch.reading.steps import KernelStep

__all__ = ["check_memory_plan"]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A value's bytes in a memory of the method, and the first and last instruction at which they matter."""

    index: int
    memory: int
    start: int
    stop: int
    first: int
    last: int


def check_memory_plan(file: PteFile) -> int:
    """Return how many values were compared. Raises :class:`BundleError` naming two that overlap.

    A value lives from the instruction that makes it to the last that reads it, whatever jumps pass over in between:
    they only lead forward. What is read before it is made keeps its content from call to call (a cache) and is always
    alive.
    """
    planned = sorted(_planned_values(file), key=lambda value: (value.memory, value.start))
    for position, value in enumerate(planned):
        for other in planned[position + 1 :]:
            if other.memory != value.memory or other.start >= value.stop:
                break
            if value.first <= other.last and other.first <= value.last:
                raise BundleError(
                    f"{file.path}: memory plan: values {value.index} (bytes {value.start}..{value.stop}) and "
                    f"{other.index} (bytes {other.start}..{other.stop}) of memory {value.memory} are alive together "
                    f"from instruction {max(value.first, other.first)}"
                )
    return len(planned)


def _planned_values(file: PteFile) -> list[_Planned]:
    end = len(file.steps)
    first: dict[int, int] = {}
    last = dict.fromkeys(file.forward.outputs, end)
    made: set[int] = set()
    for number, step in enumerate(file.steps):
        if isinstance(step, KernelStep) and step.operator == UPDATE_CACHE and step.arguments[1] in made:
            raise BundleError(f"{file.path}: cache {step.arguments[1]} is overwritten by another operator")
        for index in step.read:
            if index not in made:
                first[index], last[index] = 0, end
        made.update(step.made)
        for index in (*step.read, *step.made):
            first.setdefault(index, number)
            last[index] = max(last.get(index, 0), number)
    planned = []
    for index in first:
        value = file.forward.values[index].val
        place = getattr(value, "allocation_info", None)
        if place is None:
            continue
        size = math.prod(value.sizes) * DTYPES[value.scalar_type].itemsize
        start = place.memory_offset
        planned.append(_Planned(index, place.memory_id, start, start + size, first[index], last[index]))
    return planned
