"""Which keys a query doesn't see, as numbers that are added to the scores."""

import numpy as np

from pocketlm_export.backends.coreml.emission import Emission, Var
from pocketlm_export.backends.coreml.importing import mil
from pocketlm_export.graph.graph import Attention, BlockSparsity

__all__ = ["attention_mask"]

mb = mil.Builder
MASKED = np.float16(-30000)  # not infinity, and a score added to it stays within fp16


def attention_mask(emission: Emission, node: Attention) -> Var:
    """fp16 ``[1, 1 or kv_heads, group * S, context]`` (one row if S is 1 and all heads see the same): 0 where a key is
    seen, MASKED where it is not. Made once for all layers that see the same."""
    group = node.heads // node.kv_heads
    if node.sparsity is None:
        return emission.once(("mask", node.window, group), lambda: _of_all_heads(emission, node.window, group))
    key = ("mask", node.window, node.sparsity, node.heads, node.kv_heads)
    return emission.once(key, lambda: _by_head(emission, node))


def _of_all_heads(emission: Emission, window: int | None, group: int) -> Var:
    mask = mb.expand_dims(x=_valued(_hidden(emission, window)), axes=[0, 1])
    return mask if emission.length == 1 or group == 1 else mb.tile(x=mask, reps=[1, 1, group, 1])


def _by_head(emission: Emission, node: Attention) -> Var:
    assert node.sparsity is not None
    hidden = mb.logical_or(x=_hidden(emission, node.window), y=_skipped(emission, node.sparsity, node.heads))
    rows = -1 if emission.length is None else node.heads // node.kv_heads
    return mb.reshape(x=_valued(hidden), shape=[1, node.kv_heads, rows, emission.context_length])


def _valued(hidden: Var) -> Var:
    return mb.mul(x=mb.cast(x=hidden, dtype="fp16"), y=MASKED)


def _hidden(emission: Emission, window: int | None) -> Var:
    """bool ``[S, context]``: what lies ahead or behind the window."""
    query = mb.expand_dims(x=emission.positions, axes=[1])
    hidden = mb.greater(x=emission.every_position, y=query)
    if window is None:
        return hidden
    behind = mb.less_equal(x=emission.every_position, y=mb.sub(x=query, y=np.int32(window)))
    return mb.logical_or(x=hidden, y=behind)


def _skipped(emission: Emission, sparsity: BlockSparsity, heads: int) -> Var:
    """bool ``[heads, S, context]``: beyond the local blocks, and not of a block that the head sees everywhere."""
    size, stride = np.int32(sparsity.block_size), np.int32(sparsity.stride)
    block = mb.floor_div(x=emission.every_position, y=size)
    of_query = mb.floor_div(x=mb.expand_dims(x=emission.positions, axes=[1]), y=size)
    far = mb.greater_equal(x=mb.sub(x=of_query, y=block), y=np.int32(sparsity.local_blocks))
    shifts = np.arange(heads, dtype=np.int32)[:, None, None] * np.int32(sparsity.head_shift) + np.int32(1)
    phase = mb.mod(x=mb.add(x=block, y=shifts), y=stride)
    return mb.logical_and(x=far, y=mb.not_equal(x=phase, y=np.int32(0)))
