"""Folders that are made once: each is whole or not there.

A part is made beside its place and renamed into it, with a record of what it was made from and of every file in it. So
an interrupted set-up goes on with the next part, and a damaged part is noticed and made again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["PartStore", "Recipe", "Record"]

RECORD = ".pocketlm-part.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a part is made. ``key`` tells everything that it is made from: a part of another key is made again, and so is
    one of whose ``needs`` another part is made.

    ``make`` fills an empty folder, and returns the versions of what it put there. ``tool``: only other parts' making
    needs it.
    """

    name: str
    key: str
    make: Callable[[Path], Mapping[str, str]]
    needs: tuple[str, ...] = ()
    tool: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """What a part is. ``contents``: name -> version and sha256; ``files``: name -> size in bytes and sha256, or a
    link's target."""

    key: str
    contents: Mapping[str, str]
    files: Mapping[str, str]


class PartStore:
    """A folder of parts. Whoever changes it holds its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Where the part is, or would be."""
        return self.folder / name

    def record(self, name: str) -> Record | None:
        """What was made; None if nothing was."""
        try:
            document: dict[str, Any] = json.loads((self.path(name) / RECORD).read_text(encoding="utf-8"))
            return Record(document["key"], document["contents"], document["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fault(self, recipe: Recipe, *, hashes: bool) -> str:
        """Why the part has to be made; empty if it is whole. Without ``hashes`` sizes are compared alone."""
        record, folder = self.record(recipe.name), self.path(recipe.name)
        if record is None:
            return "not set up"
        if record.key != recipe.key:
            return "of another version"
        for name, known in record.files.items():
            path = folder / name
            try:
                found = _description(path) if hashes else _size(path)
            except OSError:
                return f"damaged: {name} is missing"
            if found != (known if hashes else known.partition(" ")[0]):
                return f"damaged: {name} was altered"
        return ""

    def make(self, recipe: Recipe) -> None:
        """Make the part anew, in the place of what was there."""
        folder, partial = self.path(recipe.name), self.folder / f"{recipe.name}.partial"
        _remove(partial)
        partial.mkdir(parents=True)
        contents = recipe.make(partial)
        files = {path.relative_to(partial).as_posix(): _description(path) for path in _files(partial)}
        record = Record(recipe.key, dict(contents), files)
        (partial / RECORD).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
        _remove(folder)
        partial.rename(folder)

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the lock; ``waiting`` is called if another process has it."""
        import fcntl  # not on Windows

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        for name in sorted(names):
            yield Path(place, name)
        yield from (Path(place, name) for name in sorted(folders) if Path(place, name).is_symlink())


def _description(path: Path) -> str:
    if path.is_symlink():
        return f"->{path.readlink()}"
    with path.open("rb") as file:
        return f"{_size(path)} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _size(path: Path) -> str:
    return f"->{path.readlink()}" if path.is_symlink() else str(path.stat().st_size)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
