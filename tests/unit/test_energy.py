"""Energy of a made-up powercap tree: packages are summed, counters wrap, and what can't be read is not 0."""

from pathlib import Path

import pytest

from pocketlm.energy import EnergyCounter

WRAP = 1_000_000


def zone(folder: Path, name: str, kind: str, energy: int) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(kind + "\n")
    (path / "max_energy_range_uj").write_text(f"{WRAP}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    return path / "energy_uj"


def test_packages_are_summed_and_a_counter_that_wrapped_went_on(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 999_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 50)
    zone(tmp_path, "intel-rapl:2", "psys", 70)
    counter = EnergyCounter.open(tmp_path)
    before = counter.read()
    assert before == (100, 999_000), "neither a part of a package nor the whole platform"
    first.write_text("300100\n")
    second.write_text("500\n")
    assert counter.joules(before, counter.read()) == pytest.approx((300_000 + WRAP + 1 - 999_000 + 500) / 1e6)
    assert counter.joules(before, before) == 0
    assert "rapl" in counter.method


def test_without_packages_there_is_no_counter(tmp_path):
    assert EnergyCounter.open(tmp_path) is None
    assert EnergyCounter.open(tmp_path / "nowhere") is None
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    assert EnergyCounter.open(tmp_path) is None


@pytest.mark.parametrize("damage", ["missing", "garbage", "folder"])
def test_one_package_that_can_not_be_read_leaves_none(tmp_path, damage):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    counter = zone(tmp_path, "intel-rapl:1", "package-1", 1)
    counter.unlink()
    if damage == "garbage":
        counter.write_text("many")
    elif damage == "folder":
        counter.mkdir()  # what only another user may read looks the same to root
    assert EnergyCounter.open(tmp_path) is None
