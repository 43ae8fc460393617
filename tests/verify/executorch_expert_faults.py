"""Faults of mixtures of experts in a written .pte: how many are chosen, their shares, which delegate is whose, and when
a jump passes over one."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pocketlm.manifest import Manifest
from pocketlm_export.backends.executorch.importing import ScalarType, schema
from pocketlm_export.backends.executorch.reading.kernels import DIVIDE, TOP
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import DelegateStep, JumpStep, KernelStep
from tests.verify.executorch_rewriting import Rewriting
from tests.verify.fault_places import Place, chosen_layers

__all__ = ["FAULTS", "PLACES"]


def choices(file: PteFile) -> list[int]:
    """The numbers of the steps that choose experts."""
    return [number for number, step in enumerate(file.steps) if isinstance(step, KernelStep) and step.operator == TOP]


def mixture(file: PteFile, index: int) -> range:
    """The numbers of the steps from choice ``index`` to the end of its last expert."""
    starts = [*choices(file), len(file.steps)]
    passed_over = [number for number in range(*starts[index : index + 2]) if number in file.passed_over]
    return range(starts[index], passed_over[-1] + 1)


def choose_one_less(path: Path, place: Place) -> None:
    """Of the experts of every position."""
    rewriting = Rewriting(path)
    step = rewriting.file.steps[choices(rewriting.file)[place.index]]
    count = rewriting.file.scalar(step.arguments[1])
    rewriting.call(step).args[1] = rewriting.value(schema.Int(count - 1))
    rewriting.save()


def keep_shares(path: Path, place: Place) -> None:
    """The chosen experts' shares are divided by one instead of by their sum."""
    rewriting = Rewriting(path)
    file = rewriting.file
    steps = [file.steps[number] for number in mixture(file, place.index)]
    divide = next(step for step in steps if isinstance(step, KernelStep) and step.operator == DIVIDE)
    rewriting.call(divide).args[1] = rewriting.constant(np.ones((1, 1, 1), np.float32), ScalarType.FLOAT)
    rewriting.save()


def rotate_experts(path: Path, place: Place) -> None:
    """Each expert's positions are given to the next one."""
    rewriting = Rewriting(path)
    file = rewriting.file
    numbers = mixture(file, place.index)
    experts = [step for step in map(file.steps.__getitem__, numbers) if isinstance(step, DelegateStep)]
    for step, other in zip(experts, [*experts[1:], experts[0]], strict=True):
        rewriting.call(step).delegate_index = other.index
    rewriting.save()


def invert_jumps(path: Path, place: Place) -> None:
    """An expert is computed where no position chose it (for no positions, which is nothing), and no other is."""
    rewriting = Rewriting(path)
    file = rewriting.file
    never = rewriting.constant(np.zeros(1, bool), ScalarType.BOOL)
    for number in mixture(file, place.index):
        if isinstance(file.steps[number], JumpStep):
            rewriting.jump(rewriting.position_at(number) + 1, never, file.steps[number].destination)
            rewriting.lead(number, number + 1)
    rewriting.save()


def mixtures(file: PteFile, _manifest: Manifest) -> list[Place]:
    return [Place(index=index) for index in chosen_layers(range(len(choices(file))))]


def renormalizing(file: PteFile, manifest: Manifest) -> list[Place]:
    operators = {step.operator for step in file.steps if isinstance(step, KernelStep)}
    return mixtures(file, manifest) if DIVIDE in operators else []


FAULTS: Mapping[str, Callable[[Path, Place], None]] = {
    "one expert less": choose_one_less,
    "shares not divided by their sum": keep_shares,
    "experts in another order": rotate_experts,
    "jumps inverted": invert_jumps,
}

PLACES: Mapping[str, Callable[[PteFile, Manifest], list[Place]]] = {
    "one expert less": mixtures,
    "shares not divided by their sum": renormalizing,
    "experts in another order": mixtures,
    "jumps inverted": mixtures,
}
