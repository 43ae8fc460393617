"""Watches the memory of this process from a child of its own: between two calls of a runtime nobody else could look."""

import contextlib
import os
import signal
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn, Self

from pocketlm.memory import MemoryPeak, resident_memory

__all__ = ["INTERVAL", "MemoryWatch"]

INTERVAL = 0.01  # seconds between two looks, each of which costs about 50 us of another core
SAMPLE = struct.Struct("<dQQ")  # time.monotonic(), bytes anonymous, bytes file-backed


class MemoryWatch:
    """Samples this process until :meth:`stop`, or until it is left. Where the system doesn't split memory there are no
    peaks. Enter it before threads exist and before numpy is imported: the child has little of its own then."""

    def __enter__(self) -> Self:
        reading, writing = os.pipe()
        watched = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            os.close(reading)
            _sample(watched, writing)
        os.close(writing)
        self._reading = reading
        self._samples: list[tuple[float, int, int]] = []
        return self

    def stop(self) -> None:
        """End the sampling and collect it; a second call does nothing."""
        if self._reading < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGTERM)
        data = b"".join(iter(lambda: os.read(self._reading, 1 << 16), b""))
        os.close(self._reading)
        os.waitpid(self._child, 0)
        self._reading = -1
        self._samples = list(SAMPLE.iter_unpack(data[: len(data) - len(data) % SAMPLE.size]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def peak(self, begin: float = float("-inf"), end: float = float("inf")) -> MemoryPeak | None:
        """Between two moments of ``time.monotonic()``, after :meth:`stop`; None without a sample there."""
        found = list(self._between(begin, end))
        if not found:
            return None
        return MemoryPeak(
            resident=max(anonymous + file_backed for anonymous, file_backed in found),
            anonymous=max(anonymous for anonymous, _ in found),
            file_backed=max(file_backed for _, file_backed in found),
        )

    def _between(self, begin: float, end: float) -> Iterator[tuple[int, int]]:
        for moment, anonymous, file_backed in self._samples:
            if begin <= moment <= end:
                yield anonymous, file_backed


def _sample(watched: int, writing: int) -> NoReturn:
    """In the child: look until told to stop, or until the parent is gone, then hand over all samples."""
    told: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    try:
        samples = bytearray()
        while not told and os.getppid() == watched:
            memory = resident_memory(watched)
            if memory is not None:
                samples += SAMPLE.pack(time.monotonic(), memory.anonymous, memory.file_backed)
            time.sleep(INTERVAL)
        with open(writing, "wb") as pipe:
            pipe.write(samples)
    finally:
        os._exit(0)  # none of the parent's cleaning is the child's
