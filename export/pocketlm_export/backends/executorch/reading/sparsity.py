"""Which blocks of positions an explicit attention sees, by the two tables whose larger entry is added to its scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm_export.backends.reading import described_blocks

__all__ = ["stated_sparsity"]

Table = npt.NDArray[Any]


def stated_sparsity(tables: Sequence[Table], heads: int, context: int) -> str:
    """Of a table ``[rows, 2 * context]`` that is 0 where a query's block is near a key's, by row and by column less
    ``context``, and one ``[kv_heads, group, 1, context]`` that is 0 where a head sees a key from everywhere.

    A table of another form is said in words.
    """
    shapes = [table.shape for table in tables]
    local = next((table for table in tables if table.ndim == 2 and len(table)), None)
    strided = next((table for table in tables if table.ndim == 4 and table.size == heads * context), None)
    if strided is None or local is None or local.shape[1] != 2 * context:
        return f"mask tables {shapes}"
    size = _block_size(local)
    blocks = -(-context // size)
    near = _near_distances(local, size, blocks)
    if near is None:
        return f"a mask table of {size} equal rows that is not of blocks"
    by_position = strided.reshape(heads, context) == 0
    by_block = by_position[:, ::size]
    if not np.array_equal(np.repeat(by_block, size, axis=1)[:, :context], by_position):
        return f"a mask table of keys that is not of blocks of {size}"
    distance = np.arange(blocks)[:, None] - np.arange(blocks)
    close = near[np.maximum(distance, 0)]
    return described_blocks(size, (close | seen for seen in by_block))


def _block_size(local: Table) -> int:
    """How many rows are as the first: all queries of a block see the same."""
    other = np.flatnonzero((local != local[0]).any(1))
    return int(other[0]) if len(other) else len(local)


def _near_distances(local: Table, size: int, blocks: int) -> npt.NDArray[np.bool_] | None:
    """Whether a query sees the block that lies 0, 1, ... blocks back; None if the table isn't made of that."""
    context = local.shape[1] // 2
    key = (np.arange(2 * context) - context) // size
    near = np.zeros(blocks + 1, np.bool_)
    columns = np.flatnonzero(key <= 0)
    near[-key[columns]] = local[0, columns] == 0
    for row, line in enumerate(local):
        distance = row // size - key
        behind = (distance >= 0) & (distance < blocks)
        if not np.array_equal(line[behind] == 0, near[distance[behind]]) or not np.isin(line, (0, -np.inf)).all():
            return None
    return near[:blocks]
