"""A replay against what was recorded: where they part, how far apart they are, and whether noise explains it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pocketlm.replay_answer import ReplayedStep
from pocketlm.replay_expectation import ExpectedSequence, ExpectedStep
from pocketlm.results import Divergence, ReplayLimits

__all__ = ["SHORTEST_JUDGED", "Judgement", "judge"]

SHORTEST_JUDGED = 16
"""Steps from which on a mean KL is judged. Of SmolLM2 and the demo model single steps had up to 5.6 times the mean of
their session, and means over 16 steps up to 1.7 times, for which the limits of two runtimes leave room."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """``agreeing``: of ``steps``, those with the recorded choice. ``mean_kl``: nats, None if no distribution was
    recorded or a logit is not finite. ``failures``: none if the replay passed; ``notes``: what was not judged, and why.
    """

    steps: int
    agreeing: int
    first_divergence: Divergence | None
    widest_divergence: Divergence | None
    mean_kl: float | None
    failures: list[str]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Step:
    """One step as it was recorded and as it was replayed; ``deviation``: of its sequence."""

    sequence: int
    number: int
    recorded: ExpectedStep
    replayed: ReplayedStep
    deviation: float

    @property
    def place(self) -> str:
        return f"sequence {self.sequence}, step {self.number}"


def judge(
    expected: Sequence[ExpectedSequence], replayed: Sequence[Sequence[ReplayedStep]], limits: ReplayLimits
) -> Judgement:
    """Judge every step, those behind a divergence too: the recorded tokens were fed, whatever was chosen."""
    steps = list(_steps(expected, replayed))
    apart = [(step, _divergence(step, limits)) for step in steps if step.replayed.choice != step.recorded.choice]
    divergences = [divergence for _, divergence in apart]
    mean_kl, failures, notes = _judge_distributions(steps, limits)
    for step, divergence in apart:
        if divergence.wide:
            failures.insert(
                0,
                f"{step.place}: margin {divergence.margin:.3g} of the deviation is wide: "
                f"a near tie has at most {limits.margin:.3g}",
            )
            break
    return Judgement(
        steps=len(steps),
        agreeing=len(steps) - len(divergences),
        first_divergence=divergences[0] if divergences else None,
        widest_divergence=max(divergences, key=lambda divergence: divergence.margin, default=None),
        mean_kl=mean_kl,
        failures=failures,
        notes=notes,
    )


def _steps(expected: Sequence[ExpectedSequence], replayed: Sequence[Sequence[ReplayedStep]]) -> Iterator[_Step]:
    for sequence, (recorded, answers) in enumerate(zip(expected, replayed, strict=True), 1):
        for number, (step, answer) in enumerate(zip(recorded.steps, answers, strict=True), 1):
            yield _Step(sequence, number, step, answer, recorded.deviation)


def _divergence(step: _Step, limits: ReplayLimits) -> Divergence:
    margin = step.recorded.regret(step.replayed.choice) / (step.deviation or 1.0)
    return Divergence(
        sequence=step.sequence,
        step=step.number,
        recorded=step.recorded.choice,
        chosen=step.replayed.choice,
        margin=margin,
        wide=margin > limits.margin,
    )


def _judge_distributions(steps: Sequence[_Step], limits: ReplayLimits) -> tuple[float | None, list[str], list[str]]:
    """The mean KL, what fails, and what isn't judged."""
    found: list[float] = []
    for step in steps:
        if step.replayed.numbers is None:
            return None, [f"{step.place}: a logit is not finite"], []
        kl = step.recorded.kl(*step.replayed.numbers)
        found += [] if kl is None else [kl]
    if not found:
        return None, [], ["mean KL is not known: the record has no distributions"]
    mean_kl = math.fsum(found) / len(found)
    if limits.mean_kl is None:
        return mean_kl, [], ["mean KL is not judged: no certificate says how large noise is"]
    if len(found) < SHORTEST_JUDGED:
        return mean_kl, [], [f"mean KL is not judged: fewer than {SHORTEST_JUDGED} steps"]
    if mean_kl > limits.mean_kl:
        return mean_kl, [f"mean KL {mean_kl:.3g} nats, limit {limits.mean_kl:.3g}"], []
    return mean_kl, [], []
