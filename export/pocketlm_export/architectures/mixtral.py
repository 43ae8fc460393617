"""Mixtral: Mistral with a mixture of experts in the place of every MLP."""

from dataclasses import replace

from pocketlm_export.architectures import _decoder
from pocketlm_export.architectures._configuration import (
    DecoderConfig,
    Defaults,
    read_decoder,
    read_experts,
    read_window,
    with_windows,
)
from pocketlm_export.architectures._rope import RopeDefaults
from pocketlm_export.fields import Fields

SILU = {"silu": "silu", "swish": "silu"}  # the only one between an expert's matrices


def configure(fields: Fields) -> DecoderConfig:
    """The shares of the chosen experts sum to one. No window unless ``sliding_window`` is given."""
    defaults = Defaults(kv_heads=8, rope=RopeDefaults(theta=1e6), norm_epsilon=1e-5, activations=SILU)
    config = read_decoder(fields, defaults)
    experts = read_experts(fields, count=8, chosen=2, intermediate_size=config.intermediate_size, renormalize=True)
    config = with_windows(config, [read_window(fields, None)] * len(config.layers))
    return replace(config, layers=tuple(replace(layer, experts=experts) for layer in config.layers))


class Decoder(_decoder.Decoder):
    """Mixtral's own names."""

    mlp_name = "block_sparse_moe"
    expert_names = ("w1", "w3", "w2")
