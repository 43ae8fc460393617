"""A block-sparse attention's mask as SparseAttention wants it: for each layout the visible blocks of every row of
blocks, in compressed sparse rows. Head ``h`` uses layout ``h % layouts``."""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pocketlm_export.graph.graph import BlockSparsity

__all__ = ["BLOCK_SIZES", "block_mask"]

BLOCK_SIZES = (16, 32, 64, 128)  # that the kernel takes
Indices = npt.NDArray[np.int32]


@lru_cache(maxsize=4)
def block_mask(sparsity: BlockSparsity, heads: int, length: int) -> tuple[Indices, Indices]:
    """``[layouts, blocks + 1]``, where each row of blocks begins among the columns, and the columns
    ``[layouts, most]``, filled up with -1; for ``length`` positions."""
    blocks = -(-length // sparsity.block_size)
    layouts = [_visible(sparsity, head, blocks) for head in range(_layouts(sparsity, heads))]
    counts = np.array([np.cumsum(visible.sum(1)) for visible in layouts], np.int32)
    rows = np.pad(counts, ((0, 0), (1, 0)))
    columns = np.full((len(layouts), counts[:, -1].max()), -1, np.int32)
    for row, visible in zip(columns, layouts, strict=True):
        found = np.nonzero(visible)[1]
        row[: len(found)] = found
    return rows, columns


def _layouts(sparsity: BlockSparsity, heads: int) -> int:
    """After how many heads the pattern comes again; all of them where that is no part of their number."""
    period = sparsity.stride // math.gcd(sparsity.head_shift, sparsity.stride)
    return period if heads % period == 0 else heads


def _visible(sparsity: BlockSparsity, head: int, blocks: int) -> npt.NDArray[np.bool_]:
    query, key = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
    near = query - key < sparsity.local_blocks
    strided = (key + head * sparsity.head_shift + 1) % sparsity.stride == 0
    visible: npt.NDArray[np.bool_] = (key <= query) & (near | strided)
    return visible
