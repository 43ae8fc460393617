"""Translates attention over the caches: ExecuTorch's own kernel, or XNNPACK's operations where the kernel lacks one.

The kernel knows one mask for all heads, and no soft cap. Explicit attention reads the rows of the caches that are
written so far; one delegate serves every layer of the same shape.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pocketlm_export.backends.executorch.emission import Emitter, Shape
from pocketlm_export.backends.executorch.importing import ScalarType
from pocketlm_export.backends.executorch.packing import array_piece
from pocketlm_export.backends.executorch.partition import CachedAttention
from pocketlm_export.backends.executorch.xnnpack import XnnpackGraph
from pocketlm_export.graph.graph import BlockSparsity, Value

__all__ = ["emit_attention"]

Array = np.ndarray[Any, Any]


def emit_attention(emitter: Emitter, node: CachedAttention) -> None:
    """Append to the caches, then attend."""
    caches = [_append(emitter, value) for value in (node.key, node.value)]
    if node.softcap is None and node.sparsity is None:
        _attend_in_the_kernel(emitter, node, caches)
    else:
        _attend_explicitly(emitter, node, caches)


def _append(emitter: Emitter, value: Value) -> int:
    method = emitter.method
    unused = emitter.once("unused", lambda: method.activation((1,)))  # update_cache's result, which nobody needs
    cache = method.cache(_cache_shape(emitter, value))
    method.kernel("llama::update_cache.out", [emitter.tensors[value], cache, emitter.start], unused)
    return cache


def _attend_in_the_kernel(emitter: Emitter, node: CachedAttention, caches: Sequence[int]) -> None:
    scalar = emitter.method.scalar
    mask = scalar(None) if node.window is None else _window_mask(emitter, node.window)
    # The kernel's arithmetic is float32, its scale included.
    rest = [scalar(0.0), scalar(node.window is None), scalar(float(np.float32(node.scale)))]
    arguments = [emitter.tensors[node.query], *caches, emitter.start, mask, *rest]
    emitter.method.kernel("llama::custom_sdpa.out", arguments, emitter.make(node.output))


def _attend_explicitly(emitter: Emitter, node: CachedAttention, caches: Sequence[int]) -> None:
    context = emitter.graph.context_length
    query, shape = emitter.tensors[node.query], emitter.shape(node.query)
    arguments: list[tuple[int, Shape]] = [(query, shape)]
    for cache, value in zip(caches, (node.key, node.value), strict=True):
        written = _cache_shape(emitter, value)
        arguments.append((_until_now(emitter, cache, 1, written), written))
    arguments.append((emitter.number(node.scale), (1,)))
    if node.softcap is not None:
        arguments.append((emitter.number(node.softcap), (1,)))
    square = (emitter.longest_call, context)
    window = _window_mask(emitter, node.window)
    arguments.append((emitter.once(("seen", window), lambda: _until_now(emitter, window, 1, square)), square))
    if node.sparsity is not None:
        arguments += _sparse_masks(emitter, node.sparsity, shape[2], emitter.shape(node.key)[2])
    shapes = tuple(shape for _, shape in arguments)
    capped, sparse = node.softcap is not None, node.sparsity is not None
    graph = emitter.once(("attention", shapes, capped), lambda: _attention_graph(shapes, capped, sparse))
    emitter.method.delegate(graph, [*(tensor for tensor, _ in arguments), emitter.make(node.output)])


def _attention_graph(shapes: Sequence[Shape], capped: bool, sparse: bool) -> XnnpackGraph:
    """``T`` are the positions until now, ``G`` the query heads of a key/value head."""
    graph = XnnpackGraph()
    query, keys, values, scale, *rest = (graph.input(shape) for shape in shapes)
    heads, head_dim, kv_heads = *shapes[0][2:], shapes[1][2]
    x = graph.binary("Multiply", query, scale)
    if capped:
        cap = rest.pop(0)
        x = graph.binary("Div", x, cap)  # here it is less work than on the scores
    by_heads = (0, 2, 3, 1, 4)
    x = graph.transpose(graph.reshape(x, (kv_heads, heads // kv_heads, head_dim)), by_heads)  # [1, KV, G, S, D]
    keys = graph.transpose(graph.reshape(keys, (kv_heads, 1, head_dim)), (0, 2, 3, 4, 1))  # [1, KV, 1, D, T]
    values = graph.transpose(graph.reshape(values, (kv_heads, 1, head_dim)), by_heads)  # [1, KV, 1, T, D]
    scores = graph.matrix_multiply(x, keys)
    if capped:
        scores = graph.binary("Multiply", graph.unary("Tanh", scores), cap)
    mask, *blocks = rest
    if sparse:
        mask = graph.binary("Add", mask, graph.binary("Maximum", *blocks))
    weights = graph.unary("Softmax", graph.binary("Add", scores, mask))
    mixed = graph.transpose(graph.matrix_multiply(weights, values), (0, 3, 1, 2, 4))
    graph.reshape(mixed, (heads, head_dim), graph.output(shapes[0]))
    return graph


def _cache_shape(emitter: Emitter, value: Value) -> Shape:
    return (1, emitter.graph.context_length, *emitter.shape(value)[2:])


def _until_now(emitter: Emitter, tensor: int, dimension: int, bound: Shape) -> int:
    """The positions that are written, those of this call included, along ``dimension``."""
    return emitter.slice(tensor, dimension, emitter.method.scalar(0), emitter.stop, bound)


# Masks are addends of the scores: 0 where query i sees key j, minus infinity elsewhere.


def _window_mask(emitter: Emitter, window: int | None) -> int:
    """``[S, context]``: keys up to the query's own position, and of those the last ``window``."""

    def seen(query: Array, key: Array) -> Array:
        distance = query - key
        return (distance >= 0) & (distance < (np.inf if window is None else window))

    zero, rows = emitter.method.scalar(0), emitter.longest_call
    return emitter.once(("mask", window), lambda: _shifted_mask(emitter, seen, rows, zero, emitter.start))


def _sparse_masks(emitter: Emitter, sparsity: BlockSparsity, heads: int, kv_heads: int) -> list[tuple[int, Shape]]:
    """The two of which one must see the key: the last blocks ``[S, T]``, and every head's own ``[KV, G, 1, T]``."""
    context, size = emitter.graph.context_length, sparsity.block_size
    square, row = (emitter.longest_call, context), (kv_heads, heads // kv_heads, 1, context)

    def is_local(query: Array, key: Array) -> Array:
        return query // size - key // size < sparsity.local_blocks

    def local() -> int:
        """Shifted by whole blocks, so the first query stands somewhere in the first block."""
        first = emitter.integer("mod", emitter.start, emitter.method.scalar(size))
        shift = emitter.integer("sub", emitter.start, first)
        whole = _shifted_mask(emitter, is_local, emitter.longest_call + size - 1, first, shift)
        return _until_now(emitter, whole, 1, square)

    def strided() -> int:
        def table() -> Array:
            head = np.arange(heads)[:, None] * sparsity.head_shift
            seen = (np.arange(context) // size + head + 1) % sparsity.stride == 0
            return np.where(seen, 0, -np.inf).astype(np.float32).reshape(row)

        piece = array_piece(table, 4 * heads * context)
        return _until_now(emitter, emitter.method.constant(row, ScalarType.FLOAT, piece), 3, row)

    return [(emitter.once(("local", sparsity), local), square), (emitter.once(("strided", sparsity), strided), row)]


def _shifted_mask(emitter: Emitter, seen: Callable[[Array, Array], Array], rows: int, first: int, shift: int) -> int:
    """``[S, context]`` of a mask that stays the same when both positions move by ``shift``, an integer of the method.

    A table ``[rows, 2 * context]`` of queries ``0..`` and keys ``-context..context`` serves all positions: its rows
    begin at ``first``, its columns are shifted.
    """
    method, context, longest = emitter.method, emitter.graph.context_length, emitter.longest_call

    def table() -> Array:
        visible = seen(np.arange(rows)[:, None], np.arange(2 * context)[None, :] - context)
        return np.where(visible, 0, -np.inf).astype(np.float32)

    constant = method.constant((rows, 2 * context), ScalarType.FLOAT, array_piece(table, 8 * rows * context))
    last = emitter.integer("add", first, emitter.length)
    block = emitter.slice(constant, 0, first, last, (longest, 2 * context))
    left = emitter.integer("sub", method.scalar(context), shift)
    right = emitter.integer("add", left, method.scalar(context))
    return emitter.slice(block, 1, left, right, (longest, context))
