"""Level 5 of Core ML packages with experts: a near tie that float16 turns is followed, a fault never is."""

import dataclasses

import pytest

from pocketlm.certificate import Level
from pocketlm_export.architectures import build_graph
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.artifact import EXACT_LANE, Artifact, judge_emulation, open_artifact
from pocketlm_export.verify.evidence import choose_runs
from pocketlm_export.verify.lockstep import Lane, run_lanes
from pocketlm_export.verify.subject import scheme_rows
from pocketlm_export.verify.thresholds import FLOAT16_LARGEST
from tests.verify.injection import copied_with_fault, places_of

# Each has choices that float16 turns, and was off by 0.19 to 1.4 deviations behind them.
WITH_TIES = [
    ("mixtral", "int4"),
    ("mixtral-window", "fp32"),
    ("mixtral-window", "int4"),
    ("qwen3-moe", "int4"),
    ("qwen3-moe-plain-shares", "int4"),
    ("qwen3-moe-mixed", "fp32"),
]
FAULTS = [
    (row, scheme, fault) for row, scheme in WITH_TIES for fault in ("two experts exchanged", "router rows exchanged")
]


@pytest.fixture(scope="module")
def whole(tiny_bundle, tiny_checkpoint, tmp_path_factory):
    """``whole(row, scheme, bundle)`` -> level 5 of the bundle, a copy of the row's with a fault or without."""
    store = WeightStore(tmp_path_factory.mktemp("store"))

    def judge(row: str, scheme: str, bundle=None) -> Level:
        right = tiny_bundle(row, scheme, "coreml")
        checkpoint = open_checkpoint(tiny_checkpoint(row)[0])
        graph = build_graph(checkpoint.config, right.manifest.model.context_length)
        weights = quantize(checkpoint.tensors, scheme_rows(right), store)
        runs = choose_runs(graph, right.manifest.targets["coreml"], right.tokenizer, 0).texts
        artifact = open_artifact(bundle or right, "coreml")
        assert isinstance(artifact, Artifact)
        lane = Lane(name=EXACT_LANE, runs=runs, weights=weights, stored=artifact.reader.stored)
        return judge_emulation(artifact, graph, runs, run_lanes(graph, [lane])[EXACT_LANE], weights)

    return judge


@pytest.mark.parametrize(("row", "scheme"), WITH_TIES)
def test_a_choice_that_rounding_turned_is_followed_and_counted(row, scheme, whole, monkeypatch):
    level = whole(row, scheme)
    assert level.status == "passed"
    (check,) = level.checks
    assert check.figure <= FLOAT16_LARGEST.limit / 2
    assert 1 <= level.facts["followed at a near tie"] <= level.facts["choices of experts"] / 100
    assert level.facts["others that differ"] == 0
    # Without it the very same package is beyond the limit.
    never = dataclasses.replace(FLOAT16_LARGEST, limit=-1.0)
    monkeypatch.setattr("pocketlm_export.verify.artifact.ROUTER_TIE", never)
    assert whole(row, scheme).status == "failed"


@pytest.mark.parametrize(("row", "scheme", "fault"), FAULTS)
def test_a_fault_is_not_followed(row, scheme, fault, whole, tiny_bundle, tmp_path):
    right = tiny_bundle(row, scheme, "coreml")
    for number, place in enumerate(places_of("coreml", fault, right)):
        if not place.scope:
            level = whole(row, scheme, copied_with_fault(right, "coreml", fault, place, tmp_path / str(number)))
            assert level.status == "failed", place
            assert level.checks[0].figure > FLOAT16_LARGEST.limit
