"""The contract of a device: it tells facts, takes an artifact, does a job under a time limit, and is left clean."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pocketlm.artifact import Artifact
from pocketlm.job import Job

__all__ = ["Device", "Facts", "Found", "Outcome", "State"]

Facts = Mapping[str, str | int | float | None]
State = Literal["ready", "not ready", "can be set up", "not available"]


@dataclass(frozen=True, slots=True)
class Found:
    """An address that could be opened, or why it can't. ``advice``: what to do next, empty if nothing has to be."""

    address: str
    state: State
    description: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job's process left. ``lines``: those of its result, from ``begin`` on, without the last.

    ``instructions``: of each window that it opened, where the device counts them; ``profile``: the runtime's own file,
    where the job asked for it, in the folder that was given.
    """

    lines: tuple[Mapping[str, Any], ...]
    instructions: Mapping[int, int] | None = None
    profile: Path | None = None

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """The lines of that kind, in their order."""
        return [line for line in self.lines if line["kind"] == kind]


class Device(ABC):
    """One place where agents run. A device is opened, used by one thread, and closed."""

    emulated = False
    """Whether its times and its memory are an emulator's, and mean nothing."""

    def __init__(self, address: str) -> None:
        self.address = address

    @abstractmethod
    def facts(self) -> Facts:
        """What the device is, and in which state, now: model, system, battery, temperatures. What it doesn't tell is
        None, never 0."""

    def runtimes(self) -> Sequence[str]:
        """Those that it runs unless others are asked for, in the order of preference."""
        return ("executorch", "onnx")

    def check_ready(self, *, cool_down: float = 0.0) -> None:  # noqa: B027  most devices always are
        """Wait up to ``cool_down`` seconds until its speed means something; raise :class:`UnavailableError` if not."""

    @abstractmethod
    def place(self, artifact: Artifact) -> Artifact:
        """``artifact`` as the device has it, its files pushed unless they are there already by their sha256.

        Raises :class:`UnavailableError` if the device doesn't take them: it is gone, or full.
        """

    @abstractmethod
    def run(self, job: Job, folder: Path, *, limit: float) -> Outcome:
        """Do ``job``, whose artifact was placed, in a process of its own that ends after ``limit`` seconds.

        ``folder``: an empty one here, for what is pulled. Raises the error that the agent reports, and
        :class:`UnavailableError` if the process died, ran out of time, or answered with garbage.
        """

    def clean(self) -> None:  # noqa: B027  where nothing is pushed, nothing is left
        """Remove what was pushed."""

    def close(self) -> None:  # noqa: B027
        """Leave nothing running."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
