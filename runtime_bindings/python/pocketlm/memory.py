"""Resident memory of a process, what only it can hold apart from what the kernel can drop and read again."""

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MemoryPeak", "ResidentMemory", "resident_memory", "untouched_zeros"]


@dataclass(frozen=True, slots=True)
class ResidentMemory:
    """Bytes. ``anonymous`` is heap and stacks; ``file_backed`` are mapped files, libraries and those on a tmpfs among
    them; ``highest`` is the most that both together ever were, by the kernel's own count."""

    anonymous: int
    file_backed: int
    highest: int

    @property
    def resident(self) -> int:
        """Both together."""
        return self.anonymous + self.file_backed


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """Bytes; each is the highest of its own, and they need not have occurred at one moment."""

    resident: int
    anonymous: int
    file_backed: int


def untouched_zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros that take memory where they are written, page by page: numpy's own ask for pages of 2 MB."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size == 0 or sys.platform == "win32":
        return np.zeros(shape, kind)
    return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), kind).reshape(shape)


def resident_memory(process: int | None = None) -> ResidentMemory | None:
    """Of ``process``, by default this one; None where the system doesn't tell them apart, or the process is gone.

    Source: VmHWM, RssAnon, RssFile and RssShmem of Linux's /proc/PID/status, proc(5).
    """
    try:
        text = Path(f"/proc/{'self' if process is None else process}/status").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines())
    if "RssAnon" not in fields:  # ended, but not yet waited for
        return None
    anonymous, file, shared, highest = (
        1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem", "VmHWM")
    )
    return ResidentMemory(anonymous, file + shared, highest)
