"""`pocketlm export`: what it prints, leaves and refuses."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketlm.bundle import open_bundle
from tests.cli.conftest import PROGRAM
from tests.peft_adapter import write_adapter
from tests.small_checkpoint import write_small_checkpoint


def refused(process: subprocess.CompletedProcess, *needles: str, code: int = 2) -> None:
    """One short line on stderr that says what is wrong, nothing on stdout, no traceback."""
    assert process.returncode == code, process.stderr
    assert process.stdout == ""
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for needle in needles:
        assert needle in errors[0]


def test_json_is_one_document_and_progress_goes_to_stderr(exported):
    process, bundle = exported
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document["path"] == str(bundle)
    assert set(document["targets"]) == {"onnx", "executorch", "coreml"}
    assert document["scheme"]["linears"] == "int4"
    assert document["scheme"]["head"] == "int8"
    statuses = [level["status"] for target in document["certificate"]["targets"].values() for level in target["levels"]]
    assert (len(statuses), statuses.count("passed"), statuses.count("failed")) == (15, 13, 0)
    stages = [line for line in process.stderr.splitlines() if not line.startswith("W")]
    assert stages[0] == "reading the checkpoint"
    assert [stage.split(" (")[0] for stage in stages if stage.startswith("writing")] == [
        "writing onnx", "writing executorch", "writing coreml",
    ]  # fmt: skip


def test_nothing_but_the_bundle_is_left(exported):
    _, bundle = exported
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_text_output_and_recipe(pocketlm, checkpoint, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('targets = ["onnx"]\nscheme = "int8"\ncontext = 32\n')
    output = tmp_path / "bundle"
    process = pocketlm("export", checkpoint, "-o", output, "--config", recipe, "--scheme", "fp32", "--no-verify")
    assert process.returncode == 0, process.stderr
    assert "fp32: linears fp32" in process.stdout, "the command line wins over the recipe"
    assert "not verified: --no-verify" in process.stdout
    manifest = json.loads((output / "manifest.json").read_text())
    assert list(manifest["targets"]) == ["onnx"]
    assert manifest["model"]["context_length"] == 32


def test_the_group_size_of_the_command_line_wins_over_the_recipes(pocketlm, checkpoint, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('targets = ["onnx"]\ngroup = 64\nverify = false\n')
    for arguments, group in (((), 64), (("--group-size", "128"), 128)):
        output = tmp_path / f"bundle-{group}"
        process = pocketlm("export", checkpoint, "-o", output, "--config", recipe, *arguments)
        assert process.returncode == 0, process.stderr
        assert f"; groups of {group} columns; " in process.stdout
        assert json.loads((output / "manifest.json").read_text())["scheme"]["group"] == group


@pytest.mark.parametrize(
    ("arguments", "needles"),
    (
        (["--targets", "onnx,tflite"], ["'tflite'", "onnx, executorch, coreml"]),
        (["--targets", "onnx,onnx"], ["each target once"]),
        (["--scheme", "int3"], ["'int3'", "int4"]),
        (["--head", "fp8"], ["'fp8'", "int8"]),
        (["--group-size", "48"], ["48", "32, 64, 128"]),
        (["--context", "65"], ["65", "64", "max_position_embeddings"]),
        (["--context", "1"], ["context", "at least 2"]),
        (["--config", "missing.toml"], ["missing.toml"]),
    ),
    ids=lambda value: "-".join(value).strip("-").replace(",", "+") if isinstance(value, list) else None,
)
def test_bad_options_are_refused(arguments, needles, pocketlm, checkpoint, tmp_path):
    refused(pocketlm("export", checkpoint, "-o", tmp_path / "b", *arguments), *needles)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "needle"),
    (
        ("targtes = []", "'targtes'"),
        ("context = true", "'context'"),
        ("scheme = 4", "'scheme'"),
        ("group = true", "'group'"),
        ("= 1", "not valid TOML"),
    ),
)
def test_bad_recipes_are_refused_with_file_and_key(content, needle, pocketlm, checkpoint, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(content)
    refused(pocketlm("export", checkpoint, "-o", tmp_path / "b", "--config", recipe), "recipe.toml", needle)


def test_an_existing_output_is_kept_unless_forced(pocketlm, bundle, checkpoint, tmp_path):
    output = shutil.copytree(bundle, tmp_path / "bundle")
    export = ("export", checkpoint, "-o", output, "--targets", "onnx")
    before = (output / "manifest.json").read_bytes()
    refused(pocketlm(*export, "--scheme", "int8"), str(output), "--force")
    assert (output / "manifest.json").read_bytes() == before
    assert pocketlm(*export, "--scheme", "int8", "--force").returncode == 0
    assert json.loads((output / "manifest.json").read_text())["scheme"]["name"] == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_usage_errors_exit_with_2(pocketlm, checkpoint):
    for arguments in (["export", checkpoint], ["export"], ["explode"], ["export", checkpoint, "-o", "b", "--fast"]):
        process = pocketlm(*arguments)
        assert process.returncode == 2
        assert process.stdout == ""


def test_debug_shows_the_traceback(pocketlm, tmp_path):
    process = pocketlm("export", tmp_path / "nowhere", "-o", tmp_path / "b", "--debug")
    assert process.returncode == 2
    assert "Traceback" in process.stderr
    assert "error: " in process.stderr.splitlines()[-1]


INTERRUPTS = (
    (signal.SIGTERM, "reading"),
    (signal.SIGINT, "quantizing"),
    (signal.SIGHUP, "writing"),
)


@pytest.mark.parametrize(("number", "stage"), INTERRUPTS)
def test_an_interrupt_leaves_nothing_behind(number, stage, environment, store, tmp_path):
    source = write_small_checkpoint(tmp_path / "source", num_hidden_layers=24, hidden_size=128, intermediate_size=256)
    place = tmp_path / "place"
    command = [*PROGRAM, "export", str(source), "-o", str(place / "new" / "bundle")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stderr:
            if line.startswith(stage):
                break
        time.sleep(0.1)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert stdout == ""
    assert not place.exists()
    assert not list(store.rglob(".*")), "no half-written entry"


def test_a_full_disk_is_one_message(pocketlm, checkpoint, tmp_path):
    if os.geteuid() != 0 or subprocess.run(["mountpoint", "-q", "/dev/shm"], check=False).returncode:
        pytest.skip("not run: needs the right to mount a small file system")
    place = tmp_path / "small-disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("not run: needs the right to mount a small file system")
    try:
        refused(pocketlm("export", checkpoint, "-o", place / "bundle", "--targets", "onnx"), "the export needs")
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)


def test_two_exports_to_one_place_leave_one_whole_bundle(environment, checkpoint, tmp_path):
    output = tmp_path / "bundle"
    command = [*PROGRAM, "export", str(checkpoint), "-o", str(output), "--targets", "onnx"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in "ab"
    ]
    results = [(process.communicate(timeout=120), process.returncode) for process in both]
    assert sorted(code for _, code in results) == [0, 2], results
    (error,) = [stderr for (_, stderr), code in results if code == 2]
    assert "exists already" in error
    open_bundle(output).check_files()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


ADAPTED = ("--targets", "onnx", "--scheme", "fp32", "--json")
TARGETS = {"target_modules": ["q_proj", "down_proj"]}


def adapter_digest(process: subprocess.CompletedProcess, bundle: Path) -> str | None:
    assert process.returncode == 0, process.stderr
    return json.loads((bundle / "manifest.json").read_text())["provenance"].get("adapter_sha256")


def test_an_adapter_is_merged_and_named_by_its_hash(pocketlm, checkpoint, tmp_path):
    merged = write_adapter(checkpoint, tmp_path / "adapter", **TARGETS)
    export = ("export", checkpoint, *ADAPTED, "-o")
    output = tmp_path / "adapted"
    digest = adapter_digest(pocketlm(*export, output, "--adapter", tmp_path / "adapter"), output)
    tokens = list(range(5, 45))
    with torch.no_grad():
        expected = merged(torch.tensor([tokens])).logits[0, -1].numpy()
    with open_bundle(output).session("onnx", threads=1) as session:
        found = session.extend(tokens)[-1]
    assert np.abs(found - expected).max() <= 1e-3 * expected.std()  # as unadapted models agree, tests/architectures

    checked = pocketlm("verify", output, "--reference", checkpoint, "--adapter", tmp_path / "adapter")
    assert checked.returncode == 0, checked.stderr
    refused(pocketlm("verify", output, "--reference", checkpoint), "made with an adapter", "--adapter")

    shutil.copytree(tmp_path / "adapter", tmp_path / "moved")
    write_adapter(checkpoint, tmp_path / "other", **TARGETS, use_rslora=True)
    arguments = {"again": ("--adapter", tmp_path / "moved"), "other": ("--adapter", tmp_path / "other"), "plain": ()}
    digests = {
        name: adapter_digest(pocketlm(*export, tmp_path / f"{name}-bundle", *given), tmp_path / f"{name}-bundle")
        for name, given in arguments.items()
    }
    assert digest is not None and len(digest) == 64
    assert digests["again"] == digest
    assert digests["other"] not in (None, digest)
    assert digests["plain"] is None


def test_an_adapter_that_cannot_be_merged_is_refused(pocketlm, checkpoint, tmp_path):
    larger = write_small_checkpoint(tmp_path / "larger", hidden_size=64)
    deeper = write_small_checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    write_adapter(larger, tmp_path / "wider-base", **TARGETS)
    write_adapter(deeper, tmp_path / "deeper-base", **TARGETS)
    write_adapter(checkpoint, tmp_path / "dora", **TARGETS, use_dora=True)
    for name, needles in (
        ("wider-base", ("adapter_model.safetensors", "has shape [64, 4]", "ask for [32, 4]")),
        ("deeper-base", ("adapter_model.safetensors", "layers.2", "another base")),
        ("dora", ("adapter_config.json", "'use_dora'", "merge it with PEFT")),
        ("nowhere", ("nowhere/adapter_config.json", "no such file")),
    ):
        output = tmp_path / f"{name}-bundle"
        refused(pocketlm("export", checkpoint, *ADAPTED, "-o", output, "--adapter", tmp_path / name), *needles)
        assert not output.exists()
