"""Gemma 3's text models: Gemma 2 with query and key norms in place of caps, and a rope for each kind of layer."""

from dataclasses import replace

from pocketlm_export.architectures import gemma2
from pocketlm_export.architectures._configuration import DecoderConfig
from pocketlm_export.architectures._rope import LARGEST_THETA, read_rope
from pocketlm_export.fields import Fields
from pocketlm_export.graph.rotary import LongRotary, Rotary

__all__ = ["Decoder", "configure"]

Decoder = gemma2.Decoder


def configure(fields: Fields) -> DecoderConfig:
    """Five of six layers slide, and rotate by the local base."""
    if fields.value("attn_logit_softcapping") is not None:
        raise fields.refuse("attn_logit_softcapping", "is set, but transformers' class does not apply it")
    pattern = fields.integer("sliding_window_pattern", 6)
    config = gemma2.as_gemma2(fields, replace(gemma2.DEFAULTS, rope=None), full_every=pattern)
    everywhere, local = _rotations(fields, config.head_dim, config.context_length)
    layers = tuple(replace(layer, rotary=everywhere if layer.window is None else local) for layer in config.layers)
    cap = gemma2.read_cap(fields, "final_logit_softcapping", None)
    return replace(config, layers=layers, query_key_norm=True, logit_softcap=cap)


def _rotations(fields: Fields, head_dim: int, context_length: int) -> list[Rotary | LongRotary]:
    """Of full and of sliding layers; the older ``rope_scaling`` is of the full ones."""
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    if scaling is not None and parameters is not None:
        raise fields.refuse("rope_scaling", "and 'rope_parameters' are both given: which one was meant?")
    nothing = Fields({}, fields.source)
    parameters = parameters or nothing
    ropes = (scaling or parameters.nested("full_attention"), parameters.nested("sliding_attention"))
    thetas = (
        fields.number(key, default, least=1, most=LARGEST_THETA)
        for key, default in (("rope_theta", 1e6), ("rope_local_base_freq", 1e4))
    )
    if parameters.unread():
        raise parameters.refuse(parameters.unread()[0], "is not of a kind of layer: full_attention, sliding_attention")
    return [
        read_rope(rope or nothing, head_dim, context_length, context_length, theta)
        for rope, theta in zip(ropes, thetas, strict=True)
    ]
