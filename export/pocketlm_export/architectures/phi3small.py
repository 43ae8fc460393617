"""Phi-3 small: layer norms, gated by GEGELU, block-sparse attention in alternating layers, and muP's multipliers.

transformers has no such class; the keys and their defaults are those of the released ``configuration_phi3_small.py``.
"""

from dataclasses import dataclass

from pocketlm.errors import UnsupportedError
from pocketlm_export.architectures import _decoder
from pocketlm_export.architectures._configuration import MOST_LAYERS, SUPPRESSING_BIAS, DecoderConfig, LayerConfig
from pocketlm_export.architectures._rope import LARGEST_NUMBER, LARGEST_THETA
from pocketlm_export.fields import Fields
from pocketlm_export.graph.graph import BlockSparsity, Value
from pocketlm_export.graph.rotary import (
    LongRotary,
    Rotary,
    linear_frequencies,
    longrope_frequencies,
    longrope_scale,
)
from pocketlm_export.selection import RowSelection

__all__ = ["Decoder", "Phi3SmallConfig", "configure"]

# Ids of cl100k's end that the tokenizer fills up with tokens of no meaning: their rows were never trained, and the
# released class gives their logits the least number there is. config.json does not name them.
DUMMY_IDS = (100256, *range(100258, 100261), 100264, 100265, *range(100267, 100352))
GELU_SLOPE = 1.702  # of the sigmoid that stands for the normal distribution's
# Dropouts, and how kernels of CUDA are run.
NEUTRAL = (
    "attention_dropout_prob",
    "blocksparse_triton_kernel_block_size",
    "embedding_dropout_prob",
    "ffn_dropout_prob",
    "pad_sequence_to_multiple_of_64",
    "reorder_and_upcast_attn",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi3SmallConfig(DecoderConfig):
    """``sparsities``: which keys each layer sees, None for all. ``gegelu_limit`` bounds both halves of the MLP before
    they are multiplied, None leaves them as they are."""

    sparsities: tuple[BlockSparsity | None, ...]
    gegelu_limit: float | None


def configure(fields: Fields) -> Phi3SmallConfig:
    """Every linear and norm has a bias, whatever ``attention_bias`` says; the head, which is tied, has none."""
    fields.choice("hidden_act", "gegelu", ("gegelu",))
    for key in NEUTRAL:
        fields.value(key)
    hidden_size = fields.integer("hidden_size", 4096, most=1 << 20)
    heads = fields.integer("num_attention_heads", 32, most=1024)
    kv_heads = fields.integer("num_key_value_heads", 8)
    if hidden_size % (2 * heads):
        raise fields.refuse("hidden_size", f"is {hidden_size}: the {heads} attention heads need an even size each")
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} attention heads")
    head_dim = hidden_size // heads
    context_length = fields.integer("max_position_embeddings", 8192, most=1 << 30)
    layers = fields.integer("num_hidden_layers", 32, most=MOST_LAYERS)
    vocabulary_size = fields.integer("vocab_size", 100352, most=1 << 24)
    suppressed = tuple(index for index in DUMMY_IDS if index < vocabulary_size)
    return Phi3SmallConfig(
        model_type="phi3small",
        vocabulary_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(fields, hidden_size),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5, most=LARGEST_NUMBER),
        context_length=context_length,
        tied=fields.flag("tie_word_embeddings", True),
        layers=(LayerConfig(_rotary(fields, head_dim, context_length), None),) * layers,
        query_key_value_bias=True,
        output_bias=True,
        mlp_bias=True,
        layer_norm=True,
        embedding_scale=_multiplier(fields, "mup_embedding_multiplier", 10.0) or 1.0,
        attention_scale=_attention_scale(fields, head_dim),
        logit_scale=1 / (_multiplier(fields, "mup_width_multiplier", 8.0) or 1.0),
        head_bias=bool(suppressed),
        suppressed_ids=suppressed,
        sparsities=_sparsities(fields, layers, heads),
        gegelu_limit=_gegelu_limit(fields),
    )


class Decoder(_decoder.Decoder):
    """Query, key and value interleaved in one tensor, both halves of the MLP in another."""

    config: Phi3SmallConfig
    output_name = "dense"
    final_norm_name = "model.final_layernorm"
    head_bias_name = SUPPRESSING_BIAS

    def query_key_value(self, x: Value, name: str) -> tuple[Value, Value, Value]:
        """Of each key/value head: its query heads' rows, then its key's, then its value's."""
        config = self.config
        queries = config.heads // config.kv_heads * config.head_dim
        period = queries + 2 * config.head_dim
        query, key, value = (
            self.linear(
                x, f"{name}.query_key_value", config.kv_heads * period, config.query_key_value_bias,
                RowSelection(start, stop, period),
            )
            for start, stop in ((0, queries), (queries, queries + config.head_dim), (queries + config.head_dim, period))
        )  # fmt: skip
        return query, key, value

    def sparsity(self, index: int) -> BlockSparsity | None:
        """The pattern of a layer; none where the exported context lies within its local blocks."""
        sparsity = self.config.sparsities[index]
        if sparsity is None or self.context_length <= sparsity.local_blocks * sparsity.block_size:
            return None
        return sparsity

    def gate_and_up(self, x: Value, name: str) -> tuple[Value, Value]:
        """Even rows are the gate, odd ones up."""
        rows, bias = 2 * self.config.intermediate_size, self.config.mlp_bias
        gate, up = (
            self.linear(x, f"{name}.up_proj", rows, bias, RowSelection(start, start + 1, 2)) for start in (0, 1)
        )
        return gate, up

    def mlp(self, x: Value, name: str) -> Value:
        """``down(a * sigmoid(1.702 a) * (b + 1))`` with ``a = min(gate, limit)`` and b = ``up`` within the limit."""
        config = self.config
        gate, up = self.gate_and_up(x, name)
        if config.gegelu_limit is not None:
            gate = self.build.clamp(gate, None, config.gegelu_limit)
            up = self.build.clamp(up, -config.gegelu_limit, config.gegelu_limit)
        gated = self.build.multiply(gate, self.build.activation("sigmoid", self.build.scale(gate, GELU_SLOPE)))
        inner = self.build.add(self.build.multiply(gated, up), gated)
        return self.linear(inner, f"{name}.down_proj", config.hidden_size, config.mlp_bias)


def _multiplier(fields: Fields, key: str, default: float) -> float:
    """A multiplier of muP; null and zero say that there is none."""
    return 0.0 if fields.is_null(key) else fields.number(key, default, least=0, most=LARGEST_NUMBER)


def _flag(fields: Fields, key: str) -> bool:
    """A flag that is set where it is absent, but not where it is null."""
    return not fields.is_null(key) and fields.flag(key, True)


def _attention_scale(fields: Fields, head_dim: int) -> float | None:
    multiplier = _multiplier(fields, "mup_attn_multiplier", 1.0)
    if not _flag(fields, "mup_use_scaling"):
        return None
    if not multiplier:
        raise fields.refuse("mup_attn_multiplier", "must be greater than zero where mup_use_scaling is true")
    return multiplier / head_dim


def _gegelu_limit(fields: Fields) -> float | None:
    key = "gegelu_limit"
    return None if fields.is_null(key) else fields.number(key, 20.0, most=LARGEST_NUMBER)


def _intermediate_size(fields: Fields, hidden_size: int) -> int:
    """``ff_intermediate_size``, or where that is null twice ``ff_dim_multiplier`` thirds of the hidden size."""
    pad = _flag(fields, "gegelu_pad_to_256")
    stated = not fields.is_null("ff_intermediate_size")
    if stated == (fields.value("ff_dim_multiplier") is not None):
        raise fields.refuse("ff_dim_multiplier", "and 'ff_intermediate_size': one must be given, and the other be null")
    if stated:
        return fields.integer("ff_intermediate_size", 14336, most=1 << 24)
    size = fields.integer("ff_dim_multiplier", most=1024) * (hidden_size // 3) * 2
    return -(-size // 256) * 256 if pad else size


def _sparsities(fields: Fields, layers: int, heads: int) -> tuple[BlockSparsity | None, ...]:
    """Every n-th layer is dense; null or zero: none is."""
    key = "dense_attention_every_n_layers"
    dense_every = 0 if fields.is_null(key) else fields.integer(key, 2, least=0)
    stride = fields.integer("blocksparse_vert_stride", 8)
    same = fields.flag("blocksparse_homo_head_pattern", False)
    sparsity = BlockSparsity(
        block_size=fields.integer("blocksparse_block_size", 64),
        local_blocks=fields.integer("blocksparse_num_local_blocks", 16),
        stride=stride,
        head_shift=0 if same else max(1, stride // heads),
    )
    return tuple(None if dense_every and (index + 1) % dense_every == 0 else sparsity for index in range(layers))


def _rotary(fields: Fields, head_dim: int, context_length: int) -> Rotary | LongRotary:
    theta = fields.number("rope_embedding_base", 1e6, least=1, most=LARGEST_THETA)
    position_scale = fields.number("rope_position_scale", 1.0, most=LARGEST_NUMBER)
    rope = fields.nested("rope_scaling")
    if rope is None:
        return Rotary(linear_frequencies(theta, head_dim, 1 / position_scale))
    return _long_rotary(rope, theta, head_dim, context_length)


def _long_rotary(rope: Fields, theta: float, head_dim: int, context_length: int) -> LongRotary:
    """LongRoPE, which older files call "su", with a factor of its own on short and long cosines and sines."""
    kind = rope.value("rope_type", rope.value("type"))
    if kind not in ("su", "longrope"):
        raise UnsupportedError(f"{rope.source}: rope type {str(kind)[:40]!r} is not supported; supported: su, longrope")
    original = rope.integer("original_max_position_embeddings", least=2)
    scales = [
        rope.number(key, -1.0, least=-LARGEST_NUMBER, most=LARGEST_NUMBER) for key in ("short_mscale", "long_mscale")
    ]
    defaults = 1.0, longrope_scale(context_length / original, original)
    short, long = (
        Rotary(
            longrope_frequencies(theta, head_dim, rope.numbers(key, head_dim // 2, most=LARGEST_NUMBER)),
            scale if scale > 0 else default,
        )
        for key, scale, default in zip(("short_factor", "long_factor"), scales, defaults, strict=True)
    )
    if rope.unread():
        raise rope.refuse(rope.unread()[0], f"has no meaning for rope type {kind!r}")
    return LongRotary(short, long, original)
