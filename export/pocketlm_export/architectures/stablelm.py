"""StableLM: Llama with layer norms and a quarter of each head rotated, in Phi's parallel form where asked for."""

from dataclasses import replace

from pocketlm.errors import UnsupportedError
from pocketlm_export.architectures._configuration import DecoderConfig, Defaults, read_decoder
from pocketlm_export.architectures._rope import RopeDefaults
from pocketlm_export.fields import Fields


def configure(fields: Fields) -> DecoderConfig:
    """``use_qkv_bias`` is of query, key and value alone."""
    if fields.flag("qk_layernorm", False):
        raise UnsupportedError(f"{fields.source}: 'qk_layernorm' is true: layer norms of query and key heads")
    defaults = Defaults(kv_heads=32, rope=RopeDefaults(partial=0.25), norm_epsilon=1e-5, epsilon_key="layer_norm_eps")
    bias, parallel = fields.flag("use_qkv_bias", False), fields.flag("use_parallel_residual", False)
    return replace(
        read_decoder(fields, defaults), query_key_value_bias=bias, layer_norm=True, parallel_residual=parallel
    )
