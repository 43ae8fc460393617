"""Makes the emulated arm64 system in the user's cache: without root, and without running what the packages bring."""

import platform
import shutil
import sys
from pathlib import Path

from pocketlm.cache import cache_folder
from pocketlm.devices.arm64_system.debian import DebianRelease, debian_mirror
from pocketlm.devices.arm64_system.parts import PartStore, Recipe, Record
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
        self.emulator = store.path("emulator")
        """What ``usr/bin/qemu-aarch64`` is and needs, its own loader too."""
        self.packages = (store.path("wheels"), store.path("native"))
        """The folders of Python packages: numpy, onnxruntime and executorch; the native ExecuTorch session."""
        self.counter = store.path("counter") / "instruction_counter.so"
        self.profiles = store.path("profiles")
        """A folder for each profile: the root as a process on that CPU sees it."""
        self._store = store

    def record(self, part: str) -> Record:
        """What the part of that name is. Raises :class:`UnavailableError` if it is gone."""
        record = self._store.record(part)
        if record is None:
            raise UnavailableError(f"{self._store.path(part)}: not set up")
        return record

    def records(self) -> dict[str, Record]:
        """All parts."""
        return {recipe.name: self.record(recipe.name) for recipe in _recipes(self._store, Progress())}


def obstacle() -> str:
    """Why nothing can be set up on this machine; empty if it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"only on Linux on x86_64, not on {platform.system()} on {platform.machine()}"
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    return f"needs {' and '.join(missing)}" if missing else ""


def find_system() -> Arm64System:
    """The system as it is. Raises :class:`UnavailableError` if it isn't set up, or a file of it is missing or short."""
    store = _store()
    for recipe in _recipes(store, Progress()):
        if fault := store.fault(recipe, hashes=False):
            raise UnavailableError(f"{store.path(recipe.name)}: {fault}: run 'pocketlm devices setup qemu:arm64'")
    return Arm64System(store)


def set_up(progress: Progress, *, anew: bool = False) -> Arm64System:
    """Make what isn't there, or isn't what was made; with ``anew`` all of it, from today's packages.

    About 120 MB come from Debian and PyPI. An interrupted call leaves whole parts alone, which the next one keeps.
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
