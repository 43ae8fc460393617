"""A command run to its end in a process of its own, whose memory and CPU time are measured from outside."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketlm.memory import MemoryPeak, ResidentMemory, resident_memory

__all__ = ["MemoryPeak", "WatchedRun", "run_watched"]

INTERVAL = 0.02  # seconds between samples; one costs about 0.1 ms of another core
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage(2)


@dataclass(frozen=True, slots=True)
class WatchedRun:
    """What became of the process. Moments are ``time.monotonic()``, which all processes of a machine share.

    CPU seconds are those of its descendants too; memory is the process's own. ``samples`` are empty where the system
    doesn't split memory; ``highest_resident``, in bytes, is the kernel's count as of the last sample: it misses nothing
    between two.
    """

    exit_code: int
    output: str
    errors: str
    started: float
    ended: float
    user_seconds: float
    system_seconds: float
    highest_resident: int
    samples: tuple[tuple[float, ResidentMemory], ...]

    @property
    def wall_seconds(self) -> float:
        """From before the process was started until it had ended."""
        return self.ended - self.started

    def peak(self, start: float | None = None, stop: float | None = None) -> MemoryPeak | None:
        """The peak between two moments, by default of the whole run; None if no sample lies there."""
        first, last = self.started if start is None else start, self.ended if stop is None else stop
        found = [memory for moment, memory in self.samples if first <= moment <= last]
        if not found:
            return None
        whole = start is None and stop is None
        return MemoryPeak(
            resident=self.highest_resident if whole else max(memory.resident for memory in found),
            anonymous=max(memory.anonymous for memory in found),
            file_backed=max(memory.file_backed for memory in found),
        )


def run_watched(command: Sequence[str], environment: Mapping[str, str] | None = None) -> WatchedRun:
    """Run ``command`` without input. ``environment`` None is this process's own. An exception here ends the process."""
    samples: list[tuple[float, ResidentMemory]] = []
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment and dict(environment)
        )
        end = _End(process)
        try:
            while not end.happened.wait(INTERVAL):
                memory = resident_memory(process.pid)
                if memory is not None:
                    samples.append((time.monotonic(), memory))
        finally:
            if not end.happened.is_set():
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid, signal.SIGKILL)
                end.happened.wait()
        output.seek(0)
        errors.seek(0)
        usage = end.usage
        return WatchedRun(
            exit_code=end.exit_code,
            output=output.read().decode(errors="replace"),
            errors=errors.read().decode(errors="replace"),
            started=started,
            ended=end.moment,
            user_seconds=usage.ru_utime,
            system_seconds=usage.ru_stime,
            # ru_maxrss is the second choice: it begins with what this process held when it started the other.
            highest_resident=max(
                (max(memory.highest, memory.resident) for _, memory in samples), default=usage.ru_maxrss * MAXRSS_UNIT
            ),
            samples=tuple(samples),
        )


class _End(threading.Thread):
    """Waits for the process, so that its end is noted when it happens and its resource usage is kept."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        super().__init__(daemon=True)
        self._process = process
        self.happened = threading.Event()  # a join that is interrupted takes the thread for ended (Python 3.11)
        self.start()

    def run(self) -> None:
        _, status, self.usage = os.wait4(self._process.pid, 0)
        self.moment = time.monotonic()
        self.exit_code = os.waitstatus_to_exitcode(status)
        self._process.returncode = self.exit_code  # it was waited for here
        self.happened.set()
