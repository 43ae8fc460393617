"""``pocketlm bench``: the structure of what it reports, and what it refuses. How fast anything is, no test asks."""

import json
import shutil

import pytest

from tests.cli.test_export import refused

SIZES = ("--prompt-tokens", 6, "--new-tokens", 5, "--depth", 4, "--threads", 1)
SECONDS = ("import_seconds", "check_seconds", "load_seconds", "depth_seconds", "first_token_seconds", "prefill_seconds")


@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_a_sample_for_each_repetition_and_interval(runtime, pocketlm, bundle, tmp_path):
    path = tmp_path / "results" / "bench.json"
    process = pocketlm("bench", bundle, "--runtime", runtime, *SIZES, "--repetitions", 2, "--json", path)
    assert process.returncode == 0, process.stderr
    assert [line.split(":")[0] for line in process.stderr.splitlines()] == ["repetition 1 of 2", "repetition 2 of 2"]
    document = json.loads(path.read_text())
    assert document["kind"] == "bench"
    assert document["job"] == {
        "bundle": str(bundle), "runtime": runtime, "prompt_tokens": 6, "new_tokens": 5, "depth": 4, "threads": 1,
        "packed": False,
    }  # fmt: skip
    assert document["machine"]["features"].strip()
    assert "bench" in document["command"]
    assert len(document["repetitions"]) == 2
    for repetition in document["repetitions"]:
        measured = repetition["measurement"]
        assert len(measured["decode_seconds"]) == 4, "n tokens are n - 1 intervals"
        assert all(measured[name] > 0 for name in SECONDS)
        states = [measured[name] for name in ("before_load", "loaded", "first_token", "decoded")]
        for memory in states:
            assert 0 < memory["anonymous"] + memory["file_backed"] <= memory["highest"]
        highest = [memory["highest"] for memory in states]
        assert highest == sorted(highest)
        assert repetition["peak"]["resident"] >= highest[-1]
    rates = [4 / sum(repetition["measurement"]["decode_seconds"]) for repetition in document["repetitions"]]
    summary = document["summary"]
    assert summary["decode_tokens_per_second"] == {
        "median": pytest.approx(sum(rates) / 2), "lowest": min(rates), "highest": max(rates),
    }  # fmt: skip
    prefills = [6 / repetition["measurement"]["prefill_seconds"] for repetition in document["repetitions"]]
    assert summary["prefill_tokens_per_second"]["highest"] == max(prefills)
    lines = process.stdout.splitlines()
    assert document["machine"]["features"] in lines[2]
    labels = [line[:14].strip() for line in lines[4:]]
    assert labels[:7] == ["import", "check", "load", "fill", "first token", "prefill", "decode"]
    assert labels[7:] == ["peak memory", "anonymous", "file-backed", "model's own", "file-backed"]


def test_json_on_stdout_is_the_only_thing_there(pocketlm, bundle):
    process = pocketlm("bench", bundle, "--runtime", "onnx", *SIZES, "--repetitions", 1, "--json", "-")
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document["job"]["runtime"] == "onnx"
    assert len(document["repetitions"]) == 1


def test_without_a_runtime_the_first_that_is_installed_is_measured(pocketlm, bundle):
    process = pocketlm("bench", bundle, *SIZES, "--repetitions", 1, "--json", "-")
    assert json.loads(process.stdout)["job"]["runtime"] == "executorch"


def test_packed_weights_are_made_by_a_process_that_is_not_measured(pocketlm, bundle):
    process = pocketlm("bench", bundle, "--runtime", "onnx", *SIZES, "--repetitions", 1, "--packed", "--json", "-")
    assert process.returncode == 0, process.stderr
    assert "making the packed weights" in process.stderr
    document = json.loads(process.stdout)
    assert document["job"]["packed"] is True
    assert len(document["repetitions"]) == 1
    refused(pocketlm("bench", bundle, "--runtime", "coreml", *SIZES, "--packed"), "packed weights", "onnx")


def test_the_speed_of_the_reference_interpreter_is_not_reported(pocketlm, bundle):
    process = pocketlm("bench", bundle, "--runtime", "coreml", *SIZES)
    refused(process, "reference interpreter", "measurable in this bundle: executorch, onnx", code=3)


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (("--prompt-tokens", 0), ("--prompt-tokens", "at least 1")),
        (("--new-tokens", 1), ("--new-tokens", "at least 2")),
        (("--depth", -1), ("--depth", "at least 0")),
        (("--threads", 0), ("--threads", "at least 1")),
        (("--repetitions", 0), ("--repetitions", "at least 1")),
        (("--depth", 40, "--prompt-tokens", 20, "--new-tokens", 5), ("--depth 40", "context of 64")),
        (("--prompt-tokens", 6, "--new-tokens", 5, "--runtime", "tflite"), ("unknown runtime 'tflite'",)),
    ],
)
def test_what_can_not_be_measured_is_refused(arguments, needles, pocketlm, bundle):
    refused(pocketlm("bench", bundle, *arguments), *needles)


def test_an_error_of_the_measuring_process_is_the_programs(pocketlm, bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    path = copy / "onnx" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    refused(pocketlm("bench", copy, "--runtime", "onnx", *SIZES), "onnx/model.onnx", "altered")
    refused(pocketlm("bench", tmp_path / "nowhere"), "no such bundle")
