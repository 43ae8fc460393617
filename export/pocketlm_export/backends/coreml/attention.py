"""Attention over the cache, as an ML Program."""

import numpy as np

from pocketlm_export.backends.coreml.emission import Emission, Var
from pocketlm_export.backends.coreml.importing import mil
from pocketlm_export.backends.coreml.mask import attention_mask
from pocketlm_export.backends.coreml.norms import normalize
from pocketlm_export.graph.graph import Attention, Value, WeightInfo
from pocketlm_export.graph.rotary import Rotary

__all__ = ["emit_attention"]

mb = mil.Builder


def emit_attention(emission: Emission, node: Attention) -> None:
    """Query heads that share a key/value head are rows of one product, so keys and values are never repeated."""
    query = _heads(emission, node, node.query, node.heads, node.query_norm)
    key = _heads(emission, node, node.key, node.kv_heads, node.key_norm)
    value = _heads(emission, node, node.value, node.kv_heads, None)
    if node.rotary is not None:
        query, key = (_rotate(emission, x, node.rotary, node.head_dim) for x in (query, key))
    keys, values = (_through_cache(emission, index, node.layer, new) for index, new in enumerate((key, value)))

    group, length = node.heads // node.kv_heads, emission.length or -1
    fused = emission.form == "fused" and node.softcap is None
    # The fused operator divides by sqrt(head_dim) by itself; whatever else the model scales by goes into the query.
    scale = np.float16(node.scale * node.head_dim**0.5 if fused else node.scale)
    if scale != 1:
        query = mb.mul(x=query, y=scale)
    mask = attention_mask(emission, node)
    query = mb.reshape(x=query, shape=[1, node.kv_heads, group * length if emission.length else -1, node.head_dim])
    if fused:
        mixed = mb.scaled_dot_product_attention(query=query, key=keys, value=values, attn_mask=mask)
    else:
        scores = mb.matmul(x=query, y=keys, transpose_y=True)
        if node.softcap is not None:
            cap = np.float16(node.softcap)
            scores = mb.mul(x=mb.tanh(x=mb.real_div(x=scores, y=cap)), y=cap)
        mixed = mb.matmul(x=mb.softmax(x=mb.add(x=scores, y=mask), axis=-1), y=values)
    mixed = mb.reshape(x=mixed, shape=[1, node.heads, length, node.head_dim])
    mixed = mb.transpose(x=mixed, perm=[0, 2, 1, 3])
    emission.values[node.output] = mb.reshape(x=mixed, shape=[1, length, node.heads * node.head_dim])


def _heads(emission: Emission, node: Attention, value: Value, count: int, norm: WeightInfo | None) -> Var:
    """``[1, S, count * head_dim]`` -> ``[1, count, S, head_dim]``, normalized by head."""
    x = mb.reshape(x=emission.values[value], shape=[1, emission.length or -1, count, node.head_dim])
    if norm is not None:
        x = normalize(emission, x, norm, node.norm_epsilon, node.norm_offset)
    return mb.transpose(x=x, perm=[0, 2, 1, 3])


def _rotate(emission: Emission, x: Var, rotary: Rotary, head_dim: int) -> Var:
    """``x * cosine + swapped(x) * sine``: the minus of the first half lies in the table."""
    cosine, sine = emission.once(rotary, lambda: _tables(emission, rotary))
    half = len(rotary.frequencies)
    rest = head_dim - 2 * half
    first, second, *others = mb.split(x=x, split_sizes=[half, half, *([rest] if rest else [])], axis=-1)
    turned = mb.concat(values=[first, second], axis=-1) if rest else x
    swapped = mb.concat(values=[second, first], axis=-1)
    rotated = mb.add(x=mb.mul(x=turned, y=cosine), y=mb.mul(x=swapped, y=sine))
    return mb.concat(values=[rotated, *others], axis=-1) if rest else rotated


def _tables(emission: Emission, rotary: Rotary) -> tuple[Var, ...]:
    """Cosine and sine ``[S, rotated]`` of the positions of this call."""
    return tuple(
        mb.gather(x=emission.constant(table), indices=emission.positions, axis=0, validate_indices=False)
        for table in emission.layout.rotary(rotary, emission.context_length)
    )


def _through_cache(emission: Emission, index: int, layer: int, new: Var) -> Var:
    """Write ``new`` at this call's positions; returns the layer's cache ``[1, kv_heads, context, head_dim]``."""
    zero = np.zeros(1, np.int32)
    begin = mb.concat(values=[np.array([layer, 0], np.int32), emission.begin, zero], axis=0)
    end = mb.concat(values=[np.array([layer + 1, 0], np.int32), emission.end, zero], axis=0)
    whole = [False, True, False, True]
    updated = mb.slice_update(
        x=emission.caches[index], update=new, begin=begin, end=end, begin_mask=whole, end_mask=whole
    )
    emission.caches[index] = mb.coreml_update_state(state=emission.states[index], value=updated)
    return mb.slice_by_index(
        x=emission.caches[index], begin=[layer, 0, 0, 0], end=[layer + 1, 0, 0, 0], end_mask=[False, True, True, True]
    )
