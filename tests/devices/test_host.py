"""The agent on this machine: what it answers, and what becomes of it when something goes wrong."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.small_checkpoint import write_small_checkpoint

import pocketlm
from pocketlm.agent import DECODE_WINDOW, PREFILL_WINDOW, WINDOW
from pocketlm.devices import open_device
from pocketlm.devices.base import Outcome
from pocketlm.errors import BundleError, ContextLengthError, InputError, PocketLMError, UnavailableError
from pocketlm.job import ForcedTokens, Job, Measure, Replay
from pocketlm.measuring.measurement import read_begin, read_measurement
from pocketlm.memory_watch import MemoryWatch

RUNTIMES = ("onnx", "executorch")
WORK = Measure(prompt_tokens=6, new_tokens=5, depth=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pocketlm.Bundle:
    root = tmp_path_factory.mktemp("host")
    return pocketlm.export(
        write_small_checkpoint(root / "checkpoint"), root / "a 'bundle'; $HOME", targets=RUNTIMES,
        store=root / "store", verify=False,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    """``run(job, limit=120)`` on the host, in an empty folder."""

    def run(job: Job, limit: float = 120.0) -> Outcome:
        folder = tmp_path / f"job {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        with open_device("host") as device:
            return device.run(replace(job, artifact=device.place(job.artifact)), folder, limit=limit)

    return run


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_it_measures_and_replays(runtime, bundle, run):
    job = Job(runtime, bundle.artifact(runtime), WORK, threads=1)
    outcome = run(job)
    begin, measured = read_begin("host", outcome), read_measurement("host", outcome, WORK.new_tokens)
    assert begin.runtime == runtime
    assert begin.runtime_version[0].isdigit()
    assert measured.memory.peak is not None
    assert read_measurement("host", run(job), WORK.new_tokens).tokens == measured.tokens
    sequence = ForcedTokens((1, 2, 3), (4, 5), ids=((7, 8), (9,)))
    (line,) = run(replace(job, work=Replay((sequence,), top=3))).of_kind("sequence")
    with bundle.session(runtime, threads=1) as session:
        for step, given in zip(line["steps"], ([1, 2, 3], [4]), strict=True):
            logits = session.extend(given)[-1].astype(float)
            assert step["choice"] == int(logits.argmax())
            assert [token for token, _ in step["top"]] == list((-logits).argsort(kind="stable")[:3])
            assert step["choice_logit"] == pytest.approx(float(logits.max()), abs=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_cold_loads_windows_and_profiles_change_no_token(runtime, bundle, run):
    job = Job(runtime, bundle.artifact(runtime), WORK, threads=1)
    tokens = read_measurement("host", run(job), WORK.new_tokens).tokens
    for wish in ("cold", "windows", "profile"):
        outcome = run(replace(job, work=replace(WORK, **{wish: True})))
        assert read_measurement("host", outcome, WORK.new_tokens).tokens == tokens, wish
        assert (outcome.profile is not None) == (wish == "profile")
        assert outcome.instructions is None, "nobody counts here"


def test_a_window_is_a_call_that_changes_nothing():
    for number in (PREFILL_WINDOW, DECODE_WINDOW, 0):
        with pytest.raises(ProcessLookupError):
            os.getpriority(os.PRIO_PROCESS, WINDOW + number)


def test_it_stays_on_the_cores_it_is_given(bundle, run):
    job = Job("onnx", bundle.artifact("onnx"), WORK, threads=1, cores=(0,))
    assert read_begin("host", run(job)).machine["cores"] == "1"
    with pytest.raises(UnavailableError, match="no such cores: 4000"):
        run(replace(job, cores=(4000,)))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_artifact_is_what_the_job_says(runtime, bundle, run):
    artifact = bundle.artifact(runtime)
    name = artifact.path.name
    altered = replace(artifact, files={**artifact.files, name: replace(artifact.files[name], sha256="0" * 64)})
    with pytest.raises(BundleError, match=rf"host: .*{name}: its content is not what the job says"):
        run(Job(runtime, altered, WORK))
    with pytest.raises(BundleError, match="no such artifact"):
        run(Job(runtime, replace(artifact, path=artifact.path.with_name("gone")), WORK))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"work": replace(WORK, depth=64)}, ContextLengthError, "exceed the context of 64"),
        ({"work": Replay((ForcedTokens((1,), (9999,)),))}, InputError, "not in the model's vocabulary"),
        ({"work": Replay((ForcedTokens((1,), (2, 3), ids=((1,),)),))}, InputError, "ids of 1 steps"),
        ({"work": Replay((ForcedTokens((), (2,)),))}, InputError, "non-empty list"),
        ({"runtime": "coreml"}, PocketLMError, "host: "),
    ],
)
def test_an_error_of_the_agent_is_ours(change, error, message, bundle, run):
    with pytest.raises(error, match=message):
        run(replace(Job("onnx", bundle.artifact("onnx"), WORK), **change))


def test_it_ends_at_its_limit_and_leaves_nothing(bundle, run, tmp_path):
    with pytest.raises(UnavailableError, match=r"host: the agent did not end within 0\.05 s"):
        run(Job("onnx", bundle.artifact("onnx"), WORK), limit=0.05)
    assert not agents_below(tmp_path)
    assert run(Job("onnx", bundle.artifact("onnx"), WORK)).lines, "the next one works"


def agents_below(folder: Path) -> list[int]:
    """Processes that were started with, or stand in, a folder below this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, place = (process / "cmdline").read_bytes(), str((process / "cwd").readlink())
        except OSError:  # no process, or gone
            continue
        if int(process.name) != os.getpid() and (str(folder).encode() in words or place.startswith(str(folder))):
            found.append(int(process.name))
    return found


def test_one_that_is_killed_says_so_and_leaves_nothing(bundle, run, tmp_path):
    """It waits for a named pipe in the artifact's place, so that it is certainly there when the signal comes."""
    pipe = tmp_path / "model.onnx"
    os.mkfifo(pipe)
    artifact = bundle.artifact("onnx")
    # A size of 0 is what a pipe has: the agent goes on to read it, and waits.
    artifact = replace(artifact, path=pipe, files={pipe.name: replace(artifact.files[pipe.name], size=0)})

    def kill() -> None:
        with pipe.open("wb"):  # opens when the agent, with its watch running, reads
            for process in agents_below(tmp_path):
                if f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{process}/status").read_text():
                    os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(UnavailableError, match="host: the agent ended with signal 9, and said nothing"):
        run(Job("onnx", artifact, WORK))
    killer.join()
    deadline = time.monotonic() + 10
    while agents_below(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not agents_below(tmp_path), "what watched it is gone with it"


def test_a_watch_ends_with_the_process_that_it_watches():
    code = (
        "import os, sys, time\n"
        "from pocketlm.memory_watch import MemoryWatch\n"
        "watch = MemoryWatch().__enter__()\n"
        "print(watch._child, flush=True)\n"
        "os._exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, "its standard streams are closed, or this would have waited"
    child = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: Path) -> bool:
    """Neither gone, nor a zombie that nobody has waited for yet."""
    try:
        return (process / "stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_watch_sees_what_came_and_went():
    with MemoryWatch() as watch:
        begin = time.monotonic()
        held = bytearray(b"1") * (64 << 20)
        time.sleep(0.1)
        del held
        end = time.monotonic()
        time.sleep(0.1)
        watch.stop()
    during, after = watch.peak(begin, end), watch.peak(end + 0.05)
    assert during.anonymous - after.anonymous > 48 << 20
    assert watch.peak().anonymous >= during.anonymous
    assert watch.peak(end + 60) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not JSON", "not a job"),
        (b'{"format_version": "2.0"}', "this agent reads 1.x"),
        (b'{"format_version": "1.0"}', "needs one of 'replay' and 'measure'"),
        (None, "can't be read"),
    ],
)
def test_what_is_no_job_ends_with_2_and_is_told_twice(content, message, tmp_path):
    job, result = tmp_path / "job.json", tmp_path / "result.jsonl"
    if content is not None:
        job.write_bytes(content)
    command = [sys.executable, "-m", "pocketlm.agent", str(job), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (line,) = map(json.loads, result.read_text().splitlines())
    assert done.returncode == line["exit_code"] == 2
    assert line["kind"] == "error"
    assert message in line["message"]
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert subprocess.run(command[:3], capture_output=True, timeout=60, check=False).returncode == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "0 lines of kind begin"),
        ([{"kind": "begin"}], "the agent's line begin: 'format_version'"),
        ([{"kind": "begin"}, {"kind": "begin"}], "2 lines of kind begin"),
    ],
)
def test_garbage_in_the_place_of_an_answer_is_the_devices(lines, message):
    with pytest.raises(UnavailableError, match=f"a phone: .*{message}"):
        read_begin("a phone", Outcome(tuple(lines)))


MEASURED = {
    "kind": "measurement", "import_seconds": 0.1, "check_seconds": 0.1, "load_seconds": 0.1, "depth_seconds": 0.0,
    "first_token_seconds": 0.1, "prefill_seconds": 0.1, "decode_seconds": [0.1], "tokens": [1, 2],
    "memory": dict.fromkeys(
        ("before_load", "loaded", "first_token", "decoded", "load_peak", "generation_peak", "peak")
    ),
    "energy": {"method": None, "prefill_joules": None, "decode_joules": None}, "load_average": 0.1,
    "others_cores": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill_seconds": 0.0}, "'prefill_seconds'"),
        ({"load_seconds": None}, "'load_seconds'"),
        ({"load_seconds": -1.0}, "'load_seconds'"),
        ({"decode_seconds": []}, "'decode_seconds'"),
        ({"tokens": [1, -2]}, "'tokens.1'"),
        ({"tokens": [1, 2, 3]}, "3 tokens and 1 intervals instead of 2 and 1"),
        ({"memory": {}}, "'memory.before_load'"),
        ({"more": 1}, "'more'"),
    ],
)
def test_a_measurement_of_a_device_is_read_strictly(change, message):
    assert read_measurement("a phone", Outcome((MEASURED,)), 2).tokens == [1, 2]
    with pytest.raises(UnavailableError, match="a phone: ") as caught:
        read_measurement("a phone", Outcome(({**MEASURED, **change},)), 2)
    assert message in str(caught.value)


def test_there_is_one_host():
    with pytest.raises(InputError, match="host:2: there is one host"):
        open_device("host:2")
