"""How a set-up tells what it does."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True, slots=True)
class Progress:
    """``stage``: what begins, and how many bytes it will work through, 0 if that isn't known; ``advance``: how many
    more are done."""

    stage: Callable[[str, int], None] = lambda _name, _bytes: None
    advance: Callable[[int], None] = lambda _bytes: None
