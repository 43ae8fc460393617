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


def judge(
    expected: Sequence[ExpectedSequence], replayed: Sequence[Sequence[ReplayedStep]], limits: ReplayLimits
) -> Judgement:
    """Judge every step, those behind a divergence too: the recorded tokens were fed, whatever was chosen."""
    pairs = list(_pairs(expected, replayed))
    divergences = [
        _divergence(place, step, answer, deviation, limits)
        for place, step, answer, deviation in pairs
        if answer.choice != step.choice
    ]
    mean_kl, failures, notes = _judge_logits(pairs, limits)
    wide = next((divergence for divergence in divergences if divergence.wide), None)
    if wide is not None:
        failures.insert(
            0,
            f"sequence {wide.sequence}, step {wide.step}: margin {wide.margin:.3g} of the deviation is wide: "
            f"a near tie has at most {limits.margin:.3g}",
        )
    return Judgement(
        steps=len(pairs),
        agreeing=len(pairs) - len(divergences),
        first_divergence=divergences[0] if divergences else None,
        widest_divergence=max(divergences, key=lambda divergence: divergence.margin, default=None),
        mean_kl=mean_kl,
        failures=failures,
        notes=notes,
    )


_Place = tuple[int, int]  # sequence and step, from 1 on
_Pair = tuple[_Place, ExpectedStep, ReplayedStep, float]


def _pairs(expected: Sequence[ExpectedSequence], replayed: Sequence[Sequence[ReplayedStep]]) -> Iterator[_Pair]:
    for sequence, (recorded, answers) in enumerate(zip(expected, replayed, strict=True), 1):
        for number, (step, answer) in enumerate(zip(recorded.steps, answers, strict=True), 1):
            yield (sequence, number), step, answer, recorded.deviation


def _divergence(
    place: _Place, step: ExpectedStep, answer: ReplayedStep, deviation: float, limits: ReplayLimits
) -> Divergence:
    margin = step.regret(answer.choice) / (deviation or 1.0)
    sequence, number = place
    return Divergence(
        sequence=sequence,
        step=number,
        recorded=step.choice,
        chosen=answer.choice,
        margin=margin,
        wide=margin > limits.margin,
    )


def _judge_logits(pairs: Sequence[_Pair], limits: ReplayLimits) -> tuple[float | None, list[str], list[str]]:
    """The mean KL, what it fails for, and why it isn't judged."""
    known: list[float] = []
    for (sequence, number), step, answer, _ in pairs:
        if answer.numbers is None:
            return None, [f"sequence {sequence}, step {number}: a logit is not finite"], []
        kl = step.kl(*answer.numbers)
        known += [] if kl is None else [kl]
    if not known:
        return None, [], ["mean KL: no distribution was recorded"]
    mean_kl = math.fsum(known) / len(known)
    if limits.mean_kl is None:
        return mean_kl, [], ["mean KL is not judged: no certificate says how large noise is"]
    if len(known) < SHORTEST_JUDGED:
        return mean_kl, [], [f"mean KL is not judged: fewer than {SHORTEST_JUDGED} steps"]
    if mean_kl > limits.mean_kl:
        return mean_kl, [f"mean KL {mean_kl:.3g} nats, limit {limits.mean_kl:.3g}"], []
    return mean_kl, [], []
