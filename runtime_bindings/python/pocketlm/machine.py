"""What this machine is, for whoever reads a figure that was measured on it."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

__all__ = ["FEATURES", "circumstances", "command_line", "machine_facts", "processor_seconds"]

# What decides which kernels the runtimes choose.
FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip


def machine_facts() -> dict[str, str]:
    """``system``, ``cpu``, ``cores`` that this process may use, ``features``: the CPU's, of those that matter, and
    ``governor``: of the cores' frequencies, where the system tells it."""
    facts = {"system": platform.system(), "cpu": platform.machine(), "cores": str(_cores())}
    if governors := _governors():
        facts["governor"] = governors
    known: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return facts
    for line in text.splitlines():
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())
    flags = set(f"{known.get('flags', '')} {known.get('Features', '')}".split())
    facts["cpu"] = known.get("model name") or facts["cpu"]
    facts["features"] = " ".join(feature for feature in FEATURES if feature in flags)
    return facts


def processor_seconds() -> float | None:
    """Seconds that all cores together were busy since the machine started; None where the system doesn't tell.

    Source: the first line of /proc/stat, proc(5): user, nice, system, then idle, iowait, then irq, softirq, steal.
    """
    try:
        counts = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    ticks = sum(int(count) for index, count in enumerate(counts) if index not in (3, 4))
    return ticks / os.sysconf("SC_CLK_TCK")


def command_line() -> str:
    """What this process was started with, as one would type it."""
    started = sys.orig_argv[1:] or [""]
    words = ["python", *started] if started[0] == "-m" else [Path(started[0]).name, *started[1:]]
    return shlex.join(words)


def circumstances() -> dict[str, Any]:
    """What a document of measurements begins with: ``date`` in UTC, the ``command`` that this process is, ``machine``,
    ``load_average`` (of one minute, other work included) and the version of ``pocketlm``."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command_line(),
        "machine": machine_facts(),
        "load_average": os.getloadavg()[0],
        "pocketlm": importlib.metadata.version("pocketlm"),
    }


def _governors() -> str:
    found = set()
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"):
        try:
            found.add(path.read_text(encoding="utf-8").strip())
        except OSError:  # not for us to read: the others may be
            continue
    return " ".join(sorted(found))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
