"""The reference in lockstep against the eager decoder, and the comparison of traces."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocketlm_export.architectures import build_graph
from pocketlm_export.backends.reading import Call, Past, Run, Trace
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.comparison import cache_deviations, likeness, logit_deviations, router_noise
from pocketlm_export.verify.lockstep import Lane, run_lanes
from pocketlm_export.verify.reference import ReferenceSession

CONTEXT = 96


@pytest.mark.parametrize("name", ["llama-9-heads", "qwen2-window", "qwen3-biases", "smollm3-window"])
def test_lockstep_is_the_reference_session(name, tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint(name)[0])
    graph = build_graph(checkpoint.config, CONTEXT)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "int4", "int8"), WeightStore(tmp_path))
    tokens = tuple(int(token) for token in np.random.default_rng(7).integers(0, 300, 40))
    calls = (Call(tokens[:20], 8), Call(tokens[20:30], 3), *(Call((token,), 1) for token in tokens[30:]))
    # Another run beside it, and another way of computing: neither may disturb the first.
    runs = (Run("text", calls), Run("probe", (Call(tokens[:3], 3),), Past(50)))
    lanes = [
        Lane(name="exact", runs=runs, weights=weights),
        Lane(name="float32", runs=runs[:1], weights=weights, dtype=torch.float32),
    ]
    traces = run_lanes(graph, lanes)
    with ReferenceSession(graph, weights, torch.float64) as session:
        logits = session.all_logits(tokens)
    expected = np.concatenate([logits[12:20], logits[27:]])
    found = np.concatenate(traces["exact"][0].logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * expected.std())  # the session returns float32
    np.testing.assert_allclose(np.concatenate(traces["float32"][0].logits), expected, rtol=0, atol=1e-4)
    assert [keys.shape[1] for keys in traces["exact"][0].keys] == [40] * len(graph.attentions)
    assert [values.shape[1] for values in traces["exact"][1].values] == [3] * len(graph.attentions)


def test_a_filled_cache_is_what_a_prefill_leaves(tiny_checkpoint, tmp_path):
    """Tokens behind a cache see it: without the past, or with another, the logits differ."""
    checkpoint = open_checkpoint(tiny_checkpoint("llama")[0])
    graph = build_graph(checkpoint.config, CONTEXT)
    weights = quantize(checkpoint.tensors, assign_rows(graph, "int4", "int8"), WeightStore(tmp_path))
    runs = [Run("a", (Call((5, 6, 7), 3),), past) for past in (None, Past(40), Past(40, seed=1), Past(41))]
    found = run_lanes(graph, [Lane(name="exact", runs=runs, weights=weights)])["exact"]
    first, *others = (trace.logits[0] for trace in found)
    assert all(np.abs(first - other).max() > 1e-3 for other in others)


RUNS = (Run("text", (Call((1, 2, 3), 2), Call((4,), 1))), Run("probe", (Call((1,), 1),), Past(5)))


def traces(generator: np.random.Generator) -> list[Trace]:
    made = []
    for run in RUNS:
        shape = (2, len(run.tokens), 4)
        made.append(
            Trace(
                [generator.normal(size=(call.rows, 11)) for call in run.calls],
                [generator.normal(size=shape) for _ in range(3)],
                [generator.normal(size=shape) for _ in range(3)],
            )
        )
    return made


@given(st.integers(0, 99), st.sampled_from(["logits", "keys", "values"]), st.sampled_from([0, 1]), st.floats(1e-6, 1e6))
def test_one_changed_element_is_found_where_it_is(seed, side, run, size):
    reference, other = traces(np.random.default_rng(seed)), traces(np.random.default_rng(seed))
    assert all(d.largest == 0 for d in logit_deviations(RUNS, reference, other).values())
    getattr(other[run], side)[0].reshape(-1)[0] += size
    compare = logit_deviations if side == "logits" else cache_deviations
    changed = {name for name, deviation in compare(RUNS, reference, other).items() if deviation.largest > 0}
    assert changed == {"probe" if run else "prefill"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_never_passes(bad, place):
    reference, other = traces(np.random.default_rng(1)), traces(np.random.default_rng(1))
    other[0].logits[place][0, 0] = bad
    other[0].keys[place][0, 0, 0] = bad
    worst = [max(d.largest for d in compare(RUNS, reference, other).values() if not d.largest <= 1)
             for compare in (logit_deviations, cache_deviations)]  # fmt: skip
    assert all(not figure <= 1 for figure in worst)
    assert not likeness(reference, other).largest <= 1


def test_missing_layers_and_rows_are_infinitely_far():
    reference, other = traces(np.random.default_rng(1)), traces(np.random.default_rng(1))
    other[0].keys.pop()
    other[1].logits.pop()
    assert cache_deviations(RUNS, reference, other)["prefill"].largest == np.inf
    assert logit_deviations(RUNS, reference, other)["probe"].largest == np.inf


@given(st.integers(0, 99), st.floats(-9, 9), st.integers(0, 4), st.floats(0.1, 9))
def test_router_noise_is_what_moves_two_experts_apart(seed, shift, expert, size):
    scores = np.random.default_rng(seed).normal(size=(7, 5))
    reference, shifted = [Trace(scores=[scores, scores])], [Trace(scores=[scores, scores + shift])]
    assert router_noise(reference, shifted) < 1e-9  # of all experts alike: none comes closer to another
    scores = scores.copy()
    scores[3, expert] += size
    assert router_noise(reference, [Trace(scores=[scores + shift, reference[0].scores[1]])]) == pytest.approx(
        size / reference[0].scores[0].std()
    )
