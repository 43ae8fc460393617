"""The content of the caches in lockstep: all calls of a run write before the first of them reads."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError

__all__ = ["CacheRows", "WrittenCache"]

Array = npt.NDArray[Any]


@dataclass(slots=True)
class WrittenCache:
    """A cache ``[1, context, kv_heads, head_dim]`` of one run: what it began with, and what each call wrote where."""

    shape: tuple[int, ...]
    past: Array | None
    updates: list[tuple[int, Array]] = field(default_factory=list)

    def write(self, position: int, rows: Array, where: str) -> None:
        """The next call's ``[1, S, kv_heads, head_dim]``. Raises :class:`BundleError` beyond the cache."""
        context = self.shape[1]
        if not 0 <= position <= context - rows.shape[1]:
            raise BundleError(f"{where}: {rows.shape[1]} rows at {position} of a cache of {context}")
        self.updates.append((position, rows))

    def after(self, calls: int, stop: int | None = None) -> Array:
        """Its rows ``..stop`` once the first ``calls`` calls have written; float64."""
        content = np.zeros((1, *self.shape[1:]))  # pages that nothing touches take no memory
        if self.past is not None:
            content[0, : self.past.shape[1]] = self.past.swapaxes(0, 1)
        for position, rows in self.updates[:calls]:
            content[:, position : position + rows.shape[1]] = rows
        return content[:, :stop]


@dataclass(frozen=True, slots=True)
class CacheRows:
    """Rows that a call takes out of a cache, made when they are read: those of all calls at once would be too many."""

    cache: WrittenCache
    calls: int
    stop: int

    def array(self) -> Array:
        """``[1, stop, kv_heads, head_dim]``."""
        return self.cache.after(self.calls, self.stop)
