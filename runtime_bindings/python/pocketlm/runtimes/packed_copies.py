"""Weights as this machine's kernels want them, in files of the user's cache that a runtime maps.

A runtime that packs at load keeps the weights once more in anonymous memory, which the system can't drop; from a file
it can. A copy is a folder ``packed/MODEL-MACHINE``. The first half of its name stands for the content of the model's
files, the second for the runtime's version and the CPU. It serves only its own machine, is made there when first asked
for, and can be deleted at any time.

What was written is known by a record of each file's size, inode and times. Every write moves the time of change, which
no program can set back, so a copy that was cut, edited or brought from elsewhere is made again. Its content is not
hashed at each load, which would read all of it: a disk that returns other bytes than were written goes unnoticed.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.artifact import ArtifactFile
from pocketlm.cache import cache_folder
from pocketlm.errors import InputError
from pocketlm.machine import machine_facts
from pocketlm.strict_json import parse_object

__all__ = ["LIMIT", "Recipe", "packed_copy", "packed_folder", "unwritable"]

LIMIT = 16 << 30  # bytes of all copies; the least recently used go first
FORMAT = "1"  # of the record
RECORD_FILE = "packed.json"
UNFINISHED = ".new."


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one copy is made.

    ``model``: the model's own files by name, which were checked. ``runtime``: the packages that pack, and their
    versions. ``files``: what the copy consists of, in its folder. ``needed_space``: what has to be free to begin, times
    the size of the model's files. ``make`` writes the files into an empty folder.
    """

    model: Mapping[str, ArtifactFile]
    runtime: Mapping[str, str]
    files: tuple[str, ...]
    needed_space: float
    make: Callable[[Path], None]

    def identity(self) -> dict[str, dict[str, str]]:
        """What the copy stands for: it is of no use to any other model or machine."""
        facts = machine_facts()
        return {
            "model": {name: record.sha256 for name, record in sorted(self.model.items())},
            "machine": {
                "format": FORMAT,
                **self.runtime,
                "architecture": platform.machine(),
                "cpu": facts["cpu"],
                "features": facts.get("features", ""),
            },
        }

    def bytes_needed(self) -> int:
        """Free bytes of the disk without which nothing is written."""
        return int(self.needed_space * sum(record.size for record in self.model.values()))


def packed_folder() -> Path:
    """Where the copies lie: ``packed`` in :func:`pocketlm.cache.cache_folder`."""
    return cache_folder() / "packed"


@contextmanager
def packed_copy(recipe: Recipe) -> Iterator[Path]:
    """The folder of the copy, which is made if there is none; no process removes it meanwhile.

    Raises :class:`InputError` if the cache can't be written or has too little space, and what ``recipe.make`` raises.
    """
    root = packed_folder()
    identity = recipe.identity()
    folder = root / f"{_digest(identity['model'])}-{_digest(identity['machine'])}"
    with _lock(root, fcntl.LOCK_SH):
        if _is_whole(folder, recipe, identity):
            with suppress(OSError):  # a cache that is only read
                os.utime(folder)  # when it was last used
            yield folder
            return
    with _lock(root, fcntl.LOCK_EX):
        if not _is_whole(folder, recipe, identity):  # another process may have made it meanwhile
            _make(folder, recipe, identity)
            _clean(folder)
        yield folder


def unwritable(root: Path, reason: object) -> InputError:
    """The error of a cache ``root`` that can't hold a copy."""
    return InputError(f"{root}: packed weights can't be written: {reason}")


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def _lock(root: Path, kind: int) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise unwritable(root, error.strerror or error) from error
    try:
        fcntl.flock(file, kind)
        yield
    finally:
        os.close(file)


def _is_whole(folder: Path, recipe: Recipe, identity: Mapping[str, Any]) -> bool:
    try:
        return parse_object((folder / RECORD_FILE).read_bytes()) == _record(folder, recipe, identity)
    except (OSError, ValueError):
        return False


def _record(folder: Path, recipe: Recipe, identity: Mapping[str, Any]) -> dict[str, Any]:
    states = {}
    for name in recipe.files:
        status = (folder / name).stat()
        states[name] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    return {**identity, "files": states}


def _make(folder: Path, recipe: Recipe, identity: Mapping[str, Any]) -> None:
    """Write a copy beside its place, and move it there when all of it is on the disk."""
    root = folder.parent
    scratch: Path | None = None
    try:
        for path in root.glob(f"{UNFINISHED}*"):  # of processes that were killed: who writes has the lock
            shutil.rmtree(path, ignore_errors=True)
        _clean_damaged(folder)
        _check_space(root, recipe.bytes_needed())
        scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=root))
        recipe.make(scratch)
        for name in recipe.files:
            _flush(scratch / name)
        record = scratch / RECORD_FILE
        record.write_text(json.dumps(_record(scratch, recipe, identity), indent=1), encoding="utf-8")
        _flush(record)
        scratch.rename(folder)
    except OSError as error:
        raise unwritable(root, error.strerror or error) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _clean_damaged(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        raise InputError(
            f"{root}: {free >> 20} MB free, but packed weights may need {needed >> 20} MB: free some, set "
            "XDG_CACHE_HOME to a larger disk, or open the session without packed"
        )


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _clean(made: Path) -> None:
    """Remove what ``made`` replaces, for another runtime or CPU, and the least recently used beyond :data:`LIMIT`."""
    model = made.name.split("-")[0]
    kept = 0
    copies = [path for path in made.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(copies, key=lambda path: (path == made, path.stat().st_mtime_ns), reverse=True):
        size = sum(file.stat().st_size for file in path.iterdir())
        if path != made and (path.name.split("-")[0] == model or kept + size > LIMIT):
            shutil.rmtree(path, ignore_errors=True)
        else:
            kept += size
