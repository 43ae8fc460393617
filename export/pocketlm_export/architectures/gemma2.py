"""Gemma 2: Gemma with four norms a layer, windows in every second one, and soft caps on scores and logits."""

from dataclasses import replace

from pocketlm_export.architectures import _decoder, gemma
from pocketlm_export.architectures._configuration import (
    DecoderConfig,
    Defaults,
    layer_windows,
    read_window,
    with_windows,
)
from pocketlm_export.fields import Fields
from pocketlm_export.graph.graph import Value

DEFAULTS = Defaults(
    kv_heads=4, head_dim=256, tied=True, activation="gelu_pytorch_tanh", activation_key="hidden_activation"
)


def configure(fields: Fields) -> DecoderConfig:
    """Even layers slide. A cap that is null is none."""
    config = as_gemma2(fields, DEFAULTS, full_every=2)
    return replace(
        config,
        attention_softcap=read_cap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=read_cap(fields, "final_logit_softcapping", 30.0),
    )


def as_gemma2(fields: Fields, defaults: Defaults, full_every: int) -> DecoderConfig:
    """What Gemma 2 and 3 share; each ``full_every``-th layer sees all keys, unless ``layer_types`` says otherwise."""
    fields.value("hidden_act")
    config = gemma.as_gemma(fields, defaults)
    count = len(config.layers)
    types = ["full_attention" if (index + 1) % full_every == 0 else "sliding_attention" for index in range(count)]
    windows = layer_windows(fields, count, read_window(fields, 4096), types)
    scale = fields.number("query_pre_attn_scalar", 256.0) ** -0.5
    return replace(with_windows(config, windows), attention_scale=scale)


def read_cap(fields: Fields, key: str, default: float | None) -> float | None:
    """A soft cap; null says none, absence ``default``."""
    no_cap = fields.value(key) is None and (key in fields or default is None)
    return None if no_cap else fields.number(key, default)


class Decoder(_decoder.Decoder):
    """A norm before and one behind attention and MLP."""

    def layer(self, x: Value, name: str, index: int) -> Value:
        """``x += norm(attention(norm(x)))``, ``x += norm(mlp(norm(x)))``."""
        made = self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.{self.attention_name}", index)
        x = self.add(x, self.norm(made, f"{name}.post_attention_layernorm"))
        made = self.feed_forward(self.norm(x, f"{name}.pre_feedforward_layernorm"), name, index)
        return self.add(x, self.norm(made, f"{name}.post_feedforward_layernorm"))
