"""Phi-3 mini, Phi-3.5 mini, Phi-4 mini and Phi-4: Llama with fused projections, a window, and LongRoPE."""

from pocketlm_export.architectures import _decoder
from pocketlm_export.architectures._configuration import (
    DecoderConfig,
    Defaults,
    read_decoder,
    read_window,
    with_windows,
)
from pocketlm_export.architectures._rope import RopeDefaults
from pocketlm_export.fields import Fields
from pocketlm_export.graph.graph import Value
from pocketlm_export.selection import RowSelection

# Older files say "su", the oldest "yarn", and mean LongRoPE. The original context is a key at the top with a default,
# so that what the rope's object says of it never counts.
ROPE = RopeDefaults(
    partial=1.0, original_context=4096, aliases={"su": "longrope", "yarn": "longrope"}, kinds=("default", "longrope"),
    neutral=("short_mscale", "long_mscale"),
)  # fmt: skip


def configure(fields: Fields) -> DecoderConfig:
    """A window in every layer where ``sliding_window`` is given."""
    config = read_decoder(fields, Defaults(rope=ROPE, norm_epsilon=1e-5))
    if fields.flag("lm_head_bias", False):
        raise fields.refuse("lm_head_bias", "is true: transformers' class has no such bias")
    return with_windows(config, [read_window(fields, None)] * len(config.layers))


class Decoder(_decoder.Decoder):
    """Query, key and value in one tensor, gate and up in another."""

    def query_key_value(self, x: Value, name: str) -> tuple[Value, Value, Value]:
        """Rows of queries, then keys, then values."""
        config = self.config
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        rows = queries + 2 * keys
        query, key, value = (
            self.linear(x, f"{name}.qkv_proj", rows, rows=RowSelection(start, stop, rows))
            for start, stop in ((0, queries), (queries, queries + keys), (queries + keys, rows))
        )
        return query, key, value

    def gate_and_up(self, x: Value, name: str) -> tuple[Value, Value]:
        """Rows of the gate, then of up."""
        width = self.config.intermediate_size
        gate, up = (
            self.linear(x, f"{name}.gate_up_proj", 2 * width, rows=RowSelection(start, start + width, 2 * width))
            for start in (0, width)
        )
        return gate, up
