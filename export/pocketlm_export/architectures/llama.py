"""Llama 2, 3.x and their kin: TinyLlama, SmolLM2, and many fine-tunes."""

from dataclasses import replace

from pocketlm_export.architectures._configuration import DecoderConfig, Defaults, read_decoder
from pocketlm_export.fields import Fields


def configure(fields: Fields, defaults: Defaults = Defaults()) -> DecoderConfig:
    """Biases of attention and MLP by their flags."""
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        read_decoder(fields, defaults),
        query_key_value_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
