"""Watches over calls that share a state while they run together.

Every row of a state's first axis must be touched by the calls in their order: then each of them reads what it would
read if those before it had ended.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from pocketlm.errors import UnsupportedError

__all__ = ["Turn", "Turns"]

Array = NDArray[Any]


class Turns:
    """Who touched each row of each state last. ``state`` holds C-contiguous arrays, which nobody replaces."""

    def __init__(self, state: Mapping[str, Array]) -> None:
        self._state = dict(state)
        self._latest = {name: np.zeros(len(array) if array.ndim else 1, np.int64) for name, array in state.items()}

    def take(self, name: str, part: Array, number: int, where: str) -> None:
        """Call ``number`` touches ``part``, a view of state ``name``.

        Raises :class:`UnsupportedError` naming ``where`` if a later call has touched a row of it.
        """
        whole, latest = self._state[name], self._latest[name]
        if not part.size or not np.may_share_memory(part, whole):
            return
        row_bytes = max(1, whole.nbytes // len(latest))
        low, high = byte_bounds(part)
        base = byte_bounds(whole)[0]
        rows = slice((low - base) // row_bytes, -(-(high - base) // row_bytes))
        if latest[rows].max() > number:
            raise UnsupportedError(
                f"{where}: touches rows {rows.start} to {rows.stop - 1} of state {name!r} after a later call did; "
                "these calls can't run together"
            )
        latest[rows] = number


class Turn:
    """One call's place in :class:`Turns`."""

    def __init__(self, turns: Turns, number: int) -> None:
        self._turns, self._number = turns, number

    def take(self, states: Iterable[str], part: Array, where: str) -> None:
        """This call touches ``part``, which may be a view of any of ``states``."""
        for name in states:
            self._turns.take(name, part, self._number, where)
