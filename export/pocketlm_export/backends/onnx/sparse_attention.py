"""SparseAttention of ``com.microsoft`` in numpy, as ONNX Runtime's CPU kernel means it.

Sources: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, and where it is silent
``onnxruntime/contrib_ops/cpu/sparse`` (``sparse_attention.cc``, ``sparse_attention_base.h``). Parameters are named as
the operator's inputs and attributes; batches are of one.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import CheckError
from pocketlm_export.backends.onnx.grouped_attention import attend, split_heads, stored

__all__ = ["sparse_attention", "visible_blocks"]

Array = npt.NDArray[Any]


def sparse_attention(
    query: Array,
    key: Array | None,
    value: Array | None,
    past_key: Array,
    past_value: Array,
    block_row_indices: Array,
    block_col_indices: Array,
    total_sequence_length: Array,
    key_total_sequence_lengths: Array,
    cos_cache: Array | None = None,
    sin_cache: Array | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    sparse_block_size: int,
    scale: float = 0.0,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
) -> tuple[Array, Array, Array]:
    """As :func:`pocketlm_export.backends.onnx.grouped_attention.group_query_attention`; a key is seen where its block
    is listed for the query's. Raises :class:`CheckError` if the mask doesn't hold the positions."""
    total = int(total_sequence_length.reshape(-1)[0])
    if key_total_sequence_lengths.reshape(-1).tolist() != [total]:
        raise CheckError(f"keys of {key_total_sequence_lengths.tolist()} positions, but {total} in all")
    q, k, v = split_heads(query, key, value, num_heads, kv_num_heads)
    start = total - q.shape[1]
    tables = (cos_cache, sin_cache) if do_rotary else None
    q = stored(q, k, v, past_key, past_value, start, tables, interleaved=bool(rotary_interleaved))
    visible = visible_blocks(block_row_indices, block_col_indices, num_heads)
    if total > visible.shape[1] * sparse_block_size:
        raise CheckError(f"{total} positions lie outside {visible.shape[1]} blocks of {sparse_block_size}")
    queries, keys = np.arange(start, total), np.arange(total)
    seen = visible[:, queries // sparse_block_size][:, :, keys // sparse_block_size] & (keys <= queries[:, None])
    return attend(q, past_key, past_value, seen, scale), past_key, past_value


def visible_blocks(rows: Array, columns: Array, heads: int) -> npt.NDArray[np.bool_]:
    """``[heads, blocks, blocks]``. Raises :class:`CheckError` for indices that are no mask."""
    layouts, blocks = len(rows), rows.shape[1] - 1
    if len(columns) != layouts or heads % layouts:
        raise CheckError(f"{layouts} layouts of rows and {len(columns)} of columns for {heads} heads")
    visible = np.zeros((layouts, blocks, blocks), np.bool_)
    for layout in range(layouts):
        ends = rows[layout]
        if ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] > columns.shape[1]:
            raise CheckError("block_row_indices don't count the columns")
        listed = columns[layout, : ends[-1]]
        if ((listed < 0) | (listed >= blocks)).any():
            raise CheckError(f"block_col_indices lie outside {blocks} blocks")
        visible[layout, np.repeat(np.arange(blocks), np.diff(ends)), listed] = True
    return visible[np.arange(heads) % layouts]
