"""Where the activations of a method lie in its arena: values that are never alive together share bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENT", "Lifetime", "plan_arena"]

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Lifetime:
    """``size`` bytes, alive from instruction ``first`` to instruction ``last``, both included."""

    size: int
    first: int
    last: int


def plan_arena(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """The offset of each value, aligned to :data:`ALIGNMENT`, and the size of the arena.

    Greedy by size: the largest value first, each in the lowest gap between the placed values that it meets in time.
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    total = 0
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, i)):
        mine = lifetimes[index]
        offset = 0
        for other in sorted(placed, key=lambda i: offsets[i]):
            theirs = lifetimes[other]
            if theirs.last < mine.first or mine.last < theirs.first:
                continue
            if offset + mine.size <= offsets[other]:
                break
            offset = max(offset, _aligned(offsets[other] + theirs.size))
        offsets[index] = offset
        placed.append(index)
        total = max(total, offset + mine.size)
    return offsets, _aligned(total)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
