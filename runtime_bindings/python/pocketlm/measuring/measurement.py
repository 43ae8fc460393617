"""What an agent's lines say of a measurement, checked: they come from a device."""

import hashlib
import json
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from pocketlm.devices.base import Outcome
from pocketlm.errors import UnavailableError
from pocketlm.manifest import Closed, first_fault
from pocketlm.results import Energy, Memory, Peak, Sample

__all__ = ["Begin", "Measurement", "read_begin", "read_measurement"]

Seconds = Annotated[float, Field(ge=0)]


class Line(Closed):
    """One line of an agent's result."""


class Begin(Line):
    """The first line: the runtime as it was loaded, and the machine as the agent saw it."""

    kind: Literal["begin"]
    format_version: str
    runtime: str
    runtime_version: str
    runtime_build: str
    python: str
    numpy: str
    machine: dict[str, str]
    clock: str


class Measurement(Line):
    """What :func:`pocketlm.agent.run` reports of :class:`pocketlm.job.Measure`; the meanings are those of
    :class:`pocketlm.results.Sample`."""

    kind: Literal["measurement"]
    import_seconds: Seconds
    check_seconds: Seconds
    load_seconds: Seconds
    depth_seconds: Seconds
    first_token_seconds: Seconds
    prefill_seconds: Annotated[float, Field(gt=0)]
    decode_seconds: Annotated[list[Seconds], Field(min_length=1)]
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    memory: Memory
    energy: Energy
    load_average: Seconds | None
    others_cores: Seconds | None

    @property
    def tokens_sha256(self) -> str:
        """Of the ids as JSON without spaces."""
        return hashlib.sha256(json.dumps(self.tokens, separators=(",", ":")).encode()).hexdigest()

    def as_sample(self, *, cold: bool) -> Sample:
        """The repetition as results hold it; its peak counts what the process saw of itself at the end, too."""
        values = self.model_dump(exclude={"kind", "tokens", "memory", "energy"})
        return Sample(
            cold=cold, tokens_sha256=self.tokens_sha256, memory=_whole_peak(self.memory), energy=self.energy, **values
        )


KnownLine = TypeVar("KnownLine", bound=Line)


def read_begin(device: str, outcome: Outcome) -> Begin:
    """The first line of ``outcome``. Raises :class:`UnavailableError` naming ``device`` and the key."""
    return _read(device, outcome, "begin", Begin)


def read_measurement(device: str, outcome: Outcome, new_tokens: int) -> Measurement:
    """The measurement in ``outcome``.

    Raises :class:`UnavailableError` naming ``device`` and the key, and for other than ``new_tokens`` tokens.
    """
    measurement = _read(device, outcome, "measurement", Measurement)
    if len(measurement.tokens) != new_tokens or len(measurement.decode_seconds) != new_tokens - 1:
        raise UnavailableError(
            f"{device}: the agent answered {len(measurement.tokens)} tokens and {len(measurement.decode_seconds)} "
            f"intervals instead of {new_tokens} and {new_tokens - 1}"
        )
    return measurement


def _read(device: str, outcome: Outcome, kind: str, line: type[KnownLine]) -> KnownLine:
    found = outcome.of_kind(kind)
    if len(found) != 1:
        raise UnavailableError(f"{device}: the agent's result has {len(found)} lines of kind {kind} instead of one")
    try:
        return line.model_validate(found[0])
    except ValidationError as error:
        raise UnavailableError(f"{device}: the agent's line {kind}: {first_fault(error)}") from error


def _whole_peak(memory: Memory) -> Memory:
    """``memory`` with a peak that covers the process's own last look, after the last sample."""
    peak, last = memory.peak, memory.decoded
    if peak is None or last is None:
        return memory
    whole = Peak(
        resident=max(peak.resident, last.highest),
        anonymous=max(peak.anonymous, last.anonymous),
        file_backed=max(peak.file_backed, last.file_backed),
    )
    return memory.model_copy(update={"peak": whole})
