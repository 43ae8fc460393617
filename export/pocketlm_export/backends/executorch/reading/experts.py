"""What a program states of its mixtures of experts: how many are chosen, what becomes of their shares, and whose flag
and shares each jump and the delegate behind it have.

Which delegate holds which expert's weights no place states: the execution follows the jumps.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from pocketlm_export.backends.executorch.reading.kernels import DIVIDE, SELECT, SLICE, SUM, TOP
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import DelegateStep, JumpStep, KernelStep, Step
from pocketlm_export.backends.reading import Fact

__all__ = ["experts_facts"]


def experts_facts(file: PteFile) -> Iterator[Fact]:
    """``experts I``, in the order of execution."""
    starts = [number for number, step in enumerate(file.steps) if _is(step, TOP)]
    for index, (start, stop) in enumerate(pairwise([*starts, len(file.steps)])):
        numbers = range(start, stop)
        yield Fact(f"experts {index}", "chosen", _chosen(file, numbers))
        yield Fact(f"experts {index}", "renormalize", _is_renormalized(file, file.steps[start:stop]))


def _is(step: Step, operator: str) -> bool:
    return isinstance(step, KernelStep) and step.operator == operator


def _chosen(file: PteFile, numbers: range) -> int | str:
    top = file.steps[numbers.start]
    assert isinstance(top, KernelStep)
    experts = file.shape(top.arguments[0])[-1]
    count, dimension, largest = (file.scalar(index) for index in top.arguments[1:4])
    if dimension != len(file.shape(top.arguments[0])) - 1 or not largest or not isinstance(count, int):
        return f"{count} along dimension {dimension}, largest first: {largest}"
    routes = list(_routes(file, numbers))
    if routes != [[index, index, index + 1] for index in range(experts)]:
        return f"{len(routes)} experts of {experts}, or one whose flag or shares are another's"
    return count


def _routes(file: PteFile, numbers: range) -> Iterator[list[object]]:
    """Of each delegate that a jump passes over: the index of the jump's flag, the bounds of its column of shares."""
    flags: dict[int, object] = {}
    flag: object = None
    column: list[object] = []
    for number in numbers:
        step = file.steps[number]
        if isinstance(step, JumpStep):
            flag = flags.get(step.condition)
        elif isinstance(step, KernelStep) and step.operator == SELECT:
            flags[step.result] = file.scalar(step.arguments[2])
        elif isinstance(step, KernelStep) and step.operator == SLICE:
            column = [file.scalar(index) for index in step.arguments[2:4]]
        elif isinstance(step, DelegateStep) and number in file.passed_over:
            yield [flag, *column]


def _is_renormalized(file: PteFile, steps: Sequence[Step]) -> bool | str:
    """Whether the largest shares are divided by their own sum, and nothing else reads them."""
    values = steps[0].made[0]
    readers = [step for step in steps if isinstance(step, KernelStep) and values in step.read]
    if not any(_is(step, operator) for step in readers for operator in (SUM, DIVIDE)):
        return False
    if [step.operator for step in readers] == [SUM, DIVIDE]:
        total, quotient = readers
        dimensions, keep = (file.scalar(index) for index in total.arguments[1:3])
        if quotient.arguments == (values, total.result) and dimensions == [len(file.shape(values)) - 1] and keep:
            return True
    return "shares that are not, or not all, divided by their sum"
