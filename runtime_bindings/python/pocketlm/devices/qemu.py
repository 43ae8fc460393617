"""An emulated arm64 CPU: ``qemu:arm64@cortex-a53``, ``@cortex-a76`` (the default) or ``@max``.

It tells whether an artifact is right on that CPU's kernels, and how many instructions they take: repeatable to the
instruction, and no time. Whatever a job reports of seconds and memory is the emulator's.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pocketlm
from pocketlm.agent import PROFILE_FILE
from pocketlm.artifact import Artifact
from pocketlm.devices.arm64_system.emulation import emulated_python, environment
from pocketlm.devices.arm64_system.profiles import DEFAULT_PROFILE, PROFILES
from pocketlm.devices.arm64_system.progress import Progress
from pocketlm.devices.arm64_system.set_up import Arm64System, find_system, obstacle, set_up
from pocketlm.devices.base import Device, Facts, Found, Outcome, State
from pocketlm.devices.local_agent import run_agent
from pocketlm.errors import InputError, UnavailableError
from pocketlm.job import Job, Measure

__all__ = ["ADDRESS", "EmulatedDevice", "find_devices", "open_device", "set_up_device"]

ADDRESS = "qemu:arm64"
COUNTS = "instructions"  # a file in a job's folder
COUNTED = re.compile(r"(\d+) (\d+) (\d+)")


class EmulatedDevice(Device):
    """Nothing is pushed: the emulated process sees this machine's files."""

    emulated = True

    def __init__(self, system: Arm64System, profile: str) -> None:
        super().__init__(f"{ADDRESS}@{profile}")
        self._system = system
        self._name = profile

    def facts(self) -> Facts:
        contents = self._system.contents()
        return {
            "system": f"Debian {contents['root']['suite']}, arm64",
            "cpu": f"{self._name}, emulated by QEMU {contents['emulator']['qemu-user'].partition(' ')[0]}",
            "cores": "1",
            "features": PROFILES[self._name].kernels,
        }

    def place(self, artifact: Artifact) -> Artifact:
        return replace(artifact, path=artifact.path.absolute())

    def run(self, job: Job, folder: Path, *, limit: float) -> Outcome:
        """As the contract says. Raises :class:`InputError` if instructions shall be counted of several threads."""
        windows = isinstance(job.work, Measure) and job.work.windows
        if windows and job.threads != 1:
            raise InputError(f"{self.address}: instructions are counted of one thread: --threads 1")
        parts, counts = self._system.folder, folder / COUNTS
        lines = run_agent(
            self.address,
            emulated_python(parts, self._name, COUNTS if windows else None),
            environment(parts, _agent_folder(parts)),
            job,
            folder,
            limit,
        )
        profile = folder / PROFILE_FILE
        return Outcome(
            lines,
            instructions=_read_counts(self.address, counts) if windows else None,
            profile=profile if profile.exists() else None,
        )


def open_device(place: str) -> EmulatedDevice:
    """The emulated CPU ``arm64@PROFILE``.

    Raises :class:`InputError` for another name, :class:`UnavailableError` if it isn't set up or is damaged.
    """
    profile = _profile(place)
    return EmulatedDevice(find_system(), profile)


def find_devices() -> Iterator[Found]:
    """Each profile if they are set up, else that they can be, or why not."""
    try:
        find_system()
    except UnavailableError as error:
        reason = obstacle()
        state: State = "not available" if reason else "can be set up"
        yield Found(ADDRESS, state, "emulated arm64: correctness, instructions", reason or str(error))
        return
    for name, profile in PROFILES.items():
        yield Found(f"{ADDRESS}@{name}", "ready", f"emulated arm64 with {profile.kernels}: correctness, instructions")


def set_up_device(place: str, progress: Progress, *, anew: bool = False) -> Mapping[str, Mapping[str, str]]:
    """Set ``arm64`` up, all profiles at once; what each of its parts then holds, name -> version.

    Raises :class:`InputError` for another name, and what :func:`pocketlm.devices.arm64_system.set_up.set_up` does.
    """
    _profile(place)
    return set_up(progress, anew=anew).contents()


def _profile(place: str) -> str:
    machine, _, profile = place.partition("@")
    if machine != "arm64" or (profile or DEFAULT_PROFILE) not in PROFILES or place.endswith("@"):
        valid = ", ".join(f"{ADDRESS}@{name}" for name in PROFILES)
        raise InputError(f"unknown device {f'qemu:{place}'!r:.80}; valid: {valid}")
    return profile or DEFAULT_PROFILE


def _agent_folder(parts: Path) -> Path:
    """A folder with this very PocketLM and nothing else of this machine's Python."""
    package = Path(pocketlm.__file__).parent
    folder = parts / "agents" / hashlib.sha256(str(package).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    # There from an earlier call it leads to the same place: the folder's name says to which.
    with suppress(FileExistsError):
        (folder / "pocketlm").symlink_to(package)
    return folder


def _read_counts(device: str, file: Path) -> dict[int, int]:
    counts: dict[int, int] = {}
    for line in file.read_text(encoding="ascii", errors="replace").splitlines():
        found = COUNTED.fullmatch(line)
        if found is None:
            raise UnavailableError(f"{device}: {file}: not a count of instructions: {line!r:.60}")
        window, instructions, threads = map(int, found.groups())
        if threads != 1:
            raise UnavailableError(f"{device}: {threads} threads ran while instructions were counted: no exact count")
        counts[window] = counts.get(window, 0) + instructions
    return counts
