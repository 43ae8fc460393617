"""What an agent is told to do, as JSON that either side reads strictly. Standard library only: a phone has no pydantic.

A job replays recorded tokens, or measures; it names one artifact and one runtime. FORMAT.md describes the file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from pocketlm.artifact import Artifact, ArtifactFile
from pocketlm.errors import InputError
from pocketlm.strict_json import is_version_of

__all__ = ["FORMAT_MAJOR", "FORMAT_VERSION", "ForcedTokens", "Job", "Measure", "Replay"]

FORMAT_VERSION = "1.0"  # of jobs and of the lines that answer them
FORMAT_MAJOR = 1
RUNTIMES = ("onnx", "executorch", "coreml")
LARGEST_NUMBER = 1 << 40

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class ForcedTokens:
    """``prompt`` is prefilled, then ``tokens`` are fed one by one, whatever the runtime would choose.

    ``ids``: for each of ``tokens``, the ids whose logits are wanted at the step that it answers; none, or as many
    entries as tokens.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Replay:
    """``sequences``, each from an empty cache; ``top``: of how many of the largest logits a step tells id and value."""

    sequences: tuple[ForcedTokens, ...]
    top: int = 0


@dataclass(frozen=True, slots=True)
class Measure:
    """``depth`` tokens fill the cache first, then ``prompt_tokens`` are prefilled and ``new_tokens`` generated.

    ``cold``: the artifact is dropped from the page cache before it is loaded. ``windows``: prefill and decode are
    marked for a counter of instructions. ``profile``: the runtime writes its own profile, which slows it.
    """

    prompt_tokens: int
    new_tokens: int
    depth: int = 0
    cold: bool = False
    windows: bool = False
    profile: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One process's work. ``threads`` None is the runtime's default; ``cores``: the cores that it may run on, None
    for all; ``packed``: as in :meth:`pocketlm.Bundle.session`."""

    runtime: str
    artifact: Artifact
    work: Replay | Measure
    threads: int | None = None
    cores: tuple[int, ...] | None = None
    packed: bool = False

    def to_json(self) -> dict[str, Any]:
        """The object of job.json."""
        artifact = {**asdict(self.artifact), "path": str(self.artifact.path)}
        kind = "replay" if isinstance(self.work, Replay) else "measure"
        return {
            "format_version": FORMAT_VERSION,
            "runtime": self.runtime,
            "artifact": artifact,
            "threads": self.threads,
            "cores": self.cores,
            "packed": self.packed,
            kind: asdict(self.work),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The job of ``document``. Raises :class:`InputError` naming the key that is missing, unknown or of a wrong
        type, and another format's version."""
        version = document.get("format_version")
        if not is_version_of(FORMAT_MAJOR, version):
            raise InputError(f"job: 'format_version' is {version!r:.20}; this agent reads {FORMAT_MAJOR}.x")
        given = _Keys("job", document)
        given.take("format_version", _text)
        kinds = [kind for kind in ("replay", "measure") if kind in document]
        if len(kinds) != 1:
            raise InputError("job: needs one of 'replay' and 'measure'")
        read_work: Callable[[str, Any], Replay | Measure] = _replay if kinds[0] == "replay" else _measure
        job = cls(
            runtime=given.take("runtime", _one_of(RUNTIMES)),
            artifact=given.take("artifact", _artifact),
            threads=given.take("threads", _optional(_count)),
            cores=given.take("cores", _optional(_list_of(_whole))),
            packed=given.take("packed", _flag),
            work=given.take(kinds[0], read_work),
        )
        given.end()
        return job


class _Keys:
    """An object whose every key has to be taken."""

    def __init__(self, place: str, document: Any) -> None:
        if not isinstance(document, Mapping):
            raise InputError(f"{place}: must be an object")
        self._place = place
        self._left = dict(document)

    def take(self, key: str, read: Callable[[str, Any], Value]) -> Value:
        if key not in self._left:
            raise InputError(f"{self._place}: '{key}' is missing")
        return read(f"{self._place}.{key}", self._left.pop(key))

    def end(self) -> None:
        if self._left:
            raise InputError(f"{self._place}: unknown key {next(iter(self._left))!r:.60}")


def _text(place: str, value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(f"{place}: must be a text")
    return value


def _flag(place: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{place}: must be true or false")
    return value


def _whole(place: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_NUMBER:
        raise InputError(f"{place}: must be a whole number from 0 on, not {value!r:.20}")
    return value


def _count(place: str, value: Any) -> int:
    if _whole(place, value) == 0:
        raise InputError(f"{place}: must be at least 1")
    return int(value)


def _optional(read: Callable[[str, Any], Value]) -> Callable[[str, Any], Value | None]:
    return lambda place, value: None if value is None else read(place, value)


def _list_of(read: Callable[[str, Any], Value]) -> Callable[[str, Any], tuple[Value, ...]]:
    def items(place: str, value: Any) -> tuple[Value, ...]:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise InputError(f"{place}: must be a list")
        return tuple(read(f"{place}[{index}]", item) for index, item in enumerate(value))

    return items


def _one_of(names: Sequence[str]) -> Callable[[str, Any], str]:
    def name(place: str, value: Any) -> str:
        if value not in names:
            raise InputError(f"{place}: {value!r:.40} is not one of {', '.join(names)}")
        return str(value)

    return name


def _map_of(read: Callable[[str, Any], Value]) -> Callable[[str, Any], dict[str, Value]]:
    def items(place: str, value: Any) -> dict[str, Value]:
        if not isinstance(value, Mapping):
            raise InputError(f"{place}: must be an object")
        return {name: read(f"{place}.{name}", item) for name, item in value.items()}

    return items


def _object(kind: type[Value], **readers: Callable[[str, Any], Any]) -> Callable[[str, Any], Value]:
    """Reads an object with exactly the fields of the dataclass ``kind``."""
    assert set(readers) == {field.name for field in fields(kind)}  # type: ignore[arg-type]

    def read(place: str, value: Any) -> Value:
        given = _Keys(place, value)
        made = kind(**{name: given.take(name, reader) for name, reader in readers.items()})
        given.end()
        return made

    return read


def _path(place: str, value: Any) -> Path:
    return Path(_text(place, value))


_artifact = _object(
    Artifact,
    path=_path,
    requirements=_map_of(_text),
    context_length=_count,
    vocabulary_size=_count,
    hidden_size=_count,
    longest_call=_count,
    rows=_count,
    files=_map_of(_object(ArtifactFile, sha256=_text, size=_whole)),
)
_replay = _object(
    Replay,
    sequences=_list_of(
        _object(ForcedTokens, prompt=_list_of(_whole), tokens=_list_of(_whole), ids=_list_of(_list_of(_whole)))
    ),
    top=_whole,
)
_measure = _object(
    Measure, prompt_tokens=_count, new_tokens=_count, depth=_whole, cold=_flag, windows=_flag, profile=_flag
)
