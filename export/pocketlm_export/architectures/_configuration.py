"""config.json of a Llama-like decoder, in either spelling, as one typed and closed configuration."""

from dataclasses import dataclass

from pocketlm.errors import UnsupportedError
from pocketlm_export.fields import Fields
from pocketlm_export.graph.rotary import Rotary, default_frequencies, linear_frequencies, llama3_frequencies

__all__ = ["DecoderConfig", "Defaults", "LayerConfig", "layer_windows", "read_decoder"]

MOST_LAYERS = 1024
# Ten times beyond what any released model has; what is larger is an error of whoever wrote the file.
LARGEST_THETA = 1e11
LARGEST_NUMBER = 1e5


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer: rotation (None: none) and sliding window in keys (None: full attention)."""

    rotary: Rotary | None
    window: int | None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The mathematics of a decoder. ``context_length`` is the longest the model was made for.

    ``layer_norm``: norms are layer norms with a bias, else RMS norms times weight + ``norm_offset``. ``residual_scale``
    is on what attention and MLP add; ``attention_scale`` None is 1/sqrt(head_dim).
    """

    model_type: str
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    context_length: int
    tied: bool
    layers: tuple[LayerConfig, ...]
    query_key_value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    query_key_norm: bool = False
    layer_norm: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a class of transformers assumes for an absent key. None: as many as heads, or hidden/heads."""

    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    tied: bool = False


def read_decoder(fields: Fields, defaults: Defaults = Defaults()) -> DecoderConfig:
    """The keys that every Llama-like class shares; a file of ``architectures`` replaces what it states otherwise."""
    fields.choice("hidden_act", "silu", ("silu", "swish"))
    if fields.flag("rope_interleaved", False):
        raise fields.refuse("rope_interleaved", "is true: interleaved rotary pairs are not supported")
    heads = fields.integer("num_attention_heads", most=1024)
    hidden_size = fields.integer("hidden_size", most=1 << 20)
    kv_heads = (
        heads
        if _is_null(fields, "num_key_value_heads")
        else fields.integer("num_key_value_heads", defaults.kv_heads or heads)
    )
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} attention heads")
    head_dim = _head_dim(fields, hidden_size, heads, defaults)
    context_length = fields.integer("max_position_embeddings", most=1 << 30)
    layer = LayerConfig(read_rotary(fields, head_dim, defaults.rope_theta, context_length), None)
    return DecoderConfig(
        model_type=fields.value("model_type"),
        vocabulary_size=fields.integer("vocab_size", most=1 << 24),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", most=1 << 24),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6, most=LARGEST_NUMBER),
        context_length=context_length,
        tied=fields.flag("tie_word_embeddings", defaults.tied),
        layers=(layer,) * fields.integer("num_hidden_layers", most=MOST_LAYERS),
    )


def _is_null(fields: Fields, key: str) -> bool:
    return key in fields and fields.value(key) is None


def _head_dim(fields: Fields, hidden_size: int, heads: int, defaults: Defaults) -> int:
    fallback = None if _is_null(fields, "head_dim") else defaults.head_dim
    if fallback is None and fields.value("head_dim") is None:
        if hidden_size % heads:
            raise fields.refuse("hidden_size", f"is {hidden_size}, which the {heads} attention heads don't divide")
        fallback = hidden_size // heads
    head_dim = fields.integer("head_dim", fallback, most=4096)
    if head_dim % 2:
        raise fields.refuse("head_dim", f"is {head_dim}: rotary embedding needs an even size")
    return head_dim


def read_rotary(fields: Fields, width: int, default_theta: float, context_length: int) -> Rotary:
    """The rotation of ``width`` elements: ``rope_scaling`` wins over ``rope_parameters``, their theta over the top."""
    top_theta = fields.number("rope_theta", default_theta, least=1, most=LARGEST_THETA)
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    rope = scaling or parameters
    if rope is None:
        return Rotary(default_frequencies(top_theta, width))
    theta = rope.number("rope_theta", top_theta, least=1, most=LARGEST_THETA)
    kind, older = rope.value("rope_type"), rope.value("type")
    if kind is not None and older is not None and kind != older:
        raise rope.refuse("rope_type", f"is {kind!r} but 'type' is {older!r}: which one was meant?")
    kind = older if kind is None else kind
    kind = "default" if kind is None else kind
    match kind:
        case "default":
            frequencies = default_frequencies(theta, width)
        case "linear":
            frequencies = linear_frequencies(theta, width, rope.number("factor", least=1, most=LARGEST_NUMBER))
        case "llama3":
            original = fields.integer(
                "original_max_position_embeddings", rope.integer("original_max_position_embeddings", context_length)
            )
            low, high = (rope.number(key, most=LARGEST_NUMBER) for key in ("low_freq_factor", "high_freq_factor"))
            if high <= low:
                raise rope.refuse("high_freq_factor", f"must be greater than low_freq_factor ({low}), not {high}")
            frequencies = llama3_frequencies(
                theta, width, rope.number("factor", least=1, most=LARGEST_NUMBER), low, high, original
            )
        case _:
            raise UnsupportedError(
                f"{rope.source}: rope type {str(kind)[:40]!r} is not supported; supported: default, linear, llama3"
            )
    unread = [key for key in rope.unread() if key not in ("partial_rotary_factor", "original_max_position_embeddings")]
    if unread:
        raise rope.refuse(unread[0], f"has no meaning for rope type {kind!r}")
    return Rotary(frequencies)


def layer_windows(fields: Fields, layers: int, window: int | None, default_types: list[str]) -> list[int | None]:
    """The window of each layer by ``layer_types``, or by ``default_types`` where the key is absent."""
    types = fields.choices("layer_types", layers, ("full_attention", "sliding_attention")) or default_types
    if window is None and "sliding_attention" in types:
        raise fields.refuse("layer_types", "has sliding layers, but 'sliding_window' is not set")
    return [window if kind == "sliding_attention" else None for kind in types]
