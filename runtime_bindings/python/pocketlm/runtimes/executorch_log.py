"""What ExecuTorch prints to the terminal, kept off it."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["captured_log"]


@contextmanager
def captured_log() -> Iterator[Callable[[], str]]:
    """Keep what ExecuTorch logs off the terminal; yields the last line: an error's reason is only there."""
    with tempfile.TemporaryFile() as log:
        terminal = os.dup(2)
        os.dup2(log.fileno(), 2)

        def last_line() -> str:
            log.seek(0)
            return log.read().decode(errors="replace").strip().rpartition("\n")[2]

        try:
            yield last_line
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
