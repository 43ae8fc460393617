"""Level 5 of int8 artifacts with experts: a near tie that rounded activations turned is followed, a fault never is."""

import numpy as np
import pytest

from pocketlm.bundle import Bundle
from pocketlm.certificate import Level
from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.reading import LARGEST_SESSION
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.artifact import (
    EAGER_LANE,
    EXACT_LANE,
    Artifact,
    judge_whole,
    open_artifact,
    reference_lanes,
)
from pocketlm_export.verify.evidence import choose_runs
from pocketlm_export.verify.lockstep import run_lanes
from pocketlm_export.verify.subject import scheme_rows
from tests.verify.injection import copied_with_fault, faults, places_of

TARGETS = ("onnx", "executorch")
FAULTS = [(target, fault) for target in TARGETS for fault in faults(target, "expert_faults")]


class Judge:
    """Level 5 of copies of one right bundle, each with a fault or without, by itself."""

    def __init__(self, bundle: Bundle, target: str, checkpoint, store: WeightStore) -> None:
        opened = open_checkpoint(checkpoint)
        self.bundle, self.target = bundle, target
        self.graph = build_graph(opened.config, bundle.manifest.model.context_length)
        self.weights = quantize(opened.tensors, scheme_rows(bundle), store)
        self.runs = choose_runs(self.graph, bundle.manifest.targets[target], bundle.tokenizer, 0)
        self.artifact = self.open(bundle)
        self.traces = run_lanes(self.graph, reference_lanes(self.artifact, self.runs, self.weights))

    def open(self, bundle: Bundle) -> Artifact:
        artifact = open_artifact(bundle, self.target)
        assert isinstance(artifact, Artifact)
        return artifact

    def level(self, bundle: Bundle) -> Level:
        exact, eager = self.traces[EXACT_LANE], self.traces[EAGER_LANE]
        return judge_whole(self.open(bundle), self.graph, self.runs, exact, eager, self.traces, self.weights)


@pytest.fixture(scope="module")
def judge(tiny_bundle, tiny_checkpoint, tmp_path_factory):
    """``judge(row, scheme, target)``, each made once."""
    store, made = WeightStore(tmp_path_factory.mktemp("store")), {}

    def of(row: str, scheme: str, target: str) -> Judge:
        key = row, scheme, target
        if key not in made:
            made[key] = Judge(tiny_bundle(row, scheme, target), target, tiny_checkpoint(row)[0], store)
        return made[key]

    return of


@pytest.mark.parametrize("largest_session", [LARGEST_SESSION, 0])
@pytest.mark.parametrize("target", TARGETS)
def test_a_choice_that_rounding_turned_is_followed_and_counted(target, largest_session, judge, monkeypatch):
    monkeypatch.setattr(f"pocketlm_export.backends.{target}.read.LARGEST_SESSION", largest_session)
    right = judge("qwen3-moe", "int4", target)
    level = right.level(right.bundle)
    assert level.status == "passed"
    assert ("runtime" in level.facts) == (largest_session == 0)
    assert 1 <= level.facts["followed at a near tie"] <= level.facts["choices of experts"] / 20
    assert level.facts["others that differ"] == 0
    assert 0 < level.facts["near tie"] < 0.3


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_not_rounded_follows_nothing(target, judge):
    right = judge("qwen3-moe", "fp32", target)
    level = right.level(right.bundle)
    assert level.status == "passed"
    assert "near tie" not in level.facts


@pytest.mark.parametrize(
    ("target", "limit"),
    [("onnx", "onnx.pieces.LARGEST_PIECE"), ("executorch", "executorch.reading.parts.LARGEST_PART")],
)
@pytest.mark.parametrize("largest", [1 << 30, 1])
def test_chosen_experts_are_those_of_the_reference_where_nothing_is_rounded(target, limit, largest, judge, monkeypatch):
    monkeypatch.setattr(f"pocketlm_export.backends.{limit}", largest)
    right = judge("qwen3-moe-mixed", "fp32", target)
    found = right.artifact.reader.chosen_experts(right.runs.texts)
    expected = right.traces[EXACT_LANE][: len(found)]
    for ours, theirs in zip(expected, found, strict=True):
        assert len(ours.experts) > 0
        for mixture, chosen in zip(ours.experts, theirs.experts, strict=True):
            np.testing.assert_array_equal(np.sort(chosen, -1), np.sort(mixture, -1))


@pytest.mark.parametrize(("target", "fault"), FAULTS)
def test_a_fault_is_not_followed(target, fault, judge, tmp_path):
    right = judge("mixtral", "int4", target)
    places = places_of(target, fault, right.bundle)
    faulty = copied_with_fault(right.bundle, target, fault, places[len(places) // 2], tmp_path / "faulty")
    assert right.level(faulty).status == "failed"
