"""SmolLM3: Llama without rotation in every fourth layer; windows only there, and only where asked for."""

from dataclasses import replace

from pocketlm_export.architectures import llama
from pocketlm_export.architectures._configuration import DecoderConfig, Defaults, LayerConfig, layer_windows
from pocketlm_export.architectures._rope import RopeDefaults
from pocketlm_export.fields import Fields


def configure(fields: Fields) -> DecoderConfig:
    """``no_rope_layers`` holds 1 where a layer rotates; absent, each ``no_rope_layer_interval``-th layer doesn't."""
    config = llama.configure(fields, Defaults(kv_heads=4, rope=RopeDefaults(2_000_000.0), tied=True))
    count = len(config.layers)
    interval = fields.integer("no_rope_layer_interval", 4)
    rotates = fields.choices("no_rope_layers", count, (0, 1)) or [(index + 1) % interval > 0 for index in range(count)]
    sliding = fields.flag("use_sliding_window", False)
    window = None if fields.value("sliding_window") is None else fields.integer("sliding_window")
    slides = [sliding and window is not None and not rotate for rotate in rotates]
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    windows = layer_windows(fields, count, window, types)
    layers = tuple(
        LayerConfig(layer.rotary if rotate else None, window)
        for layer, rotate, window in zip(config.layers, rotates, windows, strict=True)
    )
    return replace(config, layers=layers)
