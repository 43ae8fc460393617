"""``pocketlm bench``: the structure of what it reports, and what it refuses. How fast anything is, no test asks."""

import hashlib
import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from pocketlm.results import read_result
from tests.cli.test_export import refused

SIZES = ("--prompt-tokens", 6, "--new-tokens", 5, "--threads", 1)
ONCE = (*SIZES, "--depth", 4, "--repetitions", 1, "--no-cold")
SECONDS = ("import_seconds", "check_seconds", "load_seconds", "depth_seconds", "first_token_seconds", "prefill_seconds")
SCHEMA = Path(__file__).parents[2] / "runtime_bindings" / "schema" / "result.schema.json"


def test_a_sample_for_each_repetition_and_interval(pocketlm, bundle, tmp_path):
    path = tmp_path / "results" / "bench.json"
    process = pocketlm(
        "bench", bundle, "--runtime", "onnx", "--runtime", "executorch", *SIZES, "--depth", "4,0",
        "--repetitions", 2, "--json", path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    jsonschema.validate(json.loads(path.read_text()), json.loads(SCHEMA.read_text()))
    result = read_result(path)
    assert result.kind == "bench"
    assert result.command.endswith(f"--json {path}")
    assert result.bundle.manifest_sha256 == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert [(run.runtime.name, run.settings.depth) for run in result.runs] == [
        ("onnx", 4), ("onnx", 0), ("executorch", 4), ("executorch", 0),
    ]  # fmt: skip
    for run in result.runs:
        assert (run.device.address, run.device.emulated, run.threads, run.cores, run.packed) == (
            "host", False, 1, None, False,
        )  # fmt: skip
        assert run.features
        assert run.runtime.version[0].isdigit()
        assert run.runtime.build
        recorded = json.loads((bundle / "manifest.json").read_text())["files"]
        assert run.files == {
            name.split("/", 1)[1]: file["sha256"]
            for name, file in recorded.items()
            if name.startswith(run.runtime.name)
        }
        first = run.settings.depth == 4
        assert [sample.cold for sample in run.samples] == ([False, True] * 2 if first else [False] * 2)
        assert (run.figures.cold_load_seconds is not None) == first
        assert (run.figures.depth_seconds is not None) == first
        for sample in run.samples:
            assert len(sample.decode_seconds) == 4, "n tokens are n - 1 intervals"
            assert all(getattr(sample, name) > 0 for name in SECONDS if first or name != "depth_seconds")
            memory = sample.memory
            states = [memory.before_load, memory.loaded, memory.first_token, memory.decoded]
            for state in states:
                assert 0 < state.anonymous + state.file_backed <= state.highest
            highest = [state.highest for state in states]
            assert highest == sorted(highest)
            assert memory.peak.resident >= highest[-1]
        warm = [sample for sample in run.samples if not sample.cold]
        rates = [4 / sum(sample.decode_seconds) for sample in warm]
        figure = run.figures.decode_tokens_per_second
        assert figure.median == pytest.approx(sum(rates) / 2)
        assert (figure.low, figure.high) == pytest.approx((min(rates), max(rates)))
        assert run.tokens_sha256 is not None, "greedy answers of one machine are equal"
        assert run.top1.positions > 0
        assert run.instructions is None
        assert run.profile is None
    assert result.runs[0].tokens_sha256 != result.runs[1].tokens_sha256
    lines = process.stdout.splitlines()
    assert lines[0].startswith("small.pocketlm in onnx 1.")
    labels = [line[:14].strip() for line in lines[4:18]]
    assert labels == [
        "import", "check", "load", "cold", "fill", "first token", "cold", "prefill", "decode",
        "peak memory", "anonymous", "file-backed", "model's own", "file-backed",
    ]  # fmt: skip
    assert "first choices: " in process.stdout


def test_json_on_stdout_is_the_only_thing_there(pocketlm, bundle):
    process = pocketlm("bench", bundle, "--runtime", "onnx", *ONCE, "--json", "-")
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document["runs"][0]["runtime"]["name"] == "onnx"
    assert len(document["runs"][0]["samples"]) == 1


def test_what_is_measured_where_nobody_chose(pocketlm, bundle):
    """The first runtime that is installed, at those of the usual depths that fit into a context of 64."""
    process = pocketlm("bench", bundle, *SIZES, "--repetitions", 1, "--no-cold", "--json", "-")
    runs = json.loads(process.stdout)["runs"]
    assert [(run["runtime"]["name"], run["settings"]["depth"]) for run in runs] == [("executorch", 0)]


def test_cores_are_kept_and_packed_weights_are_made_by_the_warm_up(pocketlm, bundle):
    arguments = ("--runtime", "onnx", *SIZES, "--depth", 4, "--repetitions", 1, "--cores", "0", "--packed")
    process = pocketlm("bench", bundle, *arguments, "--json", "-")
    assert process.returncode == 0, process.stderr
    assert "making the packed weights" in process.stderr
    (run,) = json.loads(process.stdout)["runs"]
    assert (run["cores"], run["packed"]) == ([0], True)
    assert [sample["cold"] for sample in run["samples"]] == [False], "packed weights are never cold"


@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_a_profile_tells_operators_and_what_is_delegated(runtime, pocketlm, bundle):
    process = pocketlm("bench", bundle, "--runtime", runtime, *ONCE, "--strict-backend", "--json", "-")
    assert process.returncode == 0, process.stderr
    (run,) = json.loads(process.stdout)["runs"]
    profile = run["profile"]
    seconds = [operator["seconds"] for operator in profile["operators"]]
    assert seconds == sorted(seconds, reverse=True)
    delegated = sum(operator["seconds"] for operator in profile["operators"] if operator["delegated"])
    assert profile["delegated_share"] == pytest.approx(delegated / sum(seconds))
    names = " ".join(operator["name"] for operator in profile["operators"])
    products = {"onnx": "MatMulNBits", "executorch": "XNNPACK Fully Connected"}
    assert products[runtime] in names
    assert not [operator for operator in profile["operators"] if operator["fallback"]]


def test_the_speed_of_the_reference_interpreter_is_not_reported(pocketlm, bundle):
    process = pocketlm("bench", bundle, "--runtime", "coreml", *SIZES)
    refused(process, "reference interpreter", "measurable in this bundle: executorch, onnx", code=3)


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (("--prompt-tokens", 0), ("--prompt-tokens", "at least 1")),
        (("--new-tokens", 1), ("--new-tokens", "at least 2")),
        (("--depth", -1), ("--depth", "at least 0")),
        (("--depth", "0,a"), ("--depth '0,a'", "whole numbers")),
        (("--cores", "0-1"), ("--cores '0-1'", "whole numbers")),
        (("--threads", 0), ("--threads", "at least 1")),
        (("--repetitions", 0), ("--repetitions", "at least 1")),
        (("--limit", 0), ("--limit", "at least 0.001")),
        (("--cool-down", -1), ("--cool-down", "at least 0")),
        (("--depth", 40, "--prompt-tokens", 20, "--new-tokens", 5), ("--depth 40", "context of 64")),
        ((), ("--depth 0", "context of 64")),
        ((*SIZES, "--runtime", "tflite"), ("unknown runtime 'tflite'",)),
        ((*SIZES, "--device", "toaster:1"), ("unknown device 'toaster:1'",)),
    ],
)
def test_what_can_not_be_measured_is_refused(arguments, needles, pocketlm, bundle):
    refused(pocketlm("bench", bundle, *arguments), *needles)


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("--cores", "4000"), "no such cores: 4000"),
        (("--device", "adb:nobody; here"), "nobody"),
        (("--limit", "0.01"), "host: the agent did not end within 0.01 s"),  # Python alone takes longer to start
    ],
)
def test_what_is_not_here(arguments, needle, pocketlm, bundle, tmp_path):
    path = tmp_path / "result.json"
    refused(pocketlm("bench", bundle, *ONCE, *arguments, "--json", path), needle, code=3)
    assert not path.exists(), "no half-written result"


def test_an_altered_artifact_is_refused(pocketlm, bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    path = copy / "onnx" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    refused(pocketlm("bench", copy, "--runtime", "onnx", *SIZES), "onnx/model.onnx", "altered")
    refused(pocketlm("bench", tmp_path / "nowhere"), "no such bundle")
