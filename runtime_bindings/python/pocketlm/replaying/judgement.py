"""A replay against what was recorded: where they part, how far apart they are, and whether noise explains it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pocketlm.replaying.answer import ReplayedStep
from pocketlm.replaying.expectation import ExpectedSequence, ExpectedStep
from pocketlm.results import Divergence, ReplayLimits

__all__ = ["SHORTEST_JUDGED", "Judgement", "judge"]

SHORTEST_JUDGED = 16
"""Steps from which on a mean KL is judged. Of SmolLM2 and the demo model single steps had up to 5.6 times the mean of
their session, and means over 16 steps up to 1.7 times, for which the limits of two runtimes leave room."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """``agreeing``: of ``steps``, those with the recorded choice. The other figures are those of
    :class:`pocketlm.results.ReplayRun`. ``failures``: none if the replay passed; ``notes``: what was not judged, and
    why."""

    steps: int
    agreeing: int
    first_divergence: Divergence | None
    widest_divergence: Divergence | None
    largest_drift: float | None
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


@dataclass(frozen=True, slots=True)
class _Logits:
    """What the numbers of all steps say, whatever was chosen."""

    largest_drift: float | None
    mean_kl: float | None
    failures: list[str]
    notes: list[str]


def judge(
    expected: Sequence[ExpectedSequence], replayed: Sequence[Sequence[ReplayedStep]], limits: ReplayLimits
) -> Judgement:
    """Judge every step, those behind a divergence too: the recorded tokens were fed, whatever was chosen."""
    steps = list(_steps(expected, replayed))
    apart = [(step, _divergence(step, limits)) for step in steps if step.replayed.choice != step.recorded.choice]
    wide = [
        f"{step.place}: margin {divergence.margin:.3g} of the deviation is wide: a near tie has at most "
        f"{limits.margin:.3g}"
        for step, divergence in apart
        if divergence.wide
    ]
    logits = _judge_logits(steps, limits)
    divergences = [divergence for _, divergence in apart]
    return Judgement(
        steps=len(steps),
        agreeing=len(steps) - len(divergences),
        first_divergence=divergences[0] if divergences else None,
        widest_divergence=max(divergences, key=lambda divergence: divergence.margin, default=None),
        largest_drift=logits.largest_drift,
        mean_kl=logits.mean_kl,
        failures=[*wide[:1], *logits.failures],
        notes=logits.notes,
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


def _judge_logits(steps: Sequence[_Step], limits: ReplayLimits) -> _Logits:
    drifts: list[tuple[float, str]] = []
    kls: list[float] = []
    for step in steps:
        numbers = step.replayed.numbers
        if numbers is None:
            return _Logits(None, None, [f"{step.place}: a logit is not finite"], [])
        drifts.append((step.recorded.drift(numbers.margin) / (step.deviation or 1.0), step.place))
        kl = step.recorded.kl(numbers.values, numbers.log_sum)
        kls += [] if kl is None else [kl]
    largest_drift, place = max(drifts, key=lambda drift: drift[0])
    failures, notes = [], []
    if limits.drift is not None and largest_drift > limits.drift:
        failures.append(f"{place}: the margin is off by {largest_drift:.3g} of the deviation, limit {limits.drift:.3g}")
    mean_kl = math.fsum(kls) / len(kls) if kls else None
    if not limits.certified:
        notes.append("only wide margins are judged: no certificate says how large noise is")
    elif kls and len(kls) < SHORTEST_JUDGED:
        notes.append(f"mean KL is not judged: fewer than {SHORTEST_JUDGED} steps")
    elif mean_kl is not None and limits.mean_kl is not None and mean_kl > limits.mean_kl:
        failures.append(f"mean KL {mean_kl:.3g} nats, limit {limits.mean_kl:.3g}")
    return _Logits(largest_drift, mean_kl, failures, notes)
