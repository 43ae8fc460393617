"""Energy as the processor's own counters tell it. Standard library only: the agent reads it on the device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["EnergyCounter"]

POWERCAP = Path("/sys/class/powercap")
METHOD = "rapl: all processor packages, whatever else ran on them"


@dataclass(frozen=True, slots=True)
class _Zone:
    """One package's counter, in microjoules: it counts up to ``wrap`` and begins again at 0."""

    counter: Path
    wrap: int


class EnergyCounter:
    """Linux's RAPL zones of whole packages.

    Source: Documentation/power/powercap/powercap.rst: ``energy_uj`` and ``max_energy_range_uj``. A counter wraps about
    once an hour; of two readings that are further apart nobody can tell how often it did.
    """

    def __init__(self, zones: tuple[_Zone, ...]) -> None:
        self._zones = zones

    @classmethod
    def open(cls, folder: Path = POWERCAP) -> Self | None:
        """All packages of this machine; None if there is none, or one of them is not for us to read."""
        zones = []
        for zone in sorted(folder.glob("intel-rapl:*")):
            if zone.name.count(":") != 1:  # a part of a package
                continue
            try:
                if not (zone / "name").read_text(encoding="ascii").startswith("package"):
                    continue
                wrap = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
                int((zone / "energy_uj").read_text(encoding="ascii"))
            except (OSError, ValueError):
                return None
            zones.append(_Zone(zone / "energy_uj", wrap))
        return cls(tuple(zones)) if zones else None

    @property
    def method(self) -> str:
        """What counts, in words."""
        return METHOD

    def read(self) -> tuple[int, ...]:
        """Microjoules of each package, for :meth:`joules`."""
        return tuple(int(zone.counter.read_text(encoding="ascii")) for zone in self._zones)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Spent between two readings, each counter having wrapped at most once."""
        spent = 0
        for zone, first, last in zip(self._zones, before, after, strict=True):
            spent += last - first if last >= first else last - first + zone.wrap + 1
        return spent / 1e6
