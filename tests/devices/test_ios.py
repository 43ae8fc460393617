"""iOS by recorded output: the tools are scripts here that answer as the real ones do. No device was ever attached.

The forms are those of other people's records: devicectl's in github.com/expo/expo/pull/48001 and, for a device before
iOS 17, tauri-apps/cargo-mobile2/pull/443; pymobiledevice3's is LockdownClient.short_info of doronz88/pymobiledevice3.
"""

import json
import sys
from pathlib import Path

import pytest

from pocketlm.artifact import Artifact
from pocketlm.devices import ios, open_device
from pocketlm.errors import InputError, UnavailableError
from pocketlm.job import Job, Measure

DEVICECTL = {
    "info": {"commandType": "devicectl.list.devices", "jsonVersion": 2, "outcome": "success", "version": "397.21"},
    "result": {
        "devices": [
            {
                "identifier": "3D048AED-F823-4530-A0E8-D1D1C16F9948",
                "connectionProperties": {
                    "pairingState": "paired",
                    "transportType": "wired",
                    "tunnelState": "connected",
                },
                "deviceProperties": {"name": "A phone", "osVersionNumber": "18.2", "osBuildUpdate": "22C152"},
                "hardwareProperties": {
                    "udid": "00008130-000C3DD901E0001C",
                    "marketingName": "iPhone 15 Pro Max",
                    "productType": "iPhone16,2",
                },
            },
            {  # unpaired, or older than iOS 17
                "identifier": "781BF0DD-0000-0000-0000-000000000000",
                "connectionProperties": {"pairingState": "unpaired", "tunnelState": "unavailable"},
                "deviceProperties": {"bootState": "booted"},
                "hardwareProperties": {},
            },
        ]
    },
}
OTHER = {
    "BuildVersion": "22C152",
    "ConnectionType": "USB",
    "DeviceClass": "iPhone",
    "DeviceName": "A phone",
    "Identifier": "00008130-000C3DD901E0001C",
    "ProductType": "iPhone16,2",
    "ProductVersion": "18.2",
    "UniqueDeviceID": "00008130-000C3DD901E0001C",
}
ARTIFACT = Artifact(Path("model.mlpackage"), {}, 64, 320, 16, 32, 8, {})


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """``tool("darwin", script)``: the platform's tool is this script of sh."""

    def install(platform, script):
        name = {"darwin": "xcrun", "linux": "pymobiledevice3"}[platform]
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def devicectl(answer):
    return (
        f'test "$*" = "devicectl list devices --json-output $5" || exit 64\ncat >"$5" <<END\n{json.dumps(answer)}\nEND'
    )


def pymobiledevice3(answer):
    return f'test "$*" = "usbmux list" || exit 64\ncat <<END\n{json.dumps(answer)}\nEND'


TOOLS = [
    ("darwin", devicectl(DEVICECTL), "iPhone 15 Pro Max", "wired"),
    ("linux", pymobiledevice3([OTHER, {**OTHER, "ConnectionType": "Network"}]), "iPhone16,2", "Network"),
]


@pytest.mark.parametrize(("platform", "script", "model", "connection"), TOOLS, ids=("devicectl", "pymobiledevice3"))
def test_a_device_tells_facts_and_runs_nothing(tool, tmp_path, platform, script, model, connection):
    tool(platform, script)
    (found,) = ios.find_devices()
    assert (found.address, found.state, found.description) == (
        "ios:00008130-000C3DD901E0001C",
        "not ready",
        f"{model} 18.2",
    )
    with open_device(found.address) as device:
        assert device.facts() == {
            "manufacturer": "Apple",
            "model": model,
            "system": "iOS 18.2",
            "build": "22C152",
            "connection": connection,
        }
        device.check_ready()
        with pytest.raises(UnavailableError, match="needs a signed app"):
            device.place(ARTIFACT)
        with pytest.raises(UnavailableError, match=r"coreml can't be run: .* signed app"):
            device.run(Job("coreml", ARTIFACT, Measure(8, 4)), tmp_path, limit=1)
        device.clean()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 7", "pymobiledevice3 failed: exit code 7"),
        ("echo Device is not connected >&2; exit 1", "pymobiledevice3 failed: Device is not connected"),
        ("echo '[{}]'", "of another form than is known: 'UniqueDeviceID'"),
        ("echo '{'", "of another form than is known"),
        ("exec sleep 60", "did not answer within 1.5 s"),
    ],
)
def test_a_tool_that_fails(tool, script, message):
    tool("linux", script)
    (found,) = ios.find_devices()
    assert (found.address, found.state) == ("ios:UDID", "not available")
    assert message in found.description


def test_without_a_tool_or_a_device(tool, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = ios.find_devices()
    assert (found.state, found.description) == ("not available", "pymobiledevice3 is not installed")
    assert "pymobiledevice3" in found.advice
    tool("linux", pymobiledevice3([]))
    (found,) = ios.find_devices()
    assert "unverified on hardware" in found.advice
    with pytest.raises(UnavailableError, match="ios:somewhere; rm -rf /: not attached; attached: none"):
        open_device("ios:somewhere; rm -rf /")
    with pytest.raises(InputError, match="which device"):
        open_device("ios:")
