"""JSON of a stranger: one object in UTF-8, no key twice, no deeper than any sound file of a model."""

import json
from typing import Any

__all__ = ["DEEPEST", "is_version_of", "parse_object"]

DEEPEST = 64  # far below Python's recursion limit: whoever walks the values afterwards is safe


def parse_object(data: bytes) -> dict[str, Any]:
    """The object that ``data`` holds; NaN and infinities are left to whoever knows the key.

    Raises :class:`ValueError`, whose text is short and on one line, for anything else.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__} instead of an object")
    _refuse_depth(value)
    return value


def is_version_of(major: int, version: object) -> bool:
    """Whether ``version``, as a document states it, is ``MAJOR.MINOR`` of a format's ``major`` version."""
    return isinstance(version, str) and version.split(".")[0] == str(major)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:60]!r} stands twice in one object")
            seen.add(key)
    return values


def _refuse_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")
