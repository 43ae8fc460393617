"""What an Android device tells of itself: its own commands' output into facts. Absent is None, never 0."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pocketlm.devices.base import Facts
from pocketlm.machine import FEATURES

__all__ = ["ARM64", "COMMANDS", "THERMAL_STATUS", "Told", "read_told"]

ARM64 = ("arm64-v8a", "aarch64")
# PowerManager.THERMAL_STATUS_NONE and so on
THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
SKIN = 3  # TemperatureType of android.hardware.thermal
# A service may hang: no longer than ten seconds.
COMMANDS: Mapping[str, str] = {
    "getprop": "getprop",
    "machine": "uname -m",
    "cpuinfo": "cat /proc/cpuinfo",
    "meminfo": "cat /proc/meminfo",
    "governors": "cat /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor",
    "battery": "timeout 10 dumpsys battery",
    "thermal": "timeout 10 dumpsys thermalservice",
}
PROPERTY = re.compile(r"^\[([^]]+)\]: \[(.*?)\]$", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^ *([^:\n]+): *(.*?) *$", re.MULTILINE)
TEMPERATURE = re.compile(r"Temperature\{mValue=([-\d.]+), mType=(-?\d+)")


@dataclass(frozen=True, slots=True)
class Told:
    """``abi``: the device's first, or the kernel's architecture if it isn't Android. ``thermal_status``: 0 for none up
    to 6, see :data:`THERMAL_STATUS`; None where there is no thermal service."""

    abi: str | None
    thermal_status: int | None
    facts: Facts


def read_told(said: Mapping[str, str]) -> Told:
    """The facts in what each of :data:`COMMANDS` said, by its name."""
    texts = {name: said.get(name, "") for name in COMMANDS}
    properties = dict(PROPERTY.findall(texts["getprop"]))
    processor, battery = _fields(texts["cpuinfo"]), _fields(texts["battery"])
    thermal_status = _whole(_fields(texts["thermal"]).get("Thermal Status"))
    features = processor.get("Features", "").split()
    abi = properties.get("ro.product.cpu.abi") or texts["machine"].strip() or None
    version = properties.get("ro.build.version.release")
    memory = _whole(_fields(texts["meminfo"]).get("MemTotal", "").removesuffix("kB"))
    tenths = _whole(battery.get("temperature"))
    return Told(
        abi=abi,
        thermal_status=thermal_status,
        facts={
            "manufacturer": properties.get("ro.product.manufacturer"),
            "model": properties.get("ro.product.model"),
            "system": f"Android {version}" if version else None,
            "build": properties.get("ro.build.fingerprint"),
            "soc": _joined(properties, "ro.soc.manufacturer", "ro.soc.model") or properties.get("ro.board.platform"),
            "abi": abi,
            "cores": len(re.findall(r"^processor\s*:", texts["cpuinfo"], re.MULTILINE)) or None,
            "features": " ".join(feature for feature in FEATURES if feature in features) if features else None,
            "governor": " ".join(sorted(set(texts["governors"].split()))) or None,
            "memory_bytes": None if memory is None else memory * 1024,
            "battery_percent": _whole(battery.get("level")),
            "battery_celsius": None if tenths is None else tenths / 10,
            "charging_from": _charging_from(battery),
            "thermal_status": thermal_status,
            "skin_celsius": _skin(texts["thermal"]),
        },
    )


def _fields(text: str) -> dict[str, str]:
    """The first value of each name in lines of the form ``name: value``."""
    fields: dict[str, str] = {}
    for name, value in FIELD.findall(text):
        fields.setdefault(name.strip(), value)
    return fields


def _whole(text: str | None) -> int | None:
    try:
        return int(text) if text else None
    except ValueError:
        return None


def _joined(properties: Mapping[str, str], *names: str) -> str | None:
    return " ".join(properties[name] for name in names if properties.get(name)) or None


def _charging_from(battery: Mapping[str, str]) -> str | None:
    """``AC``, ``USB``, several, or ``nothing``; None where no battery service answers."""
    said = {name.removesuffix(" powered"): value for name, value in battery.items() if name.endswith(" powered")}
    if not said:
        return None
    return " ".join(name for name, value in said.items() if value == "true") or "nothing"


def _skin(text: str) -> float | None:
    """What the HAL tells now, in degrees Celsius: before it the service repeats what it heard last."""
    current = text.rpartition("Current temperatures from HAL:")[2]
    values = [float(value) for value, kind in TEMPERATURE.findall(current) if int(kind) == SKIN]
    return max(values, default=None)
