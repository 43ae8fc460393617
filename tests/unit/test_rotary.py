"""Rotary frequencies and tables against transformers' own."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pocketlm_export.architectures import load_architecture
from pocketlm_export.fields import Fields
from pocketlm_export.graph.rotary import rotary_tables

SIZES = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
ROPES = {
    "default": {"rope_theta": 1e4},
    "default-large-theta": {"rope_theta": 1e6, "head_dim": 128},
    "linear": {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3-new-spelling": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "odd-head-dim": {"rope_theta": 1e4, "head_dim": 20},
}


def both(rope: dict) -> tuple:
    fields = Fields({"model_type": "llama", **SIZES, **rope}, "config.json")
    ours = load_architecture("llama", "config.json").configure(fields).layers[0].rotary
    config = AutoConfig.for_model("llama", **{**SIZES, **rope})
    return ours, config


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name):
    ours, config = both(ROPES[name])
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        expected, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert scale == ours.scale
    # transformers computes in float32: a frequency may be off by the rounding of one power and one division.
    np.testing.assert_allclose(ours.frequencies, expected.numpy(), rtol=4e-7)


@pytest.mark.parametrize("name", ROPES)
def test_tables_equal_transformers(name):
    ours, config = both(ROPES[name])
    length = 512
    cosine, sine = rotary_tables(ours, length)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1, length, 8), torch.arange(length)[None])
    half = len(ours.frequencies)
    # The rounding of a frequency grows with the position: 512 * 4e-7.
    np.testing.assert_allclose(cosine, expected[0][0, :, :half].numpy(), atol=2e-4)
    np.testing.assert_allclose(sine, expected[1][0, :, :half].numpy(), atol=2e-4)
    assert cosine.dtype == sine.dtype == np.float32
    assert (cosine[0] == 1).all()
    assert (sine[0] == 0).all()


def test_a_frequency_beyond_the_original_context_is_divided_by_the_factor():
    plain, _ = both(ROPES["default"] | {"rope_theta": 5e5})
    scaled, _ = both(ROPES["llama3"])
    assert scaled.frequencies[0] == plain.frequencies[0]
    assert scaled.frequencies[-1] == pytest.approx(plain.frequencies[-1] / 8, rel=1e-7)
