"""Makes the emulated arm64 system in the user's cache: without root, and without running what the packages bring."""

import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from pocketlm.cache import cache_folder
from pocketlm.devices.arm64_system.debian import DebianRelease, debian_mirror
from pocketlm.devices.arm64_system.parts import PartStore, Recipe
from pocketlm.devices.arm64_system.progress import Progress
from pocketlm.devices.arm64_system.recipes import SUITE, recipes
from pocketlm.errors import UnavailableError

__all__ = ["Arm64System", "find_system", "obstacle", "set_up"]

NEEDED = 1 << 30  # bytes on disk while it is made: half of it stays
PROGRAMS = {"cc": "gcc", "make": "make"}


class Arm64System:
    """The parts of a system that is set up, as folders of this machine."""

    def __init__(self, store: PartStore) -> None:
        self.folder = store.folder
        self.root = store.path("root")
        """Debian's libraries and Python, with the names that they have on a device."""
        self.python = self.root / "usr/bin/python3.11"
        self.packages = (store.path("wheels"), store.path("native"))
        """The folders of Python packages: numpy, onnxruntime and executorch; the native ExecuTorch session."""
        self._store = store

    def contents(self) -> dict[str, Mapping[str, str]]:
        """What each part holds: name -> version and sha256. Raises :class:`UnavailableError` if one is gone."""
        found = {}
        for recipe in _recipes(self._store, Progress()):
            record = self._store.record(recipe.name)
            if record is None:
                raise UnavailableError(f"{self._store.path(recipe.name)}: not set up")
            found[recipe.name] = record.contents
        return found


def obstacle() -> str:
    """Why nothing can be set up on this machine; empty if it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"only on Linux on x86_64, not on {platform.system()} on {platform.machine()}"
    if ":" in str(_store().folder):  # which separates folders in the search paths of libraries and packages
        return f"not in {_store().folder}: a folder without a colon is needed, XDG_CACHE_HOME says which"
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    return f"needs {' and '.join(missing)}" if missing else ""


def find_system() -> Arm64System:
    """The system as it is. Raises :class:`UnavailableError` if it isn't set up, or a file of it is missing or short."""
    store = _store()
    for recipe in _recipes(store, Progress()):
        if not recipe.tool and (fault := store.fault(recipe, hashes=False)):
            raise UnavailableError(f"{store.path(recipe.name)}: {fault}: run 'pocketlm devices setup qemu:arm64'")
    return Arm64System(store)


def set_up(progress: Progress, *, anew: bool = False) -> Arm64System:
    """Make what isn't there, or isn't what was made; with ``anew`` all of it, from today's packages.

    About 160 MB come from Debian and PyPI. An interrupted call leaves whole parts alone, which the next one keeps.
    Raises :class:`UnavailableError` that names what can't be had, or what it is not.
    """
    if reason := obstacle():
        raise UnavailableError(f"qemu:arm64 can't be set up here: {reason}")
    store = _store()
    with store.locked(lambda: progress.stage("waiting for another process that sets it up", 0)):
        parts = _recipes(store, progress)
        wanted: list[Recipe] = []
        for recipe in parts:
            stale = any(other.name in recipe.needs for other in wanted)
            if anew or stale or store.fault(recipe, hashes=True):
                wanted.append(recipe)
        free = shutil.disk_usage(store.folder).free
        if wanted and free < NEEDED:
            raise UnavailableError(f"{store.folder}: {NEEDED >> 20} MB are needed, {free >> 20} MB are free")
        for recipe in wanted:
            store.make(recipe)
        shutil.rmtree(_downloads(store), ignore_errors=True)
    return Arm64System(store)


def _store() -> PartStore:
    return PartStore(cache_folder() / "devices" / "qemu-arm64")


def _recipes(store: PartStore, progress: Progress) -> list[Recipe]:
    return recipes(store, DebianRelease(debian_mirror(), SUITE, _downloads(store)), progress)


def _downloads(store: PartStore) -> Path:
    return store.folder / "downloads"
