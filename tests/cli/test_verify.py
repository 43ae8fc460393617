"""``pocketlm verify`` as a user runs it."""

import json
import shutil

import pytest

from pocketlm.bundle import open_bundle
from tests.cli.test_export import refused
from tests.verify.injection import copied_with_fault, places_of


def test_the_table_and_its_verdict(pocketlm, bundle, tmp_path):
    copy = tmp_path / "copy.pocketlm"
    shutil.copytree(bundle, copy)
    (copy / "certificate.json").unlink()
    process = pocketlm("verify", copy, "--targets", "onnx,coreml")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [["onnx", "1", "bytes"], ["2", "graph", "passed"]]
    assert any(line.startswith("oracle") and line.endswith("none") for line in lines)
    assert lines[-1] == "verified: 8 passed, 0 failed, 2 not run of 10 levels"
    shown = pocketlm("inspect", copy)
    assert "2 not run of 10 levels" in shown.stdout


def test_json_with_checkpoint_and_oracle(pocketlm, bundle, checkpoint):
    process = pocketlm("verify", bundle, "--reference", checkpoint, "--oracle", "transformers", "--json")
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document["passed"] is True
    assert document["oracle"]["status"] == "passed"
    assert document["loss"]["mean_kl"] > 0
    assert document == {**json.loads((bundle / "certificate.json").read_text()), "passed": True}


@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
def test_a_fault_is_exit_code_1_and_named(target, pocketlm, bundle, tmp_path):
    sound = open_bundle(bundle)
    place = places_of(target, "nibbles swapped", sound)[0]
    faulty = copied_with_fault(sound, target, "nibbles swapped", place, tmp_path / "faulty")
    process = pocketlm("verify", faulty.folder, "--targets", target)
    assert process.returncode == 1, process.stderr
    assert process.stdout.splitlines()[0].split()[:4] == [target, "1", "bytes", "FAILED"]
    assert process.stdout.splitlines()[-1].startswith("NOT VERIFIED: ")


def test_bad_usage_is_exit_code_2(pocketlm, bundle, tmp_path):
    refused(pocketlm("verify", tmp_path / "nowhere"), "nowhere", "no such bundle")
    refused(pocketlm("verify", bundle, "--targets", "tflite"), "no tflite artifact")
    refused(pocketlm("verify", bundle, "--oracle", "transformers"), "--reference")
