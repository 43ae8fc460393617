"""The whole way to a device by what a phone has: the real adb, the real adbd, and the arm64 archive on an emulated CPU.

What is pretended is the kernel alone: qemu runs the programs, and ``uname`` says what it would on arm64.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from tests.devices.adb_server import end_processes_in, processes_in
from tests.devices.adbd import adbd_running

from pocketlm.devices import find_devices, open_device
from pocketlm.devices.adb import FOLDER_VARIABLE
from pocketlm.devices.arm64_system.emulation import emulated_python
from pocketlm.devices.arm64_system.set_up import Arm64System
from pocketlm.errors import UnavailableError
from pocketlm.job import ForcedTokens, Job, Replay
from pocketlm.replaying.replay import replay

CPU = "cortex-a76"


@pytest.fixture(scope="module")
def device(
    adb: Callable[..., str], arm64_system: Arm64System, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of an arm64 Linux behind adbd on loopback."""
    emulator = emulated_python(arm64_system.folder, CPU)[:-1]
    root = tmp_path_factory.mktemp("adbd")
    uname = root / "bin" / "uname"
    uname.parent.mkdir()
    uname.write_text("#!/bin/sh\necho aarch64\n")
    uname.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serial = f"127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch, adbd_running(root, port, emulator):
        patch.setenv(FOLDER_VARIABLE, str(root / "data" / "local tmp"))
        adb("connect", serial)
        adb("-s", serial, "wait-for-device")
        yield f"adb:{serial}"
        adb("disconnect", serial)
        assert not list(processes_in(root / "data")), "a job was left running"
    end_processes_in(root)


def test_it_is_found_and_tells_facts(device):
    assert device in [found.address for found in find_devices() if found.state == "ready"]
    with open_device(device) as opened:
        facts = opened.facts()
    assert facts["abi"] == "aarch64"
    assert facts["cores"] == os.cpu_count()
    assert facts["model"] is None, "no Android: what it doesn't tell is no text"
    assert "PyPI" in facts["runtimes"]


@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_the_demo_bundle_is_replayed(device, demo_bundle, runtime):
    result = replay(demo_bundle("int4"), devices=[device], runtimes=[runtime], threads=1, limit=400)
    assert not result.unavailable
    (run,) = result.runs
    assert run.passed, run.failures
    assert run.top1.agreement > 0.97
    assert (run.runtime.name, run.device.facts["abi"]) == (runtime, "aarch64")


def test_a_job_ends_at_its_limit_and_adbd_goes_on(device, demo_bundle, tmp_path):
    artifact = demo_bundle("int4").artifact("onnx")
    with open_device(device) as opened:
        placed = opened.place(artifact)
        job = Job("onnx", placed, Replay((ForcedTokens((1,), (2,) * 400),)), threads=1)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="did not end within 2 s"):
            opened.run(job, tmp_path, limit=2)
        assert time.monotonic() - began < 10
        assert opened.facts()["abi"] == "aarch64"
