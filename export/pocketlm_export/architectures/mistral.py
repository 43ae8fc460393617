"""Mistral: Llama without biases, with a sliding window in every layer unless the key is null."""

from pocketlm_export.architectures._configuration import (
    DecoderConfig,
    Defaults,
    read_decoder,
    read_window,
    with_windows,
)
from pocketlm_export.fields import Fields


def configure(fields: Fields) -> DecoderConfig:
    """An absent ``sliding_window`` means 4096, as in transformers."""
    config = read_decoder(fields, Defaults(kv_heads=8))
    return with_windows(config, [read_window(fields, 4096)] * len(config.layers))
