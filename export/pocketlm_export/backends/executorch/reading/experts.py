"""What a program states of its mixtures of experts: how many are chosen, and what becomes of their shares.

Which experts are computed, and from what, no single place states: the execution follows the jumps.
"""

from collections.abc import Iterator

from pocketlm_export.backends.executorch.reading.kernels import DIVIDE, SUM, TOP
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import KernelStep
from pocketlm_export.backends.reading import Fact

__all__ = ["experts_facts"]


def experts_facts(file: PteFile) -> Iterator[Fact]:
    """``experts I``, in the order of execution."""
    kernels = [step for step in file.steps if isinstance(step, KernelStep)]
    for number, top in enumerate(step for step in kernels if step.operator == TOP):
        yield Fact(f"experts {number}", "chosen", _chosen(file, top))
        yield Fact(f"experts {number}", "renormalize", _is_renormalized(file, top, kernels))


def _chosen(file: PteFile, top: KernelStep) -> int | str:
    _, count, dimension, largest, _ = (
        file.scalar(index) if place else None for place, index in enumerate(top.arguments)
    )
    if dimension != len(file.shape(top.arguments[0])) - 1 or not largest or not isinstance(count, int):
        return f"{count} along dimension {dimension}, largest first: {largest}"
    return count


def _is_renormalized(file: PteFile, top: KernelStep, kernels: list[KernelStep]) -> bool | str:
    """Whether the largest shares are divided by their own sum."""
    values = top.results[0]
    sums = [step for step in kernels if step.operator == SUM and step.arguments[0] == values]
    quotients = [step for step in kernels if step.operator == DIVIDE and step.arguments[0] == values]
    if not sums and not quotients:
        return False
    last = len(file.shape(values)) - 1
    if len(sums) == len(quotients) == 1:
        dimensions, keep = (file.scalar(index) for index in sums[0].arguments[1:3])
        if quotients[0].arguments[1] == sums[0].result and dimensions == [last] and keep:
            return True
    return "shares divided by something else than their sum"
