"""Mistral: Llama without biases, with a sliding window in every layer unless the key is null."""

from dataclasses import replace

from pocketlm_export.architectures._configuration import DecoderConfig, Defaults, LayerConfig, read_decoder
from pocketlm_export.fields import Fields


def configure(fields: Fields) -> DecoderConfig:
    """An absent ``sliding_window`` means 4096, as in transformers."""
    config = read_decoder(fields, Defaults(kv_heads=8))
    no_window = "sliding_window" in fields and fields.value("sliding_window") is None
    window = None if no_window else fields.integer("sliding_window", 4096)
    return replace(config, layers=tuple(LayerConfig(layer.rotary, window) for layer in config.layers))
