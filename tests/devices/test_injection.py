"""Whatever a name holds, it is a name: no shell, here or on a device, takes it for a command."""

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.artifact import Artifact, ArtifactFile
from pocketlm.devices import open_device
from pocketlm.devices.android.adb_client import quote
from pocketlm.errors import InputError, UnavailableError
from pocketlm.job import ForcedTokens, Job, Replay

EMPTY = Artifact(Path("nothing"), {}, 64, 320, 16, 32, 8, {})
CANARY = "pocketlm-canary"
ODD = [
    "a name",
    "-rf",
    "--help",
    f"a;touch {CANARY};",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"' ; touch {CANARY} ; '",
    f'" ; touch {CANARY} ; "',
    f"a\ntouch {CANARY}\nb",
    f"a && touch {CANARY} || touch {CANARY}",
    f"a | touch {CANARY} &",
    "$HOME and ${HOME} and $0",
    "*",
    "~",
    "#",
    "!",
    "\\",
    "tab\there",
    "a,b,33188",
    "ünïcödé 文字",
]


def test_a_folder_of_any_name(phone, tiny_bundle, tmp_path):
    artifact = tiny_bundle("llama", "int4", "onnx").artifact("onnx")
    attached = phone()
    folder = attached.root.joinpath("folders", *ODD)
    with attached.open(folder=str(folder)) as device:
        placed = device.place(artifact)
        assert placed.path.is_relative_to(folder)
        assert placed.path.read_bytes() == artifact.path.read_bytes()
        device.clean()
    assert not folder.exists()
    assert list(folder.parent.parent.iterdir()) == [folder.parent]
    _no_canary(tmp_path)


def test_files_of_any_name(phone, tmp_path):
    contents = {name: name.encode() for name in ODD}
    source = tmp_path / "artifact"
    source.mkdir()
    for name, content in contents.items():
        (source / name).write_bytes(content)
    files = {name: ArtifactFile(hashlib.sha256(text).hexdigest(), len(text)) for name, text in contents.items()}
    attached = phone()
    with attached.open() as device:
        placed = device.place(replace(EMPTY, path=source / ODD[0], files=files))
        assert {path.name: path.read_bytes() for path in placed.path.parent.iterdir()} == contents
    _no_canary(tmp_path)


def test_a_job_in_a_folder_of_an_odd_name(phone, tiny_bundle, tmp_path):
    artifact = tiny_bundle("llama", "int4", "onnx").artifact("onnx")
    attached = phone(f'it\'s a; "phone" $(touch {CANARY}) `touch {CANARY}` -rf')
    result = tmp_path / "the 'result'; $HOME"
    result.mkdir()
    with attached.open() as device:
        job = Job("onnx", device.place(artifact), Replay((ForcedTokens((1, 2), (3, 4)),)), threads=1)
        assert device.run(job, result, limit=60).of_kind("sequence")
    _no_canary(tmp_path)


@pytest.mark.usefixtures("adb")
@pytest.mark.parametrize("serial", ODD)
def test_a_serial_is_no_command(tmp_path, monkeypatch, serial):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnavailableError, match="not attached; attached: none"):
        open_device(f"adb:{serial}")
    _no_canary(tmp_path)


@pytest.mark.parametrize(("address", "message"), [("adb:", "which device"), ("ios:", "which device")])
def test_a_device_without_a_name(address, message):
    with pytest.raises(InputError, match=message):
        open_device(address)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_quoted_path_is_one_word(name):
    path = PurePosixPath("/folder", name)
    said = subprocess.run(["sh", "-c", f"printf %s {quote(path)}"], capture_output=True, check=True).stdout
    assert said == str(path).encode()


def _no_canary(folder):
    """Commands run in the device's root, or where this process is."""
    assert not [path for place in (Path("/"), Path()) for path in place.glob(CANARY)]
    assert not list(folder.rglob(CANARY))
