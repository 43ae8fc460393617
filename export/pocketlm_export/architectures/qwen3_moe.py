"""Qwen3's mixtures of experts: Qwen3 with experts in the place of the MLP, in all layers or some."""

from dataclasses import replace

from pocketlm_export.architectures._configuration import (
    DecoderConfig,
    Defaults,
    read_decoder,
    read_experts,
    read_window,
    with_windows,
)
from pocketlm_export.architectures.mixtral import SILU
from pocketlm_export.fields import Fields


def configure(fields: Fields) -> DecoderConfig:
    """Every ``decoder_sparse_step``-th layer has experts, but for ``mlp_only_layers``; their shares are taken as they
    are unless ``norm_topk_prob``. A window, where asked for, is in all layers."""
    config = read_decoder(fields, Defaults(kv_heads=4, activations=SILU))
    bias, count = fields.flag("attention_bias", False), len(config.layers)
    window = read_window(fields, 4096)
    config = with_windows(config, [window if fields.flag("use_sliding_window", False) else None] * count)
    experts = read_experts(
        fields,
        count=128,
        chosen=8,
        intermediate_size=fields.integer("moe_intermediate_size", 768, most=1 << 24),
        renormalize=fields.flag("norm_topk_prob", False),
    )
    step, dense = fields.integer("decoder_sparse_step", 1), fields.indices("mlp_only_layers", count)
    layers = tuple(
        layer if index in dense or (index + 1) % step else replace(layer, experts=experts)
        for index, layer in enumerate(config.layers)
    )
    return replace(config, layers=layers, query_key_norm=True, query_key_value_bias=bias, output_bias=bias)
