"""Qwen2 and Qwen2.5: biases on query, key and value; windows only where ``use_sliding_window`` asks for them."""

from dataclasses import replace

from pocketlm_export.architectures._configuration import (
    DecoderConfig,
    Defaults,
    layer_windows,
    read_decoder,
    with_windows,
)
from pocketlm_export.fields import Fields


def configure(fields: Fields, defaults: Defaults = Defaults(kv_heads=32)) -> DecoderConfig:
    """Layers from ``max_window_layers`` on slide; ``layer_types`` wins."""
    config = read_decoder(fields, defaults)
    count = len(config.layers)
    used = fields.flag("use_sliding_window", False)
    stated = fields.integer("sliding_window", 4096)
    window = stated if used else None
    first = fields.integer("max_window_layers", 28, least=0)
    types = ["sliding_attention" if used and index >= first else "full_attention" for index in range(count)]
    windows = layer_windows(fields, count, window, types)
    return replace(with_windows(config, windows), query_key_value_bias=True)
