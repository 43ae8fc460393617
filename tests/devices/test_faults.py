"""Whatever goes wrong with a device: one short error, nothing half written, nothing left running, and then it works."""

import json
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.devices.adb_server import Fault, processes_in
from tests.devices.debian_files import unpacked_packages

from pocketlm.devices import find_devices, open_device
from pocketlm.devices.adb import AdbDevice
from pocketlm.devices.base import Outcome
from pocketlm.errors import BundleError, InputError, PocketLMError, UnavailableError
from pocketlm.job import ForcedTokens, Job, Replay

LIMIT = 3.0  # seconds of the jobs here, most of which take half of one


@pytest.fixture(scope="module")
def artifact(tiny_bundle: Callable):
    return tiny_bundle("llama", "int4", "onnx").artifact("onnx")


def replayed(device: AdbDevice, artifact: Any, folder: Path, limit: float = 60.0) -> Outcome:
    folder.mkdir()
    placed = device.place(artifact)
    return device.run(Job("onnx", placed, Replay((ForcedTokens((1, 2), (3, 4)),)), threads=1), folder, limit=limit)


def answers(*lines: dict[str, Any], exit_code: int = 0) -> str:
    """A script that answers in the agent's place."""
    text = "".join(json.dumps(line) + "\\n" for line in lines)
    return f"printf '{text}' >result.jsonl; exit {exit_code}"


@dataclass(frozen=True)
class Row:
    """``faults``: of the device's server; ``before``: what its script does before the agent starts, if it does."""

    name: str
    expected: str
    faults: tuple[Fault, ...] = ()
    before: str = ""
    error: type[PocketLMError] = UnavailableError
    options: dict[str, Any] = field(default_factory=dict)


BEGIN, END = {"kind": "begin", "format_version": "1.0"}, {"kind": "end"}
ROWS = [
    Row("disconnected in a push", "", (Fault("push", "disconnect", "sessions"),)),
    Row("disconnected in a run", "", (Fault("shell", "disconnect", "result.jsonl"),), before="sleep 60"),
    Row("disconnected in a pull", "", (Fault("pull", "disconnect", "result.jsonl"),)),
    Row("disconnected in a command", "", (Fault("shell", "disconnect", "mkdir"),)),
    Row("full in a push", "No space left on device", (Fault("push", "full", "sessions"),)),
    Row("full in a run", "no exit code arrived", (Fault("shell", "full", "result.jsonl"),)),
    Row("garbage in a run", "", (Fault("shell", "garbage", "result.jsonl"),)),
    Row("garbage in a pull", "", (Fault("pull", "garbage", "result.jsonl"),)),
    Row("hangs in a push", "no answer within 2 s", (Fault("push", "hang", "sessions"),), options={"patience": 2}),
    Row("hangs in a run", "no answer within 5 s", (Fault("shell", "hang", "result.jsonl"),), options={"patience": 2}),
    Row("hangs in a pull", "no answer within 2 s", (Fault("pull", "hang", "result.jsonl"),), options={"patience": 2}),
    Row("an agent that hangs", "the agent did not end within 3 s", before="sleep 60"),
    Row("an agent that is killed", "the agent ended with exit code 137", before="kill -9 $$"),
    Row("an agent that fails", "the agent ended with exit code 7: out of luck", before="echo out of luck >&2; exit 7"),
    Row("a whole answer, but exit code 5", "ended with exit code 5", before=answers(BEGIN, END, exit_code=5)),
    Row("an answer that is garbage", "line 1 of the result is not JSON", before="echo no >result.jsonl; exit"),
    Row("an answer of no known kind", "line 1 of the result is of no known kind", before=answers({"kind": "?"})),
    Row("an answer cut off", "the agent ended with exit code 0, and said nothing", before=answers(BEGIN)),
    Row(
        "an agent of another version",
        "an agent of another version answered: '2.0', not 1.x",
        before=answers({**BEGIN, "format_version": "2.0"}, END),
    ),
    Row(
        "a job of another version",
        "job: 'format_version' is '9.0'; this agent reads 1.x",
        before='sed -i \'s/"1.0"/"9.0"/\' job.json',
        error=InputError,
    ),
    Row("a malformed job", "not a job", before="echo '{' >job.json", error=InputError),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_fault(row: Row, phone: Callable, artifact, tmp_path: Path) -> None:
    attached = phone()
    with attached.open(before=row.before, **row.options) as device:
        attached.server.faults += row.faults
        with pytest.raises(PocketLMError) as caught:
            replayed(device, artifact, tmp_path / "failed", LIMIT)
    assert isinstance(caught.value, row.error)
    assert caught.value.exit_code == (3 if row.error is UnavailableError else 2)
    message = str(caught.value)
    assert message.startswith(f"adb:{attached.serial}: ")
    assert row.expected in message
    assert len(message) < 250
    assert not attached.server.faults
    _left_alone(tmp_path / "failed")

    attached.connect()
    with attached.open(before=answers(BEGIN, END)) as device:
        assert replayed(device, artifact, tmp_path / "next").lines == (BEGIN,)
    deadline = time.monotonic() + LIMIT + 2
    while left := list(processes_in(attached.root)):
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.1)


def _left_alone(folder: Path) -> None:
    """What looks like a result is whole: it was pulled, and judged."""
    names = {path.name for path in folder.iterdir()}
    assert names <= {"job.json", "job"}


def test_the_same_device_goes_on_after_a_broken_run(phone, artifact, tmp_path):
    attached = phone()
    with attached.open(before='test -e "$HOME/../../once" || { touch "$HOME/../../once"; sleep 60; }') as device:
        attached.server.faults.append(Fault("shell", "disconnect", "result.jsonl"))
        with pytest.raises(UnavailableError):
            replayed(device, artifact, tmp_path / "failed")
        assert list(processes_in(attached.root)), "no job was left: this test shows nothing"
        attached.connect()
        assert replayed(device, artifact, tmp_path / "next").of_kind("sequence")
        assert not list(processes_in(attached.root))


def test_a_file_altered_on_the_device_is_noticed_and_sent_again(phone, artifact, tmp_path):
    attached = phone()
    with attached.open() as device:
        device.place(artifact)
        weights = attached.folder / "files" / artifact.files["model.onnx.data"].sha256
        weights.write_bytes(bytes(weights.stat().st_size))
        with pytest.raises(BundleError, match=r"model\.onnx\.data: its content is not what the job says"):
            replayed(device, artifact, tmp_path / "failed")
        assert replayed(device, artifact, tmp_path / "next").of_kind("sequence")


def test_an_artifact_that_is_gone_here(phone, artifact, tmp_path):
    with phone().open() as device, pytest.raises(InputError, match=r"nowhere/genai_config\.json: can't be read"):
        device.place(replace(artifact, path=tmp_path / "nowhere" / "model.onnx"))


def test_what_is_there_is_not_sent_again(phone, artifact, tmp_path):
    attached = phone()
    with attached.open() as device:
        replayed(device, artifact, tmp_path / "first")
    sent = [line for line in attached.server.log if line.startswith("push")]
    assert len(sent) == len(artifact.files) + 2  # the agent, and the job
    attached.server.log.clear()
    with attached.open() as device:
        replayed(device, artifact, tmp_path / "second")
    assert len([line for line in attached.server.log if line.startswith("push")]) == 1  # the job


def test_clean_removes_what_was_pushed(phone, artifact, tmp_path):
    attached = phone()
    with attached.open() as device:
        replayed(device, artifact, tmp_path / "first")
        device.clean()
        assert not attached.folder.exists()
        assert replayed(device, artifact, tmp_path / "second").of_kind("sequence")


def test_a_folder_that_cannot_be_written(phone):
    with pytest.raises(UnavailableError, match=r"/proc/pocketlm.* can't be written"):
        phone().open(folder="/proc/pocketlm")


def test_a_device_that_is_not_arm64(phone):
    attached = phone()
    attached.answers("getprop", "echo '[ro.product.cpu.abi]: [armeabi-v7a]'")
    with pytest.raises(UnavailableError, match="its ABI is armeabi-v7a; the agent runs on arm64-v8a"):
        attached.open()


def test_unauthorized(phone):
    attached = phone(unauthorized=True)
    while (found := _found(attached)).description.endswith("authorizing"):  # while adb tries its keys
        time.sleep(0.1)
    assert (found.state, found.description) == ("not ready", "an Android device: unauthorized")
    with pytest.raises(UnavailableError, match=r"authoriz.*: allow this computer in the dialog"):
        open_device(f"adb:{attached.serial}")


def test_a_device_that_vanishes(phone, adb):
    attached, other = phone(), phone("other")
    assert _found(attached).state == "ready"
    adb("disconnect", attached.serial)
    with pytest.raises(UnavailableError, match=f"adb:{attached.serial}: not attached; attached: adb:{other.serial}"):
        open_device(f"adb:{attached.serial}")


def test_a_device_that_vanishes_while_it_is_open(phone, adb, artifact):
    attached = phone()
    with attached.open() as device:
        adb("disconnect", attached.serial)
        with pytest.raises(UnavailableError, match="not found"):
            device.place(artifact)


def test_looking_for_devices_leaves_no_server_behind(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    monkeypatch.setenv("ANDROID_USER_HOME", str(tmp_path))
    found = [found for found in find_devices() if found.address.startswith("adb:")]
    assert [(device.address, device.description) for device in found] == [
        ("adb:SERIAL", "no Android device is attached")
    ]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


@pytest.fixture
def android(phone):
    """A phone whose shell is Android's mksh, and whose commands are toybox's: the PATH holds no others."""
    files = unpacked_packages("toybox", {"bookworm": ["toybox", "mksh"]})
    toybox, mksh = files / "bin" / "toybox", files / "bin" / "mksh"
    attached = phone(shell=str(mksh))
    folder = attached.root / "bin"
    attached.server.environment = {**attached.server.environment, "PATH": str(folder)}
    (folder / "sh").symlink_to(mksh)
    for name in subprocess.run([toybox], capture_output=True, text=True, check=True).stdout.split():
        if not (folder / name).exists():
            (folder / name).symlink_to(toybox)
    return attached


def test_androids_own_shell_and_commands_do(android, artifact, tmp_path):
    with android.open() as device:
        assert device.facts()["thermal_status"] == 0
        assert replayed(device, artifact, tmp_path / "first").of_kind("sequence")
        device.clean()
        assert not android.folder.exists()
    with (
        android.open(before="sleep 60") as device,
        pytest.raises(UnavailableError, match="did not end within 3 s"),
    ):
        replayed(device, artifact, tmp_path / "hanging", LIMIT)
    assert not list(processes_in(android.root))
    with android.open(before='test -e "$HOME/../../once" || { touch "$HOME/../../once"; sleep 60; }') as device:
        android.server.faults.append(Fault("shell", "disconnect", "result.jsonl"))
        with pytest.raises(UnavailableError):
            replayed(device, artifact, tmp_path / "broken")
        android.connect()
        assert replayed(device, artifact, tmp_path / "next").of_kind("sequence")
        assert not list(processes_in(android.root))


CLOCK_OF_1970 = """
#include <sys/time.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec %= 1000;
    return failed;
}
time_t time(time_t *now) {
    struct timespec read;
    clock_gettime(CLOCK_REALTIME, &read);
    return now ? *now = read.tv_sec : read.tv_sec;
}
"""


def test_a_clock_in_1970(phone, artifact, tmp_path):
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "-xc", "-"], input=CLOCK_OF_1970, text=True, check=True)
    attached = phone(variables={"LD_PRELOAD": str(library)})
    for name in ("first", "second"):
        with attached.open() as device:
            outcome = replayed(device, artifact, tmp_path / name)
        assert outcome.lines[0]["clock"].startswith("1970-01-01T00:")
        assert outcome.of_kind("sequence")


def test_two_devices_of_one_model(phone, artifact, tmp_path):
    first, second = phone("first", model="Twin"), phone("second", model="Twin")
    assert {_found(device).description for device in (first, second)} == {"Twin"}
    with first.open() as device:
        replayed(device, artifact, tmp_path / "result")
    assert first.folder.exists()
    assert not second.folder.exists()


def test_a_throttled_device_is_not_measured(phone):
    attached = phone()
    with attached.open() as device:
        device.check_ready()
        attached.answers("dumpsys", 'test "$1" = thermalservice && echo "Thermal Status: 3"')
        with pytest.raises(UnavailableError, match=r"throttled, its thermal status is 3 \(severe\).*--cool-down"):
            device.check_ready()
        hot = attached.root / "hot"
        hot.touch()
        attached.answers("dumpsys", f"rm '{hot}' 2>/dev/null && echo 'Thermal Status: 1' || echo 'Thermal Status: 0'")
        device.check_ready(cool_down=0.5)


def _found(attached):
    (found,) = [found for found in find_devices() if found.address == f"adb:{attached.serial}"]
    return found
