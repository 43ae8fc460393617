"""The command that runs the emulated Python, and what its process sees of the machine."""

from collections.abc import Mapping
from pathlib import Path

from pocketlm.cache import cache_folder
from pocketlm.devices.arm64_system.profiles import PROFILES, Profile

__all__ = ["COUNTER_IN_ROOT", "emulated_python", "environment", "write_machine"]

COUNTER_IN_ROOT = "/pocketlm"  # the counter's folder as an emulated process sees it
# What runtimes and the agent read of the machine besides the CPU. The host's own would make a count depend on it: how
# many cores it has, how long the text is. Of memory nothing is told: it would be the emulator's.
MACHINE = {
    "proc/stat": "cpu  0 0 0 0 0 0 0 0 0 0\n",
    "proc/loadavg": "0.00 0.00 0.00 1/1 1\n",
    "proc/self/status": "Name:\tpython3.11\n",
    "sys/devices/system/cpu/online": "0\n",
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/present": "0\n",
    "sys/devices/system/cpu/kernel_max": "0\n",
}


def write_machine(profile: Profile, folder: Path) -> None:
    """Write into ``folder`` the files that a process on ``profile`` finds in place of the host's."""
    for name, text in {"proc/cpuinfo": profile.cpuinfo, **MACHINE}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def emulated_python(parts: Path, profile: str, counts: str | None = None) -> list[str]:
    """The interpreter on the CPU ``profile``, a command that takes an interpreter's arguments.

    ``parts``: the folder of all parts; ``counts``: the file that windows of instructions are written into, None for a
    process in which none are counted.
    """
    emulator = parts / "emulator"
    # By its own loader, with its own libraries: any Linux will do.
    command = [str(emulator / "lib64/ld-linux-x86-64.so.2"), "--library-path"]
    command += [":".join(str(emulator / place / "x86_64-linux-gnu") for place in ("lib", "usr/lib"))]
    command += [str(emulator / "usr/bin/qemu-aarch64"), "-cpu", PROFILES[profile].cpu]
    command += ["-L", str(parts / "profiles" / profile)]
    if counts is not None:
        # A comma ends an option's value unless it is doubled.
        counter, file = (name.replace(",", ",,") for name in (str(parts / "counter/instruction_counter.so"), counts))
        command += ["-plugin", f"{counter},out={file}", "-E", f"LD_PRELOAD={COUNTER_IN_ROOT}/emulated_clock.so"]
    return [*command, str(parts / "root/usr/bin/python3.11")]


def environment(parts: Path, *packages: Path) -> Mapping[str, str]:
    """All that the process has: this process's own would move its memory about. ``packages``: more folders of Python
    packages."""
    folders = (parts / "wheels", parts / "native", *packages)
    return {
        "PYTHONPATH": ":".join(map(str, folders)),
        # Compiled once, at set-up: a process that compiles takes other memory than one that finds it compiled.
        "PYTHONPYCACHEPREFIX": str(parts / "bytecode"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "XDG_CACHE_HOME": str(cache_folder().parent),  # where packed weights go
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }
