"""config.json of a Llama-like decoder, in either spelling, as one typed and closed configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pocketlm_export.architectures._rope import LARGEST_NUMBER, RopeDefaults, read_rotary
from pocketlm_export.fields import Fields
from pocketlm_export.graph.rotary import LongRotary, Rotary

__all__ = [
    "ACTIVATIONS",
    "SUPPRESSING_BIAS",
    "DecoderConfig",
    "Defaults",
    "ExpertsConfig",
    "LayerConfig",
    "layer_windows",
    "read_decoder",
    "read_experts",
    "read_window",
    "with_windows",
]

MOST_LAYERS = 1024
MOST_EXPERTS = 4096
SUPPRESSING_BIAS = "lm_head.suppressing_bias"
# transformers' names of the activations that the graph has.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of ``count`` gated MLPs of ``intermediate_size``; each position takes ``chosen`` of them."""

    count: int
    chosen: int
    intermediate_size: int
    renormalize: bool


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer: rotation (None: none), sliding window in keys (None: full attention), and
    the mixture of experts in the place of the MLP (None: the MLP)."""

    rotary: Rotary | LongRotary | None
    window: int | None
    experts: ExpertsConfig | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The mathematics of a decoder. ``context_length`` is the longest the model was made for.

    ``layer_norm``: norms are layer norms with a bias, else RMS norms times weight + ``norm_offset``. ``residual_scale``
    is on what attention and MLP add; ``attention_scale`` None is 1/sqrt(head_dim). ``parallel_residual``:
    attention and MLP read one norm and are added together. ``suppressed_ids`` are never to be
    chosen: the head's bias :data:`SUPPRESSING_BIAS`, which no file has, sees to it. ``residual_shift``: a runtime of
    float16 holds the residual times 2 to the power of minus that, because trained models of this kind exceed its range.
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
    parallel_residual: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    suppressed_ids: tuple[int, ...] = ()
    residual_shift: int = 0


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a class of transformers assumes for an absent key, and how it spells those that not all spell alike.

    None: as many as heads, or hidden/heads; a rope that the architecture reads itself. ``activations`` maps the names
    that the class may use to the graph's kinds.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    rope: RopeDefaults | None = field(default_factory=RopeDefaults)
    tied: bool = False
    norm_epsilon: float = 1e-6
    epsilon_key: str = "rms_norm_eps"
    activation: str = "silu"
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)


def read_decoder(fields: Fields, defaults: Defaults = Defaults()) -> DecoderConfig:
    """The keys that every Llama-like class shares; a file of ``architectures`` replaces what it states otherwise."""
    activation = fields.choice(defaults.activation_key, defaults.activation, defaults.activations)
    if fields.flag("rope_interleaved", False):
        raise fields.refuse("rope_interleaved", "is true: interleaved rotary pairs are not supported")
    heads = fields.integer("num_attention_heads", most=1024)
    hidden_size = fields.integer("hidden_size", most=1 << 20)
    kv_heads = (
        heads
        if fields.is_null("num_key_value_heads")
        else fields.integer("num_key_value_heads", defaults.kv_heads or heads)
    )
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} attention heads")
    head_dim = _head_dim(fields, hidden_size, heads, defaults)
    context_length = fields.integer("max_position_embeddings", most=1 << 30)
    rotary = None if defaults.rope is None else read_rotary(fields, head_dim, context_length, defaults.rope)
    return DecoderConfig(
        model_type=fields.value("model_type"),
        vocabulary_size=fields.integer("vocab_size", most=1 << 24),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", most=1 << 24),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=fields.number(defaults.epsilon_key, defaults.norm_epsilon, most=LARGEST_NUMBER),
        context_length=context_length,
        tied=fields.flag("tie_word_embeddings", defaults.tied),
        layers=(LayerConfig(rotary, None),) * fields.integer("num_hidden_layers", most=MOST_LAYERS),
        activation=defaults.activations[activation],
    )


def _head_dim(fields: Fields, hidden_size: int, heads: int, defaults: Defaults) -> int:
    fallback = None if fields.is_null("head_dim") else defaults.head_dim
    if fallback is None and fields.value("head_dim") is None:
        if hidden_size % heads:
            raise fields.refuse("hidden_size", f"is {hidden_size}, which the {heads} attention heads don't divide")
        fallback = hidden_size // heads
    head_dim = fields.integer("head_dim", fallback, most=4096)
    if head_dim % 2:
        raise fields.refuse("head_dim", f"is {head_dim}: rotary embedding needs an even size")
    return head_dim


def read_window(fields: Fields, default: int | None) -> int | None:
    """``sliding_window`` in keys; null says none, absence ``default``."""
    no_window = fields.value("sliding_window") is None and ("sliding_window" in fields or default is None)
    return None if no_window else fields.integer("sliding_window", default)


def with_windows(config: DecoderConfig, windows: Sequence[int | None]) -> DecoderConfig:
    """``config`` with the window of each layer."""
    layers = tuple(replace(layer, window=window) for layer, window in zip(config.layers, windows, strict=True))
    return replace(config, layers=layers)


def read_experts(
    fields: Fields, *, count: int, chosen: int, intermediate_size: int, renormalize: bool
) -> ExpertsConfig:
    """A mixture of experts; ``count`` and ``chosen`` are what absence means. Their number has two names."""
    names = [key for key in ("num_local_experts", "num_experts") if fields.value(key) is not None]
    counts = [fields.integer(key, most=MOST_EXPERTS) for key in names] or [count]
    if counts[0] != counts[-1]:
        raise fields.refuse(names[0], f"is {counts[0]} but {names[-1]!r} is {counts[-1]}: which one was meant?")
    chosen = fields.integer("num_experts_per_tok", chosen, most=counts[0])
    if chosen > counts[0]:
        raise fields.refuse("num_experts_per_tok", f"is {chosen} where it is absent, but there are {counts[0]} experts")
    return ExpertsConfig(counts[0], chosen, intermediate_size, renormalize)


def layer_windows(fields: Fields, layers: int, window: int | None, default_types: list[str]) -> list[int | None]:
    """The window of each layer by ``layer_types``, or by ``default_types`` where the key is absent."""
    types = fields.choices("layer_types", layers, ("full_attention", "sliding_attention")) or default_types
    if window is None and "sliding_attention" in types:
        raise fields.refuse("layer_types", "has sliding layers, but 'sliding_window' is not set")
    return [window if kind == "sliding_attention" else None for kind in types]
