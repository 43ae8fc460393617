"""A recorded session as types: tokens, and of each step what the model thought of the next one.

The JSON schema in runtime_bindings/schema is generated from here; FORMAT.md explains it. A file of JSON lines: one
``session``, then for each generation one ``sequence`` and as many ``step`` lines as it has tokens.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from pocketlm.bundle import Bundle
from pocketlm.errors import InputError
from pocketlm.manifest import Closed, Sha256, TokenId, first_fault
from pocketlm.replaying.expectation import ExpectedSequence, ExpectedSession, RecordedStep
from pocketlm.results import RuntimeRecord
from pocketlm.strict_json import is_version_of, parse_object

__all__ = [
    "FORMAT_VERSION",
    "AnyLine",
    "RecordedSampling",
    "RecordedSequence",
    "RecordedSession",
    "SequenceLine",
    "SessionLine",
    "StepLine",
    "read_session",
    "write_session",
]

FORMAT_VERSION = "1.0"
FORMAT_MAJOR = 1
LARGEST_SESSION = 256 << 20
LONGEST_LINE = 16 << 20
ROUNDING = 1e-6  # how far the shares of the recorded logits may sum up above 1

Logit = Annotated[float, Field(ge=-3.5e38, le=3.5e38)]  # float32
Line = TypeVar("Line", bound=Closed)


class SessionLine(Closed):
    """The first line. ``model_sha256``: :meth:`pocketlm.manifest.Manifest.model_sha256`; ``manifest_sha256``: of the
    bundle that ran, of which there may be several for one model; ``date``: in UTC."""

    kind: Literal["session"]
    format_version: Annotated[str, Field(pattern=r"^1\.\d+$")]
    model_sha256: Sha256
    manifest_sha256: Sha256
    runtime: RuntimeRecord
    pocketlm: str
    machine: dict[str, str]
    date: str


class RecordedSampling(Closed):
    """How the tokens were chosen, every option of :class:`pocketlm.sampling.Sampling` stated."""

    temperature: Annotated[float, Field(ge=0)]
    top_k: Annotated[int, Field(ge=0)]
    top_p: Annotated[float, Field(ge=0, le=1)]
    min_p: Annotated[float, Field(ge=0, le=1)]
    repetition_penalty: Annotated[float, Field(gt=0)]
    seed: Annotated[int, Field(ge=0)] | None


class SequenceLine(Closed):
    """A generation from an empty cache: ``prompt_ids``, then ``tokens``. ``prompt``: the same as text, for people;
    ``finish_reason`` null: it was broken off."""

    kind: Literal["sequence"]
    prompt: str
    prompt_ids: Annotated[list[TokenId], Field(min_length=1)]
    tokens: Annotated[list[TokenId], Field(min_length=1)]
    finish_reason: Literal["stop", "length", "context"] | None
    sampling: RecordedSampling


class StepLine(Closed):
    """What the model gave before a token was chosen: the largest ``logits`` in descending order, and their ``ids``; of
    all logits ``log_sum``, the logarithm of the sum of their exponentials, and ``deviation``, their standard one."""

    kind: Literal["step"]
    ids: Annotated[list[TokenId], Field(min_length=2, max_length=1024)]
    logits: Annotated[list[Logit], Field(min_length=2, max_length=1024)]
    log_sum: Logit
    deviation: Annotated[float, Field(ge=0, le=3.5e38)]

    @model_validator(mode="after")
    def _is_part_of_a_distribution(self) -> Self:
        if len(self.ids) != len(self.logits):
            raise ValueError(f"{len(self.ids)} ids, but {len(self.logits)} logits")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("an id stands twice")
        if any(after > before for before, after in itertools.pairwise(self.logits)):
            raise ValueError("the logits don't descend")
        # The first is the largest: if its share is sound, no other overflows.
        if self.logits[0] > self.log_sum + ROUNDING or self._share > 1 + ROUNDING:
            raise ValueError("'log_sum' is smaller than that of the logits beside it")
        return self

    @property
    def _share(self) -> float:
        return math.fsum(math.exp(logit - self.log_sum) for logit in self.logits)


AnyLine = SessionLine | SequenceLine | StepLine


@dataclass(frozen=True, slots=True)
class RecordedSequence:
    """A generation and its steps."""

    line: SequenceLine
    steps: Sequence[StepLine]


@dataclass(frozen=True, slots=True)
class RecordedSession:
    """The whole of a session file."""

    head: SessionLine
    sequences: Sequence[RecordedSequence]

    def expected(self, name: str) -> ExpectedSession:
        """What a replay of it is compared with."""
        return ExpectedSession(name, self.head.runtime, self.head.machine, tuple(map(_expected, self.sequences)))


def write_session(path: Path, head: SessionLine, sequences: Sequence[tuple[SequenceLine, Sequence[StepLine]]]) -> None:
    """Write the file beside ``path`` and rename it: it is there whole, or as it was before. May raise ``OSError``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for line in (head, *itertools.chain.from_iterable((sequence, *steps) for sequence, steps in sequences)):
                file.write(line.model_dump_json() + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_session(path: Path, bundle: Bundle) -> RecordedSession:
    """The session in the file at ``path``, which can be replayed on ``bundle``.

    Raises :class:`InputError` naming the file and the line: not JSON, another format's version, an unknown key or a
    wrong value, steps that are not as many as tokens, another model, ids outside its vocabulary, more positions than
    the bundle's context.
    """
    lines = _Lines(path)
    head = lines.take(SessionLine)
    if head.model_sha256 != bundle.manifest.model_sha256():
        raise lines.error(f"recorded with another model than that of {bundle.folder}")
    sequences = []
    while not lines.at_end:
        place = lines.number + 1
        sequence = lines.take(SequenceLine)
        _refuse_misfit(lines, sequence.prompt_ids + sequence.tokens, bundle)
        # The last token is not fed: nothing follows it.
        positions = len(sequence.prompt_ids) + len(sequence.tokens) - 1
        if positions > bundle.manifest.model.context_length:
            raise lines.error(
                f"{positions} positions, but the context of {bundle.folder} holds "
                f"{bundle.manifest.model.context_length}"
            )
        steps = []
        for number in range(len(sequence.tokens)):
            if lines.at_end:
                raise lines.error(f"{len(sequence.tokens)} tokens, but {number} steps: truncated", place)
            step = lines.take(StepLine)
            _refuse_misfit(lines, step.ids, bundle)
            steps.append(step)
        sequences.append(RecordedSequence(sequence, steps))
    if not sequences:
        raise InputError(f"{path}: nothing was recorded: no sequence follows the first line")
    return RecordedSession(head, sequences)


def _expected(sequence: RecordedSequence) -> ExpectedSequence:
    return ExpectedSequence(
        prompt=tuple(sequence.line.prompt_ids),
        tokens=tuple(sequence.line.tokens),
        steps=tuple(RecordedStep(step.ids, step.logits, step.log_sum) for step in sequence.steps),
        deviation=math.fsum(step.deviation for step in sequence.steps) / len(sequence.steps),
    )


class _Lines:
    """The lines of a file, one at a time, each bounded."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.number = 0
        self._blocks = self._read()
        self._next = next(self._blocks, None)

    @property
    def at_end(self) -> bool:
        return self._next is None

    def take(self, kind: type[Line]) -> Line:
        """The next line, which has to be of that kind."""
        if self._next is None:
            raise InputError(f"{self._path}: empty: not a recorded session")
        data = self._next
        self.number += 1
        try:
            content = parse_object(data)
        except ValueError as error:
            raise self.error(f"not a JSON object: {str(error)[:100]}") from error
        self._refuse_version(content.get("format_version"), content.get("kind"))
        try:
            line = kind.model_validate(content)
        except ValidationError as error:
            raise self.error(first_fault(error)) from error
        self._next = next(self._blocks, None)
        return line

    def error(self, message: str, number: int | None = None) -> InputError:
        return InputError(f"{self._path}: line {self.number if number is None else number}: {message}")

    def _refuse_version(self, version: object, kind: object) -> None:
        if kind == "session" and not is_version_of(FORMAT_MAJOR, version):
            raise self.error(
                f"'format_version' is {version!r:.20}; this release reads sessions of {FORMAT_MAJOR}.x: record anew, "
                "or use a matching release"
            )

    def _read(self) -> Iterator[bytes]:
        try:
            if not self._path.is_file():
                raise InputError(f"{self._path}: {'not a file' if self._path.exists() else 'no such session file'}")
            if self._path.stat().st_size > LARGEST_SESSION:
                raise InputError(f"{self._path}: larger than {LARGEST_SESSION >> 20} MB: too large for a session")
            with self._path.open("rb") as file:
                while line := file.readline(LONGEST_LINE + 1):
                    if len(line) > LONGEST_LINE:
                        raise self.error(f"longer than {LONGEST_LINE >> 20} MB", self.number + 1)
                    yield line
        except OSError as error:
            raise InputError(f"{self._path}: can't be read: {error.strerror}") from error


def _refuse_misfit(lines: _Lines, ids: Sequence[int], bundle: Bundle) -> None:
    size = bundle.manifest.model.vocabulary_size
    if max(ids) >= size:
        raise lines.error(f"id {max(ids)} is outside the model's vocabulary of {size}")
