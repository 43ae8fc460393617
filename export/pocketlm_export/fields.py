"""Typed, bounded reading of a JSON object, with a record of the keys that nobody read."""

import json
import math
import stat
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pocketlm.errors import CheckpointError
from pocketlm.strict_json import parse_object

__all__ = ["Fields", "read_json"]

LARGEST_JSON = 64 << 20
LARGEST_SIZE = 1 << 31


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises :class:`CheckpointError` for anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size > LARGEST_JSON:
            raise CheckpointError(f"{path}: {status.st_size} bytes are too many for a JSON file of a checkpoint")
        return parse_object(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a valid JSON object: {str(error)[:100]}") from error


class Fields:
    """A JSON object whose values are read by type. Every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null, which in some places is not what absence means."""
        return key in self and self.value(key) is None

    def refuse(self, key: str, problem: str) -> CheckpointError:
        """The error that says what is wrong with ``key``."""
        return CheckpointError(f"{self.source}: {key[:60]!r} {problem}")

    def value(self, key: str, default: Any = None) -> Any:
        """The raw value; marks the key as read."""
        self._read.add(key)
        return self._values.get(key, default)

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """An integer in ``least..most``; absent or null gives the default, and without one an error."""
        value = self.value(key)
        if value is None:
            if default is None:
                raise self.refuse(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, f"must be an integer, not {json.dumps(value)[:40]}")
        if not least <= value <= most:
            raise self.refuse(key, f"must be between {least} and {most}, not {str(value)[:40]}")
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        least: float | None = None,
        most: float = math.inf,
    ) -> float:
        """A finite number of at least ``least``, without one greater than zero, and at most ``most``."""
        value = self.value(key)
        if value is None:
            if default is None:
                raise self.refuse(key, "is missing")
            return default
        number = _real(value)
        if not math.isfinite(number):
            raise self.refuse(key, f"must be a finite number, not {json.dumps(value)[:40]}")
        if number <= 0 and least is None:
            raise self.refuse(key, f"must be greater than zero, not {number:g}")
        if least is not None and number < least:
            raise self.refuse(key, f"must be at least {least:g}, not {number:g}")
        if number > most:
            raise self.refuse(key, f"must be at most {most:g}, not {number:g}")
        return number

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; absent or null gives the default."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, f"must be true or false, not {json.dumps(value)[:40]}")
        return value

    def choice(self, key: str, default: str, choices: Collection[str]) -> str:
        """One of ``choices``; absent or null gives the default."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(key, f"is {json.dumps(value)[:60]}; supported: {', '.join(sorted(choices))}")
        return str(value)

    def choices(self, key: str, length: int, values: Collection[Any]) -> list[Any] | None:
        """A list of ``length`` items out of ``values``; None if absent or null."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise self.refuse(key, f"must be a list of {length} items, one a layer")
        for item in value:
            if isinstance(item, bool) or item not in values:
                raise self.refuse(key, f"holds {json.dumps(item)[:40]}; supported: {', '.join(map(str, values))}")
        return value

    def indices(self, key: str, below: int) -> list[int]:
        """A list of integers from 0 to below ``below``; absent or null gives none."""
        value = self.value(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.refuse(key, f"must be a list, not {json.dumps(value)[:40]}")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < below:
                raise self.refuse(key, f"holds {json.dumps(item)[:40]}: must be between 0 and {below - 1}")
        return value

    def numbers(self, key: str, length: int, *, most: float = math.inf) -> list[float]:
        """A list of ``length`` finite numbers greater than zero and at most ``most``."""
        value = self.value(key)
        if value is None:
            raise self.refuse(key, "is missing")
        if not isinstance(value, list) or len(value) != length:
            raise self.refuse(key, f"must be a list of {length} numbers")
        numbers = [_real(item) for item in value]
        for number, item in zip(numbers, value, strict=True):
            if not 0 < number <= min(most, sys.float_info.max):
                raise self.refuse(key, f"holds {json.dumps(item)[:40]}: must be greater than zero and at most {most:g}")
        return numbers

    def nested(self, key: str) -> "Fields | None":
        """The object under ``key``; None if absent, null or empty."""
        value = self.value(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, f"must be an object, not {json.dumps(value)[:40]}")
        return Fields(value, f"{self.source}: {key}")

    def unread(self) -> list[str]:
        """The keys that were never read and hold a value other than null, in order."""
        return [key for key, value in self._values.items() if key not in self._read and value is not None]


def _real(value: object) -> float:
    """NaN for what is no number; infinity for an integer that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
