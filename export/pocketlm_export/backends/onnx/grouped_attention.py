"""GroupQueryAttention and RotaryEmbedding of ``com.microsoft`` in numpy, as ONNX Runtime's CPU kernels mean them.

Sources: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, and where it is silent
``onnxruntime/contrib_ops/cpu/bert`` (``gqa_attention_base.h``, ``group_query_attention.cc``, ``rotary_embedding.cc``).
Parameters are named as the operators' inputs and attributes; batches are of one.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import CheckError, UnsupportedError

__all__ = ["attend", "group_query_attention", "rotary_embedding", "split_heads", "stored"]

Array = npt.NDArray[Any]


def group_query_attention(
    query: Array,
    key: Array | None,
    value: Array | None,
    past_key: Array,
    past_value: Array,
    seqlens_k: Array,
    total_sequence_length: Array,
    cos_cache: Array | None = None,
    sin_cache: Array | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    local_window_size: int = -1,
) -> tuple[Array, Array, Array]:
    """``[1, S, heads * D]`` from ``past_key`` and ``past_value`` ``[1, kv_heads, T, D]``, which are the presents too:
    the buffers are shared, as in deployment, and written in place.

    ``query`` is packed ``[1, S, (heads + 2 kv_heads) * D]`` if ``key`` and ``value`` are None. ``seqlens_k`` is the
    last position: it alone says where to write and how far to read, but for a first prompt, which begins at 0.
    Raises :class:`CheckError` if the buffers or the tables don't hold the positions.
    """
    if local_window_size == 0 or local_window_size < -1:
        raise UnsupportedError(f"local_window_size {local_window_size} has no meaning; -1 is no window")
    q, k, v = split_heads(query, key, value, num_heads, kv_num_heads)
    length = q.shape[1]
    start, stop = _positions(length, int(seqlens_k.reshape(-1)[0]), int(total_sequence_length.reshape(-1)[0]))
    tables = (cos_cache, sin_cache) if do_rotary else None
    q = stored(q, k, v, past_key, past_value, start, tables, interleaved=bool(rotary_interleaved))
    positions = np.arange(start, stop)[:, None]
    seen = np.arange(stop) <= positions
    if local_window_size > 0:
        seen &= np.arange(stop) > positions - local_window_size
    seen = np.broadcast_to(seen, (num_heads, *seen.shape))
    return attend(q, past_key, past_value, seen, scale, softcap), past_key, past_value


def stored(
    query: Array,
    key: Array,
    value: Array,
    past_key: Array,
    past_value: Array,
    start: int,
    tables: tuple[Array | None, Array | None] | None,
    *,
    interleaved: bool,
) -> Array:
    """Puts keys and values ``[kv_heads, S, D]`` at ``start`` into the buffers; they and the queries, which are
    returned, are rotated if there are ``tables``."""
    stop = start + query.shape[1]
    if start < 0 or stop > past_key.shape[2]:
        raise CheckError(f"positions {start}..{stop} lie outside the cache of {past_key.shape[2]}")
    if tables is not None:
        cosine, sine = tables
        if cosine is None or sine is None:
            raise CheckError("do_rotary is 1 without tables")
        rows = _table_rows(cosine, start, stop), _table_rows(sine, start, stop)
        query, key = (_rotated(x, *rows, interleaved) for x in (query, key))
    past_key[0, :, start:stop], past_value[0, :, start:stop] = key, value
    return query


def attend(
    query: Array, past_key: Array, past_value: Array, seen: npt.NDArray[np.bool_], scale: float, softcap: float = 0.0
) -> Array:
    """``[1, S, heads * D]`` of queries ``[heads, S, D]`` over the first positions of the buffers; ``seen``
    ``[heads, S, positions]``."""
    heads, length, width = query.shape
    kv_heads, stop = past_key.shape[1], seen.shape[2]
    # Query heads of one key/value head stand behind one another.
    scores = query.reshape(kv_heads, -1, width) @ past_key[0, :, :stop].swapaxes(1, 2) * (scale or width**-0.5)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen.reshape(kv_heads, -1, stop), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed: Array = (scores @ past_value[0, :, :stop]).reshape(heads, length, width)
    return mixed.swapaxes(0, 1).reshape(1, length, -1)


def rotary_embedding(
    x: Array,
    position_ids: Array,
    cos_cache: Array,
    sin_cache: Array,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Array:
    """``[1, S, heads * D]`` rotated from position ``position_ids`` (``[1]``) on; without ``rotary_embedding_dim`` the
    tables tell D."""
    if position_ids.size != 1 or x.ndim != 3:
        raise UnsupportedError(
            f"positions {position_ids.shape} of inputs {x.shape} are not supported: one first position"
        )
    pairs = cos_cache.shape[1]
    if rotary_embedding_dim and (not num_heads or rotary_embedding_dim != 2 * pairs):
        raise CheckError(f"rotary_embedding_dim {rotary_embedding_dim} with tables of {pairs} pairs")
    width = x.shape[-1] // num_heads if rotary_embedding_dim else 2 * pairs
    start = int(position_ids.reshape(-1)[0])
    stop = start + x.shape[1]
    heads = x.reshape(x.shape[1], -1, width).swapaxes(0, 1)
    tables = _table_rows(cos_cache, start, stop), _table_rows(sin_cache, start, stop)
    return _rotated(heads, *tables, bool(interleaved)).swapaxes(0, 1).reshape(x.shape)


def split_heads(
    query: Array, key: Array | None, value: Array | None, heads: int, kv_heads: int
) -> tuple[Array, Array, Array]:
    """``[heads, S, D]`` of each; ``query`` holds all three if ``key`` and ``value`` are None."""
    if heads % kv_heads:
        raise CheckError(f"{heads} heads don't share {kv_heads} key/value heads evenly")
    if (key is None) != (value is None):
        raise CheckError("key and value must both be inputs, or both lie in the query")
    length = query.shape[1]
    if key is None or value is None:
        packed = query.reshape(length, heads + 2 * kv_heads, -1).swapaxes(0, 1)
        return packed[:heads], packed[heads : heads + kv_heads], packed[heads + kv_heads :]
    parts = ((query, heads), (key, kv_heads), (value, kv_heads))
    q, k, v = (x.reshape(length, count, -1).swapaxes(0, 1) for x, count in parts)
    return q, k, v


def _positions(length: int, last: int, total: int) -> tuple[int, int]:
    """The first position of a call, and the one after its last."""
    if length == total:  # a first prompt
        if last + 1 < length:
            raise CheckError(f"seqlens_k {last} ends within the first {length} positions")
        return 0, length
    start = last + 1 - length
    if start < 0:
        raise CheckError(f"seqlens_k {last} ends before the {length} positions of the call")
    return start, last + 1


def _table_rows(table: Array, start: int, stop: int) -> Array:
    if start < 0 or stop > len(table):
        raise CheckError(f"positions {start}..{stop} lie outside the rotary table of {len(table)}")
    return table[start:stop]


def _rotated(x: Array, cosine: Array, sine: Array, interleaved: bool) -> Array:
    """``[heads, S, D]``: the first ``2 * pairs`` elements of each head are rotated, the others pass."""
    pairs = cosine.shape[1]
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (
        slice(0, pairs), slice(pairs, 2 * pairs)
    )  # fmt: skip
    y = x.copy()
    y[..., first] = x[..., first] * cosine - x[..., second] * sine
    y[..., second] = x[..., second] * cosine + x[..., first] * sine
    return y
