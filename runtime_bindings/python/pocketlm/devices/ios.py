"""An iPhone or iPad: ``ios:UDID``, by ``xcrun devicectl`` on a Mac and by ``pymobiledevice3`` elsewhere.

Unverified on hardware: both are exercised with recorded output alone. A device is found and tells its facts. It runs
nothing: iOS runs what an app brings that its owner has signed, and PocketLM has no such app yet.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.artifact import Artifact
from pocketlm.devices.base import Device, Facts, Found, Outcome
from pocketlm.errors import InputError, UnavailableError
from pocketlm.job import Job

__all__ = ["AppleDevice", "find_devices", "open_device"]

LISTED_WITHIN = 1.5  # seconds
PATIENCE = 30.0
UNVERIFIED = "PocketLM's support of iOS is unverified on hardware"
NO_APP = "running there needs a signed app that holds the agent, and there is none yet"
ADVICE = {
    "darwin": "install Xcode 15 or newer",
    "linux": "pipx install pymobiledevice3",
}


@dataclass(frozen=True, slots=True)
class AppleDevice:
    """What a tool tells of a device; ``connection``: ``wired``, ``localNetwork``, ``USB``, ``Network`` or None."""

    udid: str
    name: str | None
    model: str | None
    system: str | None
    build: str | None
    connection: str | None


class Ios(Device):
    """Facts, and by name the refusal of all else."""

    def __init__(self, device: AppleDevice) -> None:
        super().__init__(f"ios:{device.udid}")
        self._device = device

    def facts(self) -> Facts:
        device = self._device
        return {
            "manufacturer": "Apple",
            "model": device.model,
            "system": f"iOS {device.system}" if device.system else None,
            "build": device.build,
            "connection": device.connection,
        }

    def runtimes(self) -> Sequence[str]:
        return ("coreml",)

    def place(self, artifact: Artifact) -> Artifact:
        raise UnavailableError(f"{self.address}: {artifact.path.name} can't be sent: {NO_APP}")

    def run(self, job: Job, folder: Path, *, limit: float) -> Outcome:  # noqa: ARG002
        raise UnavailableError(f"{self.address}: {job.runtime} can't be run: {NO_APP}")


def open_device(place: str) -> Ios:
    """The attached device whose UDID is ``place``."""
    if not place:
        raise InputError("ios: which device? ios:UDID; pocketlm devices lists them")
    devices = _attached(PATIENCE)
    for device in devices:
        if device.udid == place:
            return Ios(device)
    others = ", ".join(f"ios:{device.udid}" for device in devices) or "none"
    raise UnavailableError(f"ios:{place}: not attached; attached: {others}")


def find_devices() -> Iterator[Found]:
    """The attached ones: facts can be had, and no more."""
    try:
        devices = _attached(LISTED_WITHIN)
    except UnavailableError as error:
        yield Found("ios:UDID", "not available", str(error).removeprefix("ios: "), ADVICE.get(sys.platform, ""))
        return
    if not devices:
        yield Found("ios:UDID", "not available", "no iPhone or iPad is attached", UNVERIFIED)
    for device in devices:
        described = " ".join(text for text in (device.model or "an Apple device", device.system) if text)
        yield Found(f"ios:{device.udid}", "not ready", described, f"facts alone: {NO_APP}")


def _attached(limit: float) -> list[AppleDevice]:
    """Raises :class:`UnavailableError` if the tool isn't installed, fails, or answers something else than it did."""
    try:
        if sys.platform == "darwin":
            return _by_devicectl(limit)
        return _by_pymobiledevice3(limit)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnavailableError(f"ios: the tool's answer is of another form than is known: {error}") from error


def _by_devicectl(limit: float) -> list[AppleDevice]:
    """Its file is made for programs, what it prints isn't. Devices before iOS 17 have no hardware properties there."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "devices.json"
        _run(["xcrun", "devicectl", "list", "devices", "--json-output", str(answer)], limit)
        devices = json.loads(answer.read_bytes())["result"]["devices"]
    return [_of_devicectl(device) for device in devices if device["hardwareProperties"].get("udid")]


def _of_devicectl(device: Mapping[str, Any]) -> AppleDevice:
    hardware, properties = device["hardwareProperties"], device["deviceProperties"]
    return AppleDevice(
        udid=str(hardware["udid"]),
        name=properties.get("name"),
        model=hardware.get("marketingName") or hardware.get("productType"),
        system=properties.get("osVersionNumber"),
        build=properties.get("osBuildUpdate"),
        connection=device["connectionProperties"].get("transportType"),
    )


def _by_pymobiledevice3(limit: float) -> list[AppleDevice]:
    """A device that is attached by cable and by network is listed twice."""
    listed = json.loads(_run(["pymobiledevice3", "usbmux", "list"], limit))
    devices = {
        str(device["UniqueDeviceID"]): AppleDevice(
            udid=str(device["UniqueDeviceID"]),
            name=device.get("DeviceName"),
            model=device.get("ProductType"),
            system=device.get("ProductVersion"),
            build=device.get("BuildVersion"),
            connection=device.get("ConnectionType"),
        )
        for device in listed
    }
    return list(devices.values())


def _run(command: Sequence[str], limit: float) -> bytes:
    if shutil.which(command[0]) is None:
        raise UnavailableError(f"ios: {command[0]} is not installed")
    try:
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"ios: {command[0]} did not answer within {limit:g} s") from error
    if process.returncode:
        said = process.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        raise UnavailableError(f"ios: {command[0]} failed: {said or f'exit code {process.returncode}'}")
    return process.stdout
