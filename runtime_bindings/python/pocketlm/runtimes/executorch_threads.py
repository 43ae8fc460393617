"""ExecuTorch's thread pool, of which a process has one, whichever binding uses it."""

import weakref
from collections.abc import Callable

from pocketlm.errors import PocketLMError
from pocketlm.session import Session

__all__ = ["choose_threads", "open_sessions"]

open_sessions: "weakref.WeakSet[Session]" = weakref.WeakSet()
"""Those whose graphs hold the pool: a change of its size would free it."""


def choose_threads(threads: int | None, current: int, change: Callable[[int], object]) -> None:
    """Let the pool, which has ``current`` threads, have ``threads``; None leaves it as it is.

    Raises :class:`PocketLMError` if another number is asked for while a session is open.
    """
    if threads is None or threads == current:
        return
    if len(open_sessions):
        raise PocketLMError(
            f"ExecuTorch's thread count is process-wide now {current}: close the other sessions, then ask for {threads}"
        )
    change(threads)
