import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pocketlm.errors import InputError, PocketLMError
from pocketlm.sampling import Sampler, Sampling

GRID = list(itertools.product((0.3, 1.0, 1.7), (0, 1, 20), (0.0, 0.5, 0.95, 1.0), (0.0, 0.05, 0.6), (1.0, 1.3)))


def of_transformers(options: Sampling, logits: np.ndarray, history: list[int]) -> np.ndarray:
    """Probabilities over the whole vocabulary after transformers' processors, in transformers' order, in float64."""
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    scores = processors(torch.tensor([history]), torch.from_numpy(logits.astype(np.float64))[None])
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("size", [50, 5000])
def test_kept_tokens_and_probabilities_are_those_of_transformers(size: int) -> None:
    random = np.random.default_rng(7)
    for temperature, top_k, top_p, min_p, penalty in GRID:
        options = Sampling(temperature, top_k, top_p, min_p, penalty)
        logits = random.normal(0, 4, size).astype(np.float32)
        history = random.integers(0, size, 12).tolist()
        tokens, probabilities = Sampler(options).distribution(logits, history)
        expected = of_transformers(options, logits, history)
        assert tokens.tolist() == np.flatnonzero(expected).tolist(), options
        np.testing.assert_allclose(probabilities, expected[tokens], rtol=1e-12)


def test_equal_logits_are_kept_as_transformers_keeps_them() -> None:
    even = np.zeros(4, np.float32)
    assert Sampler(Sampling(1.0, top_p=0.5)).distribution(even, [0])[0].tolist() == [2, 3]
    logits = np.repeat(np.array([3, 2, 1, 0], np.float32), 2)
    for options in (
        Sampling(1.0, top_k=3),
        Sampling(1.0, top_p=0.5),
        Sampling(1.0, top_p=0.8),
        Sampling(1.0, min_p=0.3),
    ):
        tokens, _ = Sampler(options).distribution(logits, [0])
        assert tokens.tolist() == np.flatnonzero(of_transformers(options, logits, [0])).tolist()


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    temperature=st.floats(1e-300, 1e4),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64),
)
@settings(deadline=None)
def test_the_best_token_is_always_among_the_kept(logits, temperature, top_k, top_p, min_p, seed) -> None:
    scores = np.array(logits, np.float32)
    sampler = Sampler(Sampling(temperature, top_k, top_p, min_p, seed=seed))
    tokens, probabilities = sampler.distribution(scores, [])
    assert scores[tokens].max() == scores.max()
    assert abs(probabilities.sum() - 1) < 1e-9
    assert sampler.sample(scores, []) in tokens


def test_the_best_token_is_kept_where_probabilities_round_to_the_same() -> None:
    tokens, _ = Sampler(Sampling(1.0, top_p=0.0)).distribution(np.array([0.0, -1.2e-38], np.float32), [])
    assert tokens.tolist() == [0]


def test_temperature_0_is_greedy_after_the_repetition_penalty() -> None:
    logits = np.array([1.0, 4.0, 3.9, -1.0], np.float32)
    assert Sampler(Sampling(0)).sample(logits, [1]) == 1
    assert Sampler(Sampling(0, repetition_penalty=1.5)).sample(logits, [1, 1, 99]) == 2


def test_a_seed_gives_the_same_tokens_on_every_machine() -> None:
    logits = np.linspace(0, 1, 100, dtype=np.float32)
    sampler = Sampler(Sampling(1.0, seed=42))
    assert [sampler.sample(logits, []) for _ in range(8)] == [84, 56, 90, 78, 15, 98, 83, 85]
    assert Sampler(Sampling(1.0, seed=43)).sample(logits, []) != 84


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(1.0, seed=1))
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    counts = np.bincount([sampler.sample(logits, []) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"seed": -3},
    ],
)
def test_bad_options_are_refused_by_name(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(PocketLMError, match="NaN"):
        Sampler(Sampling()).sample(np.array([1, np.nan], np.float32), [])


LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("defaults", "given", "expected"),
    [
        ({}, {}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9}, {}, Sampling()),
        ({"do_sample": False, "repetition_penalty": 1.1}, {}, Sampling(repetition_penalty=1.1)),
        (LLAMA, {}, Sampling(0.6, 50, 0.9)),
        (LLAMA, {"temperature": 0.0}, Sampling()),
        (LLAMA, {"temperature": 0.0, "top_p": 0.5}, Sampling()),
        (LLAMA, {"top_k": 0, "seed": 3}, Sampling(0.6, 0, 0.9, seed=3)),
        ({"do_sample": True, "top_k": 20, "min_p": None}, {"min_p": 0.1}, Sampling(1.0, 20, 1.0, 0.1)),
        ({"top_p": 0.8}, {"temperature": 0.7}, Sampling(0.7, 50, 0.8)),
        ({}, {"top_p": 0.5}, Sampling(1.0, 50, 0.5)),
        ({}, {"seed": 1}, Sampling(seed=1)),
    ],
)
def test_defaults_of_the_model_and_explicit_values(defaults: dict, given: dict, expected: Sampling) -> None:
    assert Sampling.resolve(defaults, **given) == expected


def test_a_default_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match=r"generation_config\.json: top_p"):
        Sampling.resolve({"do_sample": True, "top_p": "0.9"})
