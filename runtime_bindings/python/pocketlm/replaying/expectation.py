"""What a replay is compared with, whoever recorded it: the float64 reference, or a runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pocketlm.job import ForcedTokens, Replay
from pocketlm.results import RuntimeRecord

__all__ = ["ExpectedSequence", "ExpectedSession", "ExpectedStep", "GoldenStep", "RecordedStep"]

HALF_DIGIT = 0.005  # margins of the golden session are rounded to two decimals
EMPTY = 1e-12  # a share below this is what rounding left of none


class ExpectedStep(Protocol):
    """One step as it was recorded."""

    @property
    def choice(self) -> int:
        """The most likely token."""

    @property
    def ids(self) -> Sequence[int]:
        """The ids whose logits a replay has to tell; the first is :attr:`choice`."""

    def regret(self, choice: int) -> float:
        """How far the recorded logit of ``choice`` lies below the largest: at least so far, and never less than 0."""

    def drift(self, margin: float) -> float:
        """How far ``margin``, from the replayed logit of :attr:`choice` to the largest of the others, is from the
        recorded one: at least so far."""

    def kl(self, values: Sequence[float], log_sum: float) -> float | None:
        """The Kullback-Leibler divergence of the replayed distribution from the recorded one, in nats; None if none
        was recorded.

        ``values``: the replayed logits of :attr:`ids`; ``log_sum``: of all replayed ones.
        """


@dataclass(frozen=True, slots=True)
class GoldenStep:
    """Of the golden session: the reference's choice and its distance to the second, rounded."""

    choice: int
    margin: float

    @property
    def ids(self) -> Sequence[int]:
        return (self.choice,)

    def regret(self, choice: int) -> float:
        return 0.0 if choice == self.choice else max(0.0, self.margin - HALF_DIGIT)

    def drift(self, margin: float) -> float:
        return max(0.0, abs(margin - self.margin) - HALF_DIGIT)

    def kl(self, values: Sequence[float], log_sum: float) -> float | None:  # noqa: ARG002
        return None


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """Of a recorded session: the largest logits, two or more, descending; and of all of them the logarithm of the sum
    of their exponentials."""

    ids: Sequence[int]
    logits: Sequence[float]
    log_sum: float

    @property
    def choice(self) -> int:
        return self.ids[0]

    def regret(self, choice: int) -> float:
        # One that was not kept is no larger than the last that was.
        place = self.ids.index(choice) if choice in self.ids else -1
        return self.logits[0] - self.logits[place]

    def drift(self, margin: float) -> float:
        return abs(margin - (self.logits[0] - self.logits[1]))

    def kl(self, values: Sequence[float], log_sum: float) -> float | None:
        """Over the kept ids and one bucket for the rest: by the data-processing inequality never
        more than over the vocabulary, so that it may miss a difference but alarms at none that isn't there."""
        ours = np.asarray(self.logits) - self.log_sum
        theirs = np.asarray(values) - log_sum
        rest = max(EMPTY, 1 - float(np.exp(ours).sum()))
        # A little more than it may be: the smaller it is, the more of it is rounding, and the larger the divergence.
        their_rest = max(0.0, 1 - float(np.exp(theirs).sum())) + EMPTY
        kept = float((np.exp(ours) * (ours - theirs)).sum())
        return max(0.0, kept + rest * float(np.log(rest / their_rest)))


@dataclass(frozen=True, slots=True)
class ExpectedSequence:
    """``tokens`` follow ``prompt``, one for each of ``steps``; ``deviation``: the mean over the steps of the standard
    deviation of all logits."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    steps: tuple[ExpectedStep, ...]
    deviation: float


@dataclass(frozen=True, slots=True)
class ExpectedSession:
    """``name``: for people; ``recorded_by`` and ``recorded_on``, what its machine said of itself: None for the float64
    reference."""

    name: str
    recorded_by: RuntimeRecord | None
    recorded_on: Mapping[str, str] | None
    sequences: tuple[ExpectedSequence, ...]

    @property
    def work(self) -> Replay:
        """What an agent has to do: feed the tokens, and tell what the steps want to know."""
        return Replay(
            tuple(
                ForcedTokens(sequence.prompt, sequence.tokens, tuple(tuple(step.ids) for step in sequence.steps))
                for sequence in self.sequences
            ),
            top=2,
        )

    @property
    def steps(self) -> int:
        """Of all sequences."""
        return sum(len(sequence.steps) for sequence in self.sequences)

    @property
    def deviation(self) -> float:
        """The mean over all steps, in nats."""
        return sum(sequence.deviation * len(sequence.steps) for sequence in self.sequences) / self.steps
