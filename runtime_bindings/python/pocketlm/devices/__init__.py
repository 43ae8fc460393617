"""Where a bundle can run: this host, an emulated CPU, a phone. A device's kind is a module of this package."""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from pocketlm.devices.arm64_system.progress import Progress
from pocketlm.devices.base import Device, Found
from pocketlm.errors import InputError

__all__ = ["KINDS", "find_devices", "open_device", "set_up_device"]

KINDS = ("host", "qemu", "adb", "ios")


def open_device(address: str) -> Device:
    """The device at ``address``: ``host``, ``qemu:arm64@cortex-a76``, ``adb:SERIAL`` or ``ios:UDID``.

    Raises :class:`InputError` for an address of no such form, :class:`UnavailableError` if the device isn't there.
    """
    kind, _, place = address.partition(":")
    if kind not in KINDS:
        raise InputError(f"unknown device {address!r:.80}; valid: host, qemu:arm64[@CPU], adb:SERIAL, ios:UDID")
    device: Device = _module(kind).open_device(place)
    return device


def find_devices() -> Iterator[Found]:
    """What is attached or set up, and what could be, in no more than two seconds each."""
    for kind in KINDS:
        yield from _module(kind).find_devices()


def set_up_device(address: str, progress: Progress, *, anew: bool = False) -> Mapping[str, Mapping[str, str]]:
    """Make the device at ``address``, all of it ``anew`` or what isn't there yet. What each part then holds:
    name -> version. Raises :class:`InputError` for a device that can't be made."""
    kind, _, place = address.partition(":")
    if kind not in KINDS or not hasattr(_module(kind), "set_up_device"):
        raise InputError(f"{address!r:.80} is not a device that can be set up; valid: qemu:arm64")
    made: Mapping[str, Mapping[str, str]] = _module(kind).set_up_device(place, progress, anew=anew)
    return made


def _module(kind: str) -> Any:
    return importlib.import_module(f"pocketlm.devices.{kind}")
