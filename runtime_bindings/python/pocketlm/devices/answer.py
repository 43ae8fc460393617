"""Reads what an agent left: RESULT, its exit code and the end of its stderr. All of it comes from outside."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm import errors
from pocketlm.errors import PocketLMError, UnavailableError
from pocketlm.job import FORMAT_MAJOR
from pocketlm.strict_json import is_version_of, parse_object

__all__ = ["read_answer"]

LARGEST_RESULT = 256 << 20
LONGEST_REASON = 300
KINDS = ("begin", "sequence", "measurement", "end", "error")


def read_answer(device: str, result: Path, exit_code: int, stderr: str) -> tuple[Mapping[str, Any], ...]:
    """The lines of ``result``, from ``begin`` on, without the last.

    Raises the error that the agent reports, and :class:`UnavailableError` naming ``device`` for a process that died, an
    agent of another version, and what is no result.
    """
    lines = _lines(device, result)
    last = lines[-1] if lines else None
    if last is not None and last["kind"] == "error":
        raise _reported(device, last)
    if last is None or last["kind"] != "end":
        raise UnavailableError(f"{device}: the agent ended with {_ending(exit_code)}{_reason(stderr)}")
    if exit_code != 0:
        raise UnavailableError(f"{device}: the agent answered, but ended with {_ending(exit_code)}{_reason(stderr)}")
    version = lines[0].get("format_version")
    if lines[0]["kind"] != "begin" or not is_version_of(FORMAT_MAJOR, version):
        raise UnavailableError(f"{device}: an agent of another version answered: {version!r:.20}, not {FORMAT_MAJOR}.x")
    return tuple(lines[:-1])


def _lines(device: str, result: Path) -> list[Mapping[str, Any]]:
    """The whole lines: the last one may have been cut off."""
    try:
        if result.stat().st_size > LARGEST_RESULT:
            raise UnavailableError(f"{device}: the result is larger than {LARGEST_RESULT >> 20} MB")
        data = result.read_bytes()
    except FileNotFoundError:
        return []
    lines: list[Mapping[str, Any]] = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            value = parse_object(line)
        except ValueError as error:
            raise UnavailableError(f"{device}: line {number} of the result is not JSON: {error}") from error
        if value.get("kind") not in KINDS:
            raise UnavailableError(f"{device}: line {number} of the result is of no known kind")
        lines.append(value)
    return lines


def _reported(device: str, line: Mapping[str, Any]) -> PocketLMError:
    kind = getattr(errors, str(line.get("error")), None) if line.get("error") in errors.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, PocketLMError)):
        kind = UnavailableError
    return kind(f"{device}: {line.get('message')}")


def _ending(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"


def _reason(stderr: str) -> str:
    ending = stderr.strip().rpartition("\n")[2][-LONGEST_REASON:]
    return f": {ending}" if ending else ", and said nothing"
