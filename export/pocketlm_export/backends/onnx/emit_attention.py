"""Attention in GroupQueryAttention of ``com.microsoft``, or in SparseAttention where a layer is block-sparse, with what
their kernels for CPUs can't do in front of them."""

import onnx_ir as ir

from pocketlm_export.backends.onnx.attention import cache_head_dim, rotates_inside
from pocketlm_export.backends.onnx.emission import MICROSOFT, Emission
from pocketlm_export.graph.graph import Attention, Value, WeightInfo

__all__ = ["emit_attention"]


def emit_attention(emission: Emission, node: Attention) -> None:
    """Append what computes ``node``."""
    name, width = node.output.name, cache_head_dim(node.head_dim)
    query: ir.Value | None
    key: ir.Value | None
    value: ir.Value | None
    inside = rotates_inside(node)
    packed = emission.packed.get((node.query, node.key, node.value))
    if packed is not None:
        query, key, value = packed, None, None
    else:
        parts = (("query", node.query, node.query_norm, node.heads), ("key", node.key, node.key_norm, node.kv_heads))
        query, key = (_prepare(emission, node, f"{name}.{part}", x, norm, heads) for part, x, norm, heads in parts)
        value = _pad_heads(emission, emission.values[node.value], f"{name}.value", node.kv_heads, node.head_dim)
    past_key, present_key = emission.cache(node, "key")
    past_value, present_value = emission.cache(node, "value")
    operands: list[ir.Value | None] = [query, key, value, past_key, past_value]
    attributes: dict[str, int | float] = {
        "num_heads": node.heads,
        "kv_num_heads": node.kv_heads,
        "scale": node.scale,
        "do_rotary": int(inside),
        "rotary_interleaved": 0,
    }
    if node.sparsity is None:
        operator = "GroupQueryAttention"
        operands += [emission.last_position(), emission.mask_length()]
        attributes |= {"local_window_size": node.window or -1, "softcap": node.softcap or 0.0}
    else:
        operator = "SparseAttention"
        operands += [*emission.block_mask(node), emission.mask_length(), emission.mask_length()]
        attributes["sparse_block_size"] = node.sparsity.block_size
    if inside:
        operands += emission.tables(node)
    mixed = name if width == node.head_dim else f"{name}.padded"
    y = emission.call(operator, operands, [mixed, present_key, present_value], attributes, MICROSOFT)
    emission.presents[present_key], emission.presents[present_value] = emission.last(1), emission.last(2)
    emission.values[node.output] = (
        y if width == node.head_dim else _unpad_heads(emission, y, name, node.heads, node.head_dim)
    )


def _prepare(emission: Emission, node: Attention, name: str, x: Value, norm: WeightInfo | None, heads: int) -> ir.Value:
    """Queries or keys as GroupQueryAttention takes them: normalized, rotated where it can't, filled up."""
    y = emission.values[x]
    if norm is not None:
        # The CPU kernel refuses the norms that the operator's schema has.
        y = emission.call("Reshape", [y, emission.integers([0, 0, heads, node.head_dim])], f"{name}.heads")
        inputs = [y, emission.vector(norm, node.norm_offset)]
        y = emission.call("RMSNormalization", inputs, f"{name}.norm", {"epsilon": node.norm_epsilon, "axis": -1})
        y = emission.call("Reshape", [y, emission.integers([0, 0, heads * node.head_dim])], f"{name}.normalized")
    if node.rotary is not None and not rotates_inside(node):
        width = 2 * len(node.rotary.frequencies)
        attributes = {
            "num_heads": heads,
            "rotary_embedding_dim": width if width < node.head_dim else 0,
            "interleaved": 0,
        }
        inputs = [y, emission.first_position(), *emission.tables(node)]
        y = emission.call("RotaryEmbedding", inputs, f"{name}.rotated", attributes, MICROSOFT)
    return _pad_heads(emission, y, name, heads, node.head_dim)


def _pad_heads(emission: Emission, x: ir.Value, name: str, heads: int, head_dim: int) -> ir.Value:
    width = cache_head_dim(head_dim)
    if width == head_dim:
        return x
    y = emission.call("Reshape", [x, emission.integers([0, 0, heads, head_dim])], f"{name}.narrow")
    y = emission.call(
        "Pad", [y, emission.integers([0, width - head_dim]), None, emission.integers([3])], f"{name}.wide"
    )
    return emission.call("Reshape", [y, emission.integers([0, 0, heads * width])], f"{name}.padded")


def _unpad_heads(emission: Emission, x: ir.Value, name: str, heads: int, head_dim: int) -> ir.Value:
    wide = emission.integers([0, 0, heads, cache_head_dim(head_dim)])
    y = emission.call("Reshape", [x, wide], f"{name}.wide")
    y = emission.call(
        "Slice", [y, emission.integers([0]), emission.integers([head_dim]), emission.integers([3])], f"{name}.narrow"
    )
    return emission.call("Reshape", [y, emission.integers([0, 0, heads * head_dim])], name)
