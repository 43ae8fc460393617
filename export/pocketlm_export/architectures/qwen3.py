"""Qwen3: Qwen2 with an RMS norm on each query and key head, and biases only where ``attention_bias`` asks."""

from dataclasses import replace

from pocketlm_export.architectures import qwen2
from pocketlm_export.architectures._configuration import DecoderConfig, Defaults
from pocketlm_export.fields import Fields


def configure(fields: Fields) -> DecoderConfig:
    """head_dim is 128 unless stated, whatever the hidden size."""
    bias = fields.flag("attention_bias", False)
    config = qwen2.configure(fields, Defaults(kv_heads=32, head_dim=128))
    return replace(config, query_key_norm=True, query_key_value_bias=bias, output_bias=bias)
