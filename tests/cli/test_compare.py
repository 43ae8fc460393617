"""``pocketlm compare``: the table, and exit codes that a CI job goes by."""

import json
from pathlib import Path

import pytest

from tests.cli.test_export import refused
from tests.made_results import emulated_run, result, run, sample


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A, and B: a tenth slower, with a tenth more instructions in decode, and noisy."""
    folder = tmp_path_factory.mktemp("results of a 'friend'; $HOME")
    a, b = folder / "a.json", folder / "b.json"
    a.write_text(result(run([sample(10)] * 3), emulated_run()).to_json())
    slower = run([sample(9)] * 3, noisy=["others were busy"])
    b.write_text(result(slower, emulated_run(decode=220)).to_json())
    return a, b


def test_a_table_of_ratios(pocketlm, files):
    process = pocketlm("compare", *files)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert lines[:2] == [f"A: {files[0]}", f"B: {files[1]}"]
    assert "onnx on host, depth 0 (noisy)" in lines
    assert "B: others were busy" in lines
    (decode,) = [line.split() for line in lines if line.startswith("decode ")]
    assert decode == ["decode", "10", "9", "0.9000", "0.9000", "to", "0.9000"]


def test_gates_that_pass(pocketlm, files):
    process = pocketlm("compare", *files, "--gate", "decode>=0.85,anonymous<=1.05,arm64_instructions<=1.2,top1>=0.99")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("passed: ") == 6, "top1 on both devices, instructions of prefill and decode"


def test_a_gate_that_fails_prints_the_figure_and_ends_with_1(pocketlm, files):
    process = pocketlm("compare", *files, "--gate", "decode>=0.95,arm64_instructions<=1.01")
    assert process.returncode == 1
    assert "passed: onnx on qemu:arm64@cortex-a76, depth 0: prefill_instructions is 1.0000" in process.stdout
    assert "FAILED: onnx on host, depth 0: decode is 0.9000, limit decode>=0.95, noisy" in process.stdout
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "decode is 0.9000, limit decode>=0.95" in error
    assert "decode_instructions is 1.1000, limit arm64_instructions<=1.01" in error


def test_an_interval_that_includes_the_limit_is_a_warning(pocketlm, tmp_path):
    path = tmp_path / "wide.json"
    path.write_text(result(run([sample(rate) for rate in (8, 10, 12)])).to_json())
    process = pocketlm("compare", path, path, "--gate", "decode>=0.95")
    assert process.returncode == 0, process.stderr
    assert process.stderr.startswith("warning: onnx on host, depth 0: decode is 1.0000 (")
    assert "includes the limit" in process.stderr


def test_json_holds_ratios_and_verdicts(pocketlm, files):
    process = pocketlm("compare", *files, "--gate", "decode>=0.95", "--json")
    assert process.returncode == 1
    document = json.loads(process.stdout)
    assert document["gates"][0]["passed"] is False
    assert document["gates"][0]["ratio"]["ratio"]["median"] == pytest.approx(0.9)
    assert [pair["name"] for pair in document["pairs"]] == [
        "onnx on host, depth 0", "onnx on qemu:arm64@cortex-a76, depth 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "needles"),
    [
        ("decode>0.9", ("--gate 'decode>0.9'", "FIGURE>=NUMBER")),
        ("speed>=1", ("unknown figure", "decode")),
        ("cold_load<=1", ("--gate cold_load<=1", "no pair of runs has cold_load")),
    ],
)
def test_a_gate_that_can_not_be_judged_is_bad_input(gate, needles, pocketlm, files):
    refused(pocketlm("compare", *files, "--gate", gate), *needles)


def test_what_is_no_result_of_bench_is_refused(pocketlm, files, tmp_path):
    other = tmp_path / "other version.json"
    other.write_text(files[0].read_text().replace('"format_version": "1.0"', '"format_version": "2.0"'))
    refused(pocketlm("compare", files[0], other), "other version.json", "'format_version' is '2.0'")
    refused(pocketlm("compare", tmp_path / "nowhere.json", files[1]), "nowhere.json", "can't be read")
    half = tmp_path / "half.json"
    half.write_bytes(files[0].read_bytes()[:1000])
    refused(pocketlm("compare", files[0], half), "half.json", "not a valid JSON object")
