"""Android devices for the tests: the real adb, its server on a port of its own, and devices that pretend."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adbutils
import pytest
from tests.devices.adb_server import DeviceServer, end_processes_in
from tests.devices.host_archive import host_archive

from pocketlm.devices.adb import AdbDevice
from pocketlm.devices.arm64_system.progress import Progress
from pocketlm.devices.arm64_system.set_up import Arm64System, set_up

ANSWERS = {  # what a phone's commands say
    "uname": "echo aarch64",
    "getprop": "printf '[ro.product.cpu.abi]: [arm64-v8a]\\n[ro.product.model]: [Pretended Phone]\\n'",
    "dumpsys": 'test "$1" = thermalservice && echo "Thermal Status: 0"',
}


@pytest.fixture(scope="session")
def arm64_system() -> Arm64System:
    """The user's own, set up if it isn't: from the registries, in half a minute, by one of the tests' processes."""
    return set_up(Progress())


@pytest.fixture(scope="session")
def adb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """``adb("connect", "HOST:PORT")`` -> what it says. Its server is these tests' own, and ends with them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        patch.setenv("ANDROID_USER_HOME", str(tmp_path_factory.mktemp("android")))  # where it keeps its key
        patch.setenv("ADB_LIBUSB", "0")
        patch.setenv("ADB_MDNS", "0")
        patch.setenv("ADB_LOCAL_TRANSPORT_MAX_PORT", "0")  # no look for emulators

        def call(*words: str) -> str:
            command = [adbutils.adb_path(), *words]
            return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout

        call("start-server")
        yield call
        call("kill-server")


@dataclass
class Phone:
    """A device that pretends, attached. ``folder``: what it calls its own."""

    server: DeviceServer
    root: Path
    adb: Callable[..., str]

    @property
    def serial(self) -> str:
        return self.server.serial

    @property
    def folder(self) -> Path:
        return self.root / "pocketlm"

    def answers(self, command: str, script: str) -> None:
        path = self.root / "bin" / command
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def connect(self) -> None:
        """As whoever lost it does: adb itself would try again only after a while."""
        self.adb("disconnect", self.serial)
        self.adb("connect", self.serial)
        if not self.server.unauthorized:
            self.adb("-s", self.serial, "wait-for-device")

    def open(self, *, before: str = "", **options: Any) -> AdbDevice:
        """``before``: what the script does that starts the agent."""
        archive = host_archive(self.root / "archives", before)
        return AdbDevice(
            self.serial, **{"folder": str(self.folder), "archive": lambda: archive, "patience": 10, **options}
        )


@pytest.fixture
def phone(adb: Callable[..., str], tmp_path: Path) -> Iterator[Callable[..., Phone]]:
    """``phone(model="A", root="odd name")`` -> one that is attached, and leaves nothing running."""
    with ExitStack() as stack:

        def attach(root: str = "phone", variables: Mapping[str, str] = {}, **options: Any) -> Phone:
            folder = tmp_path / root
            (folder / "bin").mkdir(parents=True)
            stack.callback(end_processes_in, folder)
            environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
            server = stack.enter_context(closing(DeviceServer(environment, **options)))
            attached = Phone(server, folder, adb)
            for command, script in ANSWERS.items():
                attached.answers(command, script)
            attached.connect()
            stack.callback(adb, "disconnect", attached.serial)
            return attached

        yield attach
