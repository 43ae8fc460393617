"""The export benchmark: what it counts and reports. How fast anything is, no test asks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pocketlm.errors import InputError
from pocketlm_bench.measured_export import export_measured
from pocketlm_bench.memory_curve import curve
from pocketlm_export.options import ExportOptions
from tests.small_checkpoint import write_small_checkpoint

STAGES = ["start", "read", "quantize", "write onnx", "golden", "finish"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="module")
def reported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The finished command, its JSON document, and the bundle that it kept."""
    folder = tmp_path_factory.mktemp("reports")
    command = [
        sys.executable, "-m", "pocketlm_bench.export", checkpoint, "--targets", "onnx", "--repetitions", 1,
        "--scratch", folder, "--keep", folder / "kept", "--json", folder / "results" / "export.json",
    ]  # fmt: skip
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in folder.iterdir()} == {"kept", "results"}, "scratch is removed"
    return process, json.loads((folder / "results" / "export.json").read_text()), folder / "kept"


def test_both_states_of_the_store(reported):
    process, document, _ = reported
    assert [run["store"] for run in document["exports"]] == ["empty", "warm"]
    assert document["options"] == {
        "targets": ["onnx"], "scheme": "int4", "head": "int8", "group": 32, "context": None, "verify": False,
    }  # fmt: skip
    assert document["machine"]["features"] in process.stdout
    for state in ("empty", "warm"):
        assert f"store {state}, 1 exports, medians:" in process.stdout


def test_stages_add_up_to_the_whole(reported):
    _, document, _ = reported
    for run in document["exports"]:
        assert [stage["name"] for stage in run["stages"]] == [*STAGES, "exit"]
        assert sum(stage["wall_seconds"] for stage in run["stages"]) == pytest.approx(run["wall_seconds"])
        told = [stage for stage in run["stages"] if stage["name"] != "exit"]
        assert all(0 <= stage["import_seconds"] <= stage["wall_seconds"] for stage in told)
        assert sum(stage["cpu_seconds"] for stage in told) <= run["user_seconds"] + run["system_seconds"] + 0.05
        peaks = [stage["peak"] for stage in run["stages"] if stage["peak"] is not None]
        assert max(peak["anonymous"] for peak in peaks) == run["peak"]["anonymous"]
        assert max(peak["resident"] for peak in peaks) <= run["highest_resident"]


def test_sizes_are_those_of_the_kept_bundle(reported):
    _, document, kept = reported
    for run in document["exports"]:
        assert run["parameters"] == 300 * 32 + 2 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32) + 32
        assert run["seconds_per_billion"] == pytest.approx(run["wall_seconds"] / run["parameters"] * 1e9)
        for name, size in run["artifacts"]["onnx"].items():
            assert (kept / name).stat().st_size == size


def test_errors_of_the_export_are_the_programs(checkpoint, tmp_path):
    options = ExportOptions(targets=("onnx",), context=65, verify=False)
    with pytest.raises(InputError, match="65 is longer than the model's 64"):
        export_measured(checkpoint, tmp_path / "bundle", tmp_path / "store", options)
    with pytest.raises(InputError, match="no such folder"):
        export_measured(tmp_path / "nowhere", tmp_path / "bundle", tmp_path / "store", ExportOptions())


def test_a_curve_refuses_before_it_writes(tmp_path):
    with pytest.raises(InputError, match="--layers must be at least 1, not 0"):
        list(curve("Mistral-7B", [1, 0], tmp_path, ExportOptions()))
    assert list(tmp_path.iterdir()) == []


def test_results_become_tables_of_a_page(reported, tmp_path):
    _, document, kept = reported
    results = kept.parent / "results" / "export.json"
    page = tmp_path / "performance.md"
    page.write_text("# Performance\n<!-- export -->\nformer table\n<!-- end of export -->\nafter\n")
    command = [sys.executable, "-m", "pocketlm_bench.performance", str(page), str(results)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    text = page.read_text()
    assert text.startswith("# Performance\n<!-- export -->\n`python -m pocketlm_bench.export ")
    assert text.endswith("|\n<!-- end of export -->\nafter\n")
    assert "former table" not in text
    assert document["date"] in text
    assert document["machine"]["features"] in text
    for stage in (*STAGES, "exit"):
        assert text.count(f"\n| {stage} | ") == 2, "one for each state of the store"
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables if line.startswith(("| store | ", "| empty | ", "| warm | "))} == {9}
    results.with_name("other.json").write_text(json.dumps({**document, "kind": "weather"}))
    refused = subprocess.run(
        [*command[:-1], results.with_name("other.json")], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stderr) == (
        2, "error: kind 'weather' has no table; valid: export, memory curve, groups, models\n",
    )  # fmt: skip
