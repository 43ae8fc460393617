"""Every target is verified in the calls that it takes: one token in Core ML with experts, whole prompts elsewhere."""

from pathlib import Path

import pytest
from onnx import TensorProto, helper

import pocketlm
from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from tests.verify.injection import sealed
from tests.verify.onnx_expert_faults import mixtures
from tests.verify.onnx_faults import insert_before, load

CONTEXT = 160


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory) -> pocketlm.Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    options = ExportOptions(context=CONTEXT, store=folder / "store", verify=False)
    return export_bundle(str(tiny_checkpoint("mixtral")[0]), folder / "bundle", options)


@pytest.fixture(scope="module")
def certificate(bundle):
    return pocketlm.verify(bundle)


def phases(certificate, target: str, level: int) -> set[str]:
    (found,) = (item for item in certificate.targets[target].levels if item.level == level)
    return {check.name.partition(":")[0] for check in found.checks}


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_prompts_are_prefilled_beside_a_core_ml_package_that_takes_one_token(target, bundle, certificate):
    assert bundle.manifest.targets["coreml"].longest_call == 1
    assert certificate.passed
    assert certificate.evidence.prefill_tokens > 100
    for level in (2, 3):
        assert {"logits, prefill", "logits, decode"} <= phases(certificate, target, level)


def test_a_target_in_shorter_calls_is_judged_in_those_and_says_so(certificate):
    assert phases(certificate, "coreml", 2) & {"logits, prefill", "logits, decode"} == {"logits, decode"}
    notes = certificate.targets["coreml"].notes
    assert any(note.startswith("the same tokens in shorter calls: 0 tokens of prefill") for note in notes)


def test_a_fault_of_prefill_alone_is_caught(bundle, tmp_path):
    path = bundle.folder / "onnx" / "model.onnx"
    files = {"onnx/model.onnx": with_louder_experts_in_prefill(path.parent)}
    certificate = pocketlm.verify(sealed(bundle, tmp_path / "faulty", files), targets=["onnx"])
    (level,) = (item for item in certificate.targets["onnx"].levels if item.level == 2)
    assert level.status == "failed"
    assert "logits, prefill: largest difference" in level.reason


def with_louder_experts_in_prefill(folder: Path) -> bytes:
    """The model with what the first layer's experts make times 1 in calls of one token, 1.01 in longer ones."""
    model = load(folder)
    node = mixtures(model)[0]
    after = model.graph.node[list(model.graph.node).index(node) + 1]
    output, quiet = node.output[0], f"{node.output[0]}.quiet"
    node.output[0] = quiet
    loudness = [1.0, 1.0, *[1.01] * CONTEXT]  # by the length of a call
    model.graph.initializer.append(helper.make_tensor("loudness", TensorProto.FLOAT, [len(loudness)], loudness))
    for new in (
        helper.make_node("Shape", ["input_ids"], ["length"], "length", start=1),
        helper.make_node("Gather", ["loudness", "length"], ["factor"], "factor"),
        helper.make_node("Mul", [quiet, "factor"], [output], "louder"),
    ):
        insert_before(model, after, new)
    return model.SerializeToString()
