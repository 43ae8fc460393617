"""``pocketlm devices``: in a home where nothing is set up, what could be; a set-up that fails leaves nothing."""

import json
import subprocess
from pathlib import Path

from tests.cli.conftest import PROGRAM
from tests.cli.test_export import refused


def test_the_host_is_listed_and_what_can_be_set_up(pocketlm):
    process = pocketlm("devices", "--json")
    assert process.returncode == 0, process.stderr
    found = {device["address"]: device for device in json.loads(process.stdout)["devices"]}
    assert found["host"]["state"] == "ready"
    assert found["qemu:arm64"]["state"] == "can be set up"
    assert found["qemu:arm64"]["advice"].endswith("not set up: run 'pocketlm devices setup qemu:arm64'")
    text = pocketlm("devices").stdout
    assert all(address in text for address in found)


def test_only_the_emulated_device_can_be_set_up(pocketlm):
    refused(pocketlm("devices", "setup", "host"), "'host' is not a device that can be set up", "qemu:arm64")
    refused(pocketlm("devices", "setup", "qemu:mips"), "unknown device 'qemu:mips'", "qemu:arm64@max")


def test_a_device_is_cleaned_or_is_not_there(pocketlm):
    process = pocketlm("devices", "clean", "host")
    assert (process.returncode, process.stderr.strip()) == (0, "host holds nothing of PocketLM")
    process = pocketlm("devices", "clean", "adb:no such device")
    assert process.returncode == 3
    assert "adb:no such device: not attached; attached: " in process.stderr


def test_a_set_up_without_its_mirror_says_so_and_leaves_nothing_half_made(environment, tmp_path):
    changed = {"XDG_CACHE_HOME": str(tmp_path), "POCKETLM_DEBIAN_MIRROR": (tmp_path / "no-mirror").as_uri()}
    process = subprocess.run(
        [*PROGRAM, "devices", "setup", "qemu:arm64"],
        capture_output=True, text=True, env={**environment, **changed}, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 3
    (line,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert "no-mirror" in line
    folder = Path(tmp_path, "pocketlm", "devices", "qemu-arm64")
    assert {path.name for path in folder.iterdir()} <= {"lock", "downloads", "root.partial"}
