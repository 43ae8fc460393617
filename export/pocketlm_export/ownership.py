"""Who a scratch file or folder belongs to: the running process that holds it.

A holder has an advisory lock, which the kernel takes from a process however it ends. So what nobody holds was left by a
process that was killed, and may be removed; there is no age to wait for, and no process number that can be reused.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["abandoned", "hold"]


def hold(path: Path) -> int | None:
    """Hold the file or folder ``path`` until the returned descriptor is closed; None if another holds it or it is gone.

    A new file is there before it is held, so another process may take it for abandoned: on None, make another one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def abandoned(paths: Iterable[Path]) -> Iterator[Path]:
    """Those of ``paths`` that no process holds, each held while the caller has it, to be removed."""
    for path in paths:
        try:
            descriptor = hold(path)
        except OSError:  # a link, or another user's
            continue
        if descriptor is not None:
            try:
                yield path
            finally:
                os.close(descriptor)
