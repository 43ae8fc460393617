"""What a chat template may use up: a bound on its steps, its time, and the size of what it makes."""

import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.utils import Namespace

__all__ = [
    "ELEMENT",
    "LARGEST_NUMBER_BITS",
    "LARGEST_VALUE",
    "Budget",
    "formatted_size",
    "joined_size",
    "magnitude",
    "pay",
    "spending",
    "text_size",
    "weigh",
]

# Characters. Ten times the prompt of a context of 128k tokens; a template's own values are far smaller.
LARGEST_VALUE = 8 << 20
WORK = 256 << 20
SECONDS = 5.0
ELEMENT = 8  # an element of a list takes a pointer where a character takes a byte
LARGEST_NUMBER_BITS = 4096


class Budget:
    """What one rendering may still do; a unit is about a character or an element."""

    def __init__(self) -> None:
        self._left = WORK
        self._deadline = time.monotonic() + SECONDS

    def spend(self, amount: int) -> None:
        """Pay for a value of this size; raises where it is too large, or nothing or no time is left."""
        if amount > LARGEST_VALUE:
            raise TemplateRuntimeError(f"a value of {amount:,} characters or elements is too large")
        self._left -= amount
        if self._left < 0:
            raise TemplateRuntimeError("it does not end: too many steps or too much text")
        if time.monotonic() > self._deadline:
            raise TemplateRuntimeError(f"it does not end: more than {SECONDS:g} seconds")


_current: ContextVar[Budget] = ContextVar("budget")


def pay(amount: int) -> None:
    """Spend from the budget of the rendering that runs."""
    _current.get().spend(amount)


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Compile and render within ``budget``."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)


def weigh(value: object) -> int:
    """Characters and elements of a value as if it were written out; parts that occur twice count twice."""
    if type(value) is str:
        return len(value)
    total = 0
    pending = [value]
    while pending:
        item = pending.pop()
        total += ELEMENT
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            pending.extend(item)
        elif isinstance(item, int):
            total += item.bit_length() // 8
        elif isinstance(item, Namespace):
            raise SecurityError("a namespace can't be part of another value")
        elif isinstance(item, bytes):
            raise SecurityError("a template works on text, not on bytes")
        if total > LARGEST_VALUE:
            raise TemplateRuntimeError(f"a value of more than {LARGEST_VALUE:,} characters or elements is too large")
    return total


def magnitude(values: Iterable[object]) -> int:
    """The largest whole number among the values and in their parts."""
    largest = 0
    pending = list(values)
    while pending:
        item = pending.pop()
        if isinstance(item, int):
            largest = max(largest, abs(item))
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
    return largest


def formatted_size(text: str, mark: str, arguments: object) -> int:
    """An upper bound of a formatted text, whose fields begin with ``mark``: ``%`` or ``{``."""
    widths = sum(int(digits[:9]) for digits in re.findall(r"\d+", text))
    takes_widths = "*" in text if mark == "%" else re.search(r"\{[^{}]*\{", text)
    each = weigh(arguments) + (magnitude([arguments]) if takes_widths else 0)
    return len(text) + widths + text.count(mark) * each


def text_size(name: str, text: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
    """An upper bound of what a method or filter of text gives, for those that can make much out of little."""
    given = (*arguments, *keywords.values())
    if name == "replace":
        named = {**dict(zip(("old", "new"), arguments, strict=False)), **keywords}
        return len(text) + text.count(str(named.get("old", ""))) * len(str(named.get("new", "")))
    if name == "round":
        return magnitude(given) * LARGEST_NUMBER_BITS
    if name == "translate":
        return len(text) * (1 + max((len(str(new)) for table in given for new in dict(table).values()), default=0))
    if name in {"format", "format_map"}:
        return formatted_size(text, "{", given)
    if name in {"center", "ljust", "rjust", "zfill", "truncate", "batch", "slice"}:
        return len(text) + magnitude(given)
    if name == "expandtabs":
        return len(text) + text.count("\t") * max(8, magnitude(given))
    if name == "indent":
        return len(text) + (1 + text.count("\n")) * max(4, magnitude(given), *(len(str(value)) for value in given))
    if name in {"wordwrap", "urlize", "xmlattr"}:
        return len(text) * (1 + weigh(given))
    return 0


def joined_size(separator: str, items: list[Any]) -> int:
    """The size of items joined to a text."""
    return weigh(items) + len(separator) * len(items)
