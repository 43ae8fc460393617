"""Gemma: norms times 1 + weight, a scaled embedding, tanh-GELU, and a head of its own size."""

from dataclasses import replace

from pocketlm_export.architectures import llama
from pocketlm_export.architectures._configuration import ACTIVATIONS, DecoderConfig, Defaults
from pocketlm_export.fields import Fields

# The residual of trained models leaves float16's range. Times 2^-6 it may reach 4.2e6, and is below float16's normal
# numbers where it was below 4e-3.
RESIDUAL_SHIFT = 6


def configure(fields: Fields) -> DecoderConfig:
    """``hidden_act`` counts, and its "gelu" means the tanh form; ``hidden_activation`` does not."""
    fields.value("hidden_activation")
    defaults = Defaults(
        kv_heads=16, head_dim=256, tied=True, activation="gelu_pytorch_tanh",
        activations={**ACTIVATIONS, "gelu": "gelu_tanh"},
    )  # fmt: skip
    return as_gemma(fields, defaults)


def as_gemma(fields: Fields, defaults: Defaults) -> DecoderConfig:
    """What all of the family share."""
    if fields.flag("use_bidirectional_attention", False):
        raise fields.refuse("use_bidirectional_attention", "is true: only causal attention can be exported")
    config = llama.configure(fields, defaults)
    return replace(
        config, mlp_bias=False, norm_offset=1.0, embedding_scale=config.hidden_size**0.5, residual_shift=RESIDUAL_SHIFT
    )
