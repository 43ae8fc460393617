"""What phones' own commands say, read into facts. The forms are those of Android's sources and of others' records.

The thermal service of a device under load is that of github.com/bryanroscoe/shield_optimizer/issues/6, shortened, with
a skin sensor as phones have; a HAL that isn't ready is that of MaheshSharan/FrameX-Android/issues/46.
"""

import pytest

from pocketlm.devices.android.facts import read_told

GETPROP = """[ro.build.fingerprint]: [google/panther/panther:14/UQ1A.240105.004/11206848:user/release-keys]
[ro.build.version.release]: [14]
[ro.product.cpu.abi]: [arm64-v8a]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 7]
[ro.soc.manufacturer]: [Google]
[ro.soc.model]: [GS201]
[persist.vendor.note]: [two
lines]
"""
CPUINFO = """processor\t: 0
BogoMIPS\t: 49.15
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp

processor\t: 1
BogoMIPS\t: 49.15
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp

Hardware\t: GS201
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Max charging current: 500000
  status: 2
  present: true
  level: 87
  scale: 100
  voltage: 4311
  temperature: 271
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 1
ThermalStatusListeners:
\tcallbacks: 2
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=36.0, mType=1, mName=GPU, mStatus=0}
\tTemperature{mValue=31.0, mType=3, mName=skin, mStatus=0}
HAL Ready: true
HAL connection:
\tThermalHAL 2.0 connected: yes
Current temperatures from HAL:
\tTemperature{mValue=66.5, mType=0, mName=CPU0, mStatus=0}
\tTemperature{mValue=42.25, mType=3, mName=skin, mStatus=2}
Current cooling devices from HAL:
\tCoolingDevice{mValue=3, mType=2, mName=thermal-cpufreq-0}
"""
TOLD = {
    "getprop": GETPROP,
    "machine": "aarch64\n",
    "cpuinfo": CPUINFO,
    "meminfo": "MemTotal:        7682784 kB\nMemFree:          221540 kB\n",
    "governors": "sched_pixel\nsched_pixel\n",
    "battery": BATTERY,
    "thermal": THERMAL,
}


def test_a_phone():
    found = read_told(TOLD)
    assert (found.abi, found.thermal_status) == ("arm64-v8a", 2)
    assert found.facts == {
        "manufacturer": "Google",
        "model": "Pixel 7",
        "system": "Android 14",
        "build": "google/panther/panther:14/UQ1A.240105.004/11206848:user/release-keys",
        "soc": "Google GS201",
        "abi": "arm64-v8a",
        "cores": 2,
        "features": "asimddp",
        "governor": "sched_pixel",
        "memory_bytes": 7682784 * 1024,
        "battery_percent": 87,
        "battery_celsius": 27.1,
        "charging_from": "USB",
        "thermal_status": 2,
        "skin_celsius": 42.25,
    }


@pytest.mark.parametrize(
    "texts",
    [
        {},
        dict.fromkeys(TOLD, ""),
        dict.fromkeys(TOLD, "\ufffd\0 garbage: \n: :\n[]: []\n"),
        dict.fromkeys(TOLD, "sh: not found: inaccessible or not found\n"),
        {"battery": "Can't find service: battery\n", "thermal": "Thermal Status: warm\nHAL Ready: false\n"},
    ],
    ids=("nothing", "empty", "garbage", "no such command", "no such service"),
)
def test_what_is_not_told_is_none_and_never_0(texts):
    found = read_told(texts)
    assert found.thermal_status is None
    values = {name: value for name, value in found.facts.items() if name not in ("abi", "governor")}
    assert set(values.values()) == {None}


@pytest.mark.parametrize(("powered", "expected"), [("AC", "AC"), ("Dock", "Dock"), (None, "nothing")])
def test_charging(powered, expected):
    lines = [f"  {name} powered: {str(name == powered).lower()}" for name in ("AC", "USB", "Wireless", "Dock")]
    assert read_told({"battery": "\n".join(lines)}).facts["charging_from"] == expected
