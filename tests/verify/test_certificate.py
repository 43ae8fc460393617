"""Certificates as users issue them: of a written bundle, alone and with its checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import pocketlm
from pocketlm.certificate import Certificate
from pocketlm.runtimes import executorch
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from pocketlm_export.verify import thresholds
from tests.verify.injection import copied_with_fault, places_of

LEVELS = [1, 2, 3, 4, 5]
APPLE_ONLY = [3, 4]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Path:
    return tiny_checkpoint("qwen2-window")[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def exported(checkpoint, store, tmp_path_factory) -> pocketlm.Bundle:
    options = ExportOptions(store=store, verify=True, oracle="transformers")
    return export_bundle(str(checkpoint), tmp_path_factory.mktemp("bundle") / "bundle", options)


def statuses(certificate: Certificate, target: str) -> dict[int, str]:
    return {level.level: level.status for level in certificate.targets[target].levels}


def test_an_export_ends_with_its_certificate(exported):
    certificate = exported.certificate
    assert certificate.passed
    assert list(certificate.targets) == ["onnx", "executorch", "coreml"]
    for target in ("onnx", "executorch"):
        assert statuses(certificate, target) == dict.fromkeys(LEVELS, "passed")
    expected = {level: "not run" if level in APPLE_ONLY else "passed" for level in LEVELS}
    assert statuses(certificate, "coreml") == expected
    assert all(level.reason for level in certificate.targets["coreml"].levels if level.status == "not run")
    assert certificate.oracle.status == "passed"
    assert certificate.loss.mean_kl > 0
    assert certificate.evidence.decode_steps >= 64
    assert 11 in certificate.evidence.probes  # the edge of the window


def test_a_bundle_alone_is_verified_without_loss_and_oracle(exported, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(exported.folder, folder)
    (folder / "certificate.json").unlink()
    certificate = pocketlm.verify(folder)
    assert certificate.passed
    assert (certificate.loss, certificate.oracle) == (None, None)
    issued = exported.certificate.targets
    for target, found in certificate.targets.items():
        assert statuses(certificate, target) == {level.level: level.status for level in issued[target].levels}
        assert found.levels[1].checks == issued[target].levels[1].checks  # float64: the same digits
    assert pocketlm.open(folder).certificate == certificate


def test_a_bundle_of_core_ml_alone_says_what_it_can_not_compare(tiny_bundle, tmp_path):
    # float32 vectors, which fp16 does not hold exactly
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("llama-odd-vocabulary", "int4", "coreml").folder, folder)
    certificate = pocketlm.verify(folder)
    assert certificate.passed
    assert certificate.targets["coreml"].levels[0].facts["not comparable without the checkpoint"] > 0


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_what_is_too_large_for_a_session_runs_in_parts(target, exported, checkpoint, store, tmp_path, monkeypatch):
    folder = shutil.copytree(exported.folder, tmp_path / "bundle")
    monkeypatch.setenv(executorch.CHOICE, "torch")  # the binding that runs the parts
    options = {"reference": checkpoint, "store": store, "targets": [target]}
    whole = pocketlm.verify(folder, **options).targets[target].levels[-1].facts
    monkeypatch.setattr(f"pocketlm_export.backends.{target}.read.LARGEST_SESSION", 0)
    certificate = pocketlm.verify(folder, **options)
    assert certificate.passed
    facts = certificate.targets[target].levels[-1].facts
    assert facts["runtime"] == "in parts, along the texts"
    assert [facts[name] for name in ("rms", "mean KL", "top-1")] == [
        whole[name] for name in ("rms", "mean KL", "top-1")
    ]
    assert facts["greedy steps"] == facts["positions"]


@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
def test_nothing_quantized(target, tiny_bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("llama", "fp32", target).folder, folder)
    certificate = pocketlm.verify(folder)
    assert certificate.passed
    kernels = certificate.targets[target].levels[3]
    assert (kernels.level, kernels.status) == (4, "not run")


def test_another_checkpoint_is_refused(exported, tiny_checkpoint, store):
    with pytest.raises(pocketlm.InputError, match="not the checkpoint"):
        pocketlm.verify(exported, reference=tiny_checkpoint("qwen2")[0], store=store)


def test_an_oracle_needs_the_checkpoint_and_a_known_name(exported, checkpoint, store):
    with pytest.raises(pocketlm.InputError, match="--reference"):
        pocketlm.verify(exported, oracle="transformers")
    with pytest.raises(pocketlm.InputError, match="valid: transformers"):
        pocketlm.verify(exported, reference=checkpoint, oracle="delphi", store=store)


def test_a_target_that_is_not_there_is_refused(tiny_bundle):
    with pytest.raises(pocketlm.InputError, match="no coreml artifact"):
        pocketlm.verify(tiny_bundle("llama", "fp32", "onnx"), targets=("coreml",))


def test_the_certificate_is_bound_to_the_manifest_and_to_itself(exported, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(exported.folder, folder)
    path = folder / "certificate.json"
    document = json.loads(path.read_text())
    document["targets"]["onnx"]["levels"][1]["checks"][0]["figure"] = 1e-16
    path.write_text(json.dumps(document))
    with pytest.raises(pocketlm.BundleError, match=r"certificate\.json: altered"):
        pocketlm.open(folder)
    shutil.copyfile(exported.folder / "certificate.json", path)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(pocketlm.BundleError, match=r"certificate\.json: of another manifest"):
        pocketlm.open(folder)


def test_an_export_that_fails_its_verification_leaves_nothing(checkpoint, store, tmp_path, monkeypatch):
    nothing_passes = dataclasses.replace(thresholds.GRAPH, limit=0.0)
    monkeypatch.setattr("pocketlm_export.verify.levels.GRAPH", nothing_passes)
    options = ExportOptions(targets=("onnx",), store=store, verify=True)
    with pytest.raises(pocketlm.CheckError, match=r"onnx: level 2 \(graph\) failed: .*--no-verify"):
        export_bundle(str(checkpoint), tmp_path / "folder" / "bundle", options)
    assert list(tmp_path.iterdir()) == []


def test_a_faulty_bundle_keeps_a_certificate_that_says_so(exported, tmp_path):
    (place, *_) = places_of("onnx", "a bias missing", exported)
    faulty = copied_with_fault(exported, "onnx", "a bias missing", place, tmp_path / "faulty")
    certificate = pocketlm.verify(faulty)
    assert not certificate.passed
    assert any(words.startswith("onnx: level 1 (bytes)") for words in certificate.failures)
    reopened = pocketlm.open(faulty.folder)
    assert reopened.certificate == certificate
    assert [words for words in certificate.failures if not words.startswith("onnx")] == []
