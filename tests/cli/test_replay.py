"""``run --record`` and ``replay`` as a user meets them."""

import json
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from pocketlm.bundle import open_bundle
from pocketlm.replaying.golden_session import GOLDEN_FILE
from pocketlm.replaying.recording import read_session
from pocketlm.results import ReplayResult, read_result
from tests.cli.conftest import PROGRAM
from tests.cli.test_export import refused
from tests.small_checkpoint import write_small_checkpoint
from tests.verify.injection import copied_with_fault, places_of, sealed

SESSION = ("--prompt", "def f(a):", "--raw", "--temperature", 1.5, "--seed", 3, "--max-new-tokens", 24)


@pytest.fixture(scope="module")
def session(pocketlm, bundle, tmp_path_factory) -> Path:
    """Recorded by ONNX Runtime."""
    path = tmp_path_factory.mktemp("sessions") / "new folder" / "session.jsonl"
    process = pocketlm("run", bundle, "--runtime", "onnx", *SESSION, "--record", path)
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[-1] == f"recorded 24 steps: {path}"
    return path


def replayed(process: subprocess.CompletedProcess, folder: Path) -> ReplayResult:
    """The result that ``--json -`` printed, read as anyone reads it."""
    path = folder / "printed.json"
    path.write_text(process.stdout)
    result = read_result(path)
    assert isinstance(result, ReplayResult)
    return result


def test_recording_changes_no_answer(pocketlm, bundle, session):
    plain = pocketlm("run", bundle, "--runtime", "onnx", *SESSION, "--json")
    (sequence,) = read_session(session, open_bundle(bundle)).sequences
    assert sequence.line.tokens == json.loads(plain.stdout)["tokens"]
    assert sequence.line.sampling.seed == 3


def test_a_recorded_session_names_its_seed(pocketlm, bundle, tmp_path):
    options = ("run", bundle, "--runtime", "onnx", "--raw", "--prompt", "ab", "--temperature", 2, "--max-new-tokens", 9)
    first = pocketlm(*options, "--json", "--record", tmp_path / "session.jsonl")
    (sequence,) = read_session(tmp_path / "session.jsonl", open_bundle(bundle)).sequences
    again = pocketlm(*options, "--json", "--seed", sequence.line.sampling.seed)
    assert json.loads(again.stdout)["tokens"] == json.loads(first.stdout)["tokens"]


def test_a_session_replays_in_every_runtime_of_the_host(pocketlm, bundle, session, tmp_path):
    path = tmp_path / "results" / "replay.json"
    process = pocketlm("replay", bundle, "--session", session, "--threads", 1, "--json", path)
    assert process.returncode == 0, process.stderr
    title, columns, executorch, onnx, *notes = process.stdout.splitlines()
    assert title.startswith("session.jsonl of small.pocketlm, recorded by onnx ")
    assert title.endswith("; sequences 1, steps 24")
    assert columns.split("  ")[0] == "device"
    assert columns.endswith("verdict")
    assert executorch.startswith("host    executorch 1.")
    assert onnx.startswith("host    onnx 1.")
    assert onnx.endswith("passed")
    assert notes == []
    result = read_result(path)
    assert [run.passed for run in result.runs] == [True, True]
    assert [run.limits.certified for run in result.runs] == [True, True]
    same = result.runs[1]
    assert (same.top1.agreement, same.mean_kl, same.first_divergence) == (1.0, 0.0, None)
    assert 0 < result.runs[0].mean_kl < result.runs[0].limits.mean_kl
    assert result.unavailable == []


def test_without_a_session_the_golden_one_replays(pocketlm, bundle, tmp_path):
    process = pocketlm("replay", bundle, "--runtime", "onnx", "--runtime", "coreml", "--json", "-")
    assert process.returncode == 0, process.stderr
    result = replayed(process, tmp_path)
    assert result.session.name == "golden session"
    assert result.session.recorded_by is None
    assert [run.runtime.name for run in result.runs] == ["onnx", "coreml"]
    assert all(0 < run.largest_drift < run.limits.drift for run in result.runs)
    assert all(run.top1.positions == result.session.steps >= 48 for run in result.runs)
    assert "reference interpreter" in result.runs[1].runtime.build


def test_a_conversation_is_recorded_answer_by_answer(pocketlm, bundle, tmp_path):
    path = tmp_path / "session.jsonl"
    options = ("--runtime", "onnx", "--max-new-tokens", 3, "--record", path)
    process = pocketlm("chat", bundle, *options, stdin="ab\n/reset\ncd\n/exit\n")
    assert process.returncode == 0, process.stderr
    sequences = read_session(path, open_bundle(bundle)).sequences
    assert [sequence.line.prompt for sequence in sequences] == [
        f"<|user|>{text}<|end|><|assistant|>" for text in ("ab", "cd")
    ]
    assert pocketlm("replay", bundle, "--session", path, "--runtime", "onnx").returncode == 0


def test_an_interrupt_leaves_what_was_generated_as_a_session(bundle, environment, tmp_path):
    path = tmp_path / "session.jsonl"
    command = [*PROGRAM, "chat", str(bundle), "--runtime", "onnx", "--max-new-tokens", "3", "--record", str(path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        process.stdin.write("ab\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert [len(sequence.steps) for sequence in read_session(path, open_bundle(bundle)).sequences] == [3]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_half_session(bundle, environment, tmp_path):
    path = tmp_path / "session.jsonl"
    command = [*PROGRAM, "run", str(bundle), "--runtime", "onnx", *map(str, SESSION), "--record", str(path)]
    process = subprocess.run(
        command,
        text=True,
        env=environment,
        capture_output=True,
        check=False,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == f"error: {path}: can't be written: File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_artifact_fails_and_the_step_is_named(pocketlm, bundle, session, tmp_path):
    sound = open_bundle(bundle)
    place = places_of("onnx", "one layer skipped", sound)[0]
    damaged = copied_with_fault(sound, "onnx", "one layer skipped", place, tmp_path / "damaged")
    process = pocketlm("replay", damaged.folder, "--session", session)
    assert process.returncode == 1
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: host, onnx: sequence 1, step ")
    assert "of the deviation is wide: a near tie has at most 0.25" in errors[0]
    rows = {line.split()[1]: line for line in process.stdout.splitlines() if line.startswith("host ")}
    assert rows["executorch"].endswith("passed"), "its artifact is sound"
    assert rows["onnx"].endswith("FAILED")
    assert "only wide margins are judged: no certificate" in process.stdout


def test_a_device_that_is_not_there_is_named_beside_the_rows_of_the_others(pocketlm, bundle, session, tmp_path):
    options = ("--session", session, "--runtime", "onnx", "--device", "qemu:arm64", "--device", "host")
    process = pocketlm("replay", bundle, *options)
    assert process.returncode == 3
    assert process.stderr.splitlines()[-1].startswith("error: ")
    assert "qemu:arm64" in process.stderr.splitlines()[-1]
    assert [line.split()[0] for line in process.stdout.splitlines()[2:]] == ["host", "qemu:arm64"]
    result = replayed(pocketlm("replay", bundle, *options, "--json", "-"), tmp_path)
    assert [run.passed for run in result.runs] == [True]
    assert [missing.address for missing in result.unavailable] == ["qemu:arm64"]


def test_a_run_that_takes_longer_than_its_limit_is_not_available(pocketlm, bundle, session):
    process = pocketlm("replay", bundle, "--session", session, "--runtime", "onnx", "--limit", 0.01)
    assert process.returncode == 3
    assert "did not end within 0.01 s" in process.stderr.splitlines()[-1]
    assert process.stdout.splitlines()[-1].endswith("not available")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "fridge"), "unknown device 'fridge'"),
        (("--device", "host:1"), "there is one host"),
        (("--runtime", "tflite"), "no tflite artifact"),
        (("--threads", 0), "threads must be at least 1"),
        (("--limit", 0), "the limit must be more than 0 seconds"),
        (("--session", "nowhere.jsonl"), "nowhere.jsonl: no such session file"),
    ],
)
def test_options_that_make_no_sense(options, says, pocketlm, bundle):
    refused(pocketlm("replay", bundle, *options), says)


def test_the_session_of_another_bundle_and_a_malformed_one(pocketlm, bundle, session, tmp_path):
    source = write_small_checkpoint(tmp_path / "source", num_hidden_layers=1)
    other = tmp_path / "other"
    assert pocketlm("export", source, "-o", other, "--targets", "onnx", "--no-verify").returncode == 0
    refused(pocketlm("replay", other, "--session", session), str(session), "line 1", "another model")
    truncated = tmp_path / "truncated.jsonl"
    truncated.write_bytes(session.read_bytes()[:3000])
    refused(pocketlm("replay", bundle, "--session", truncated), f"{truncated}: line ")


def test_a_bundle_with_prompts_only_says_what_to_do(pocketlm, bundle, tmp_path):
    prompts = b'{"prompt":"a","prompt_ids":[5]}\n'
    large = sealed(open_bundle(bundle), tmp_path / "large", {GOLDEN_FILE: prompts})
    refused(pocketlm("replay", large.folder), "no golden session", "pocketlm run --record FILE", "--session FILE")


def test_a_place_that_takes_no_record_is_refused_before_a_token(pocketlm, bundle, tmp_path):
    refused(pocketlm("run", bundle, *SESSION, "--record", tmp_path), f"{tmp_path}: is a folder")
    (tmp_path / "file").touch()
    refused(pocketlm("run", bundle, *SESSION, "--record", tmp_path / "file" / "session.jsonl"), "file: File exists")
