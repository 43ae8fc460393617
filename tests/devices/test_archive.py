"""The agent's archive: exactly its modules run both runtimes, and its bytes depend on nothing but what is in it."""

import json
import os
import re
import subprocess
import tarfile

import pytest
from tests.devices.host_archive import host_archive

from pocketlm.devices.android.agent_archive import SCRIPT, agent_archive, pack
from pocketlm.errors import UnavailableError
from pocketlm.job import ForcedTokens, Job, Measure, Replay
from pocketlm.runtimes.executorch_library import obstacle

REPLAY = Replay((ForcedTokens((1, 2), (3, 4)),), top=2)
MEASURE = Measure(4, 4, depth=2)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    with tarfile.open(host_archive(folder).path) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return folder / "unpacked"


@pytest.mark.parametrize("work", [REPLAY, MEASURE], ids=("replay", "measure"))
@pytest.mark.parametrize("packed", [False, True], ids=("plain", "packed"))
@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_the_archives_modules_are_all_that_the_agent_needs(unpacked, tiny_bundle, tmp_path, runtime, packed, work):
    native = runtime == "executorch" and not obstacle()
    if packed and runtime == "executorch" and not native:
        pytest.skip("not run: pocketlm-native is not installed, and without it .pte are not packed")
    artifact = tiny_bundle("llama", "int4", runtime).artifact(runtime)
    job = Job(runtime, artifact, work, threads=1, packed=packed)
    (tmp_path / "job.json").write_text(json.dumps(job.to_json()))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.run(
        ["sh", str(unpacked / SCRIPT), "job.json", "result.jsonl"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "result.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["begin", "sequence" if work is REPLAY else "measurement", "end"]


def test_the_same_contents_are_the_same_archive(tmp_path):
    contents = {"agent": b"exit 0", "packages/pocketlm/agent.py": b"pass"}
    first, second = (
        pack(dict(items), tmp_path / name)
        for name, items in (("a", contents.items()), ("b", reversed(contents.items())))
    )
    assert (first.name, first.file) == (second.name, second.file)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert pack({**contents, "agent": b"exit 1"}, tmp_path / "a").name != first.name
    assert len(list((tmp_path / "a").iterdir())) == 1, "older archives are removed"


def test_without_the_arm64_system_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UnavailableError, match="pocketlm devices setup qemu:arm64"):
        agent_archive()


@pytest.mark.usefixtures("arm64_system")
def test_no_library_of_a_device_takes_part(tmp_path):
    """Whatever a file of the arm64 archive asks the loader for lies in the archive."""
    with tarfile.open(agent_archive().path) as packed:
        packed.extractall(tmp_path, filter="data")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    objects = [path for path in files if path.open("rb").read(4) == b"\x7fELF"]
    said = subprocess.run(["readelf", "-d", *objects], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\) +Shared library: \[(.+)\]", said))
    assert "libc.so.6" in needed
    assert needed <= {path.name for path in objects}
