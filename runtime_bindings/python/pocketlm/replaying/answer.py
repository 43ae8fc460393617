"""What an agent says of a replay, checked: it comes from a device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pocketlm.devices.base import Outcome
from pocketlm.errors import UnavailableError
from pocketlm.manifest import first_fault
from pocketlm.replaying.expectation import ExpectedSequence

__all__ = ["Numbers", "ReplayedStep", "read_replay"]


class _Line(BaseModel):
    """What an agent of a newer minor version adds is not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of a step, all finite: the logits that were asked for, the recorded choice's first; the logarithm of the sum of
    the exponentials of all; and ``margin``, from the recorded choice's logit to the largest of the others."""

    values: Sequence[float]
    log_sum: float
    margin: float


class ReplayedStep(_Line):
    """``choice``: the most likely token; ``values``: the logits that were asked for; ``top``: id and value of the
    largest; ``log_sum``: of all. None: not finite."""

    choice: Annotated[int, Field(ge=0)]
    values: Annotated[list[float | None], Field(min_length=1)]
    top: Annotated[list[Annotated[list[float | None], Field(min_length=2, max_length=2)]], Field(min_length=2)]
    log_sum: float | None

    @property
    def numbers(self) -> Numbers | None:
        """None if the step has anything that isn't finite."""
        values = [value for value in self.values if value is not None]
        largest, second = self.top[0][1], self.top[1][1]
        if self.log_sum is None or largest is None or second is None or len(values) < len(self.values):
            return None
        return Numbers(values, self.log_sum, values[0] - (largest if values[0] < largest else second))


class _SequenceLine(_Line):
    kind: Literal["sequence"]
    index: int
    steps: list[ReplayedStep]


def read_replay(device: str, expected: Sequence[ExpectedSequence], outcome: Outcome) -> list[list[ReplayedStep]]:
    """The steps of each sequence, as many as were asked for.

    Raises :class:`UnavailableError` naming ``device`` for anything else.
    """
    lines = [_checked(device, line) for line in outcome.of_kind("sequence")]
    if [line.index for line in lines] != list(range(len(expected))):
        raise UnavailableError(
            f"{device}: the agent answered {len(lines)} sequences of {len(expected)}, or in disorder"
        )
    for line, sequence in zip(lines, expected, strict=True):
        asked = [len(step.ids) for step in sequence.steps]
        if [len(step.values) for step in line.steps] != asked:
            raise UnavailableError(f"{device}: the answer of sequence {line.index + 1} is not to what was asked")
    return [line.steps for line in lines]


def _checked(device: str, line: Mapping[str, Any]) -> _SequenceLine:
    try:
        return _SequenceLine.model_validate(line)
    except ValidationError as error:
        raise UnavailableError(f"{device}: the agent's answer is malformed: {first_fault(error)}") from error
