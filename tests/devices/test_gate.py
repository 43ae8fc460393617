"""The gate on instruction counts: it passes on what was measured before, and fails on a worse artifact."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.worse_bundle import with_float_products

import pocketlm
from pocketlm.measuring.benchmark import BenchOptions, measure_bundle
from pocketlm.measuring.comparison import FIGURES
from pocketlm.measuring.gate import parse_gates
from pocketlm.results import BenchResult, read_result

DEVICE = "qemu:arm64@cortex-a76"
OPTIONS = BenchOptions(prompt_tokens=8, new_tokens=5, depths=(0,))
GATE = "arm64_instructions<=1.01"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("arm64_system")


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory) -> Callable[[pocketlm.Bundle, str], Path]:
    """``count(bundle, runtime)`` -> the result in a file."""

    def count(bundle: pocketlm.Bundle, runtime: str) -> Path:
        result = measure_bundle(bundle, [DEVICE], [runtime], OPTIONS, lambda _words: None)
        path = tmp_path_factory.mktemp("counts") / "result.json"
        path.write_text(result.to_json(), encoding="utf-8")
        return path

    return count


def gate(before: Path, after: Path) -> subprocess.CompletedProcess:
    program = "from pocketlm.cli.main import main; main()"
    command = [sys.executable, "-c", program, "compare", str(before), str(after), "--gate", GATE]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ), check=False)


@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_the_same_artifact_passes_to_the_instruction(runtime, tiny_bundle, count):
    bundle = tiny_bundle("llama", "int4", runtime)
    before, after = count(bundle, runtime), count(bundle, runtime)
    process = gate(before, after)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("is 1.0000, limit") == 2


def test_products_in_floats_fail(tiny_bundle, count, tmp_path):
    bundle = tiny_bundle("llama", "int4", "onnx")
    process = gate(count(bundle, "onnx"), count(with_float_products(bundle, tmp_path / "worse"), "onnx"))
    assert process.returncode == 1, process.stdout + process.stderr
    assert f"FAILED: onnx on {DEVICE}, depth 0: decode_instructions is " in process.stdout
    assert "limit arm64_instructions<=1.01" in process.stderr


def test_an_emulated_device_has_instructions_and_no_speed(tiny_bundle, count):
    result = read_result(count(tiny_bundle("llama", "int4", "onnx"), "onnx"))
    assert isinstance(result, BenchResult)
    (run,) = result.runs
    assert run.device.emulated
    assert run.threads == 1
    assert run.samples == []
    assert {figure for _, figure in run.figures} == {None}
    assert run.instructions is not None
    assert run.instructions.per_decode_token == run.instructions.decode / (OPTIONS.new_tokens - 1)


def test_the_committed_baseline_is_one_that_the_gate_can_read():
    baseline = read_result(ROOT / "benchmarks" / "baselines" / "demo-arm64.json")
    assert isinstance(baseline, BenchResult)
    assert [(run.runtime.name, run.device.address) for run in baseline.runs] == [
        (runtime, f"qemu:arm64@{profile}")
        for profile in ("cortex-a53", "cortex-a76", "max")
        for runtime in ("onnx", "executorch")
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    gates = parse_gates(makefile.partition("--gate '")[2].partition("'")[0])
    assert {gate.figure for gate in gates} <= {*FIGURES, "arm64_instructions"}
