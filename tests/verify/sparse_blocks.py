"""What a block-sparse attention of the tiny Phi-3 small sees, and what it would see with one number wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tests.tiny_models import ROWS

__all__ = ["MODEL", "RIGHT", "WRONG", "Blocks"]

MODEL = "phi3small"
CONFIG = next(row for row in ROWS if row.name == MODEL).config


@dataclass(frozen=True)
class Blocks:
    """``stride`` at 4 heads shifts by one block from head to head."""

    size: int
    local: int
    stride: int
    heads: int = CONFIG["num_attention_heads"]

    def is_local(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Of positions."""
        return query // self.size - key // self.size < self.local

    def is_strided(self, key: np.ndarray) -> np.ndarray:
        """bool ``[heads, keys]``."""
        return (key // self.size + np.arange(self.heads)[:, None] + 1) % self.stride == 0

    def seen(self, count: int) -> np.ndarray:
        """bool ``[heads, count, count]`` of ``count`` whole blocks, causal."""
        first = np.arange(count) * self.size
        near = self.is_local(first[:, None], first)
        return np.tril(near | self.is_strided(first)[:, None])


RIGHT = Blocks(*(CONFIG[f"blocksparse_{name}"] for name in ("block_size", "num_local_blocks", "vert_stride")))
WRONG: Mapping[str, Blocks] = {
    "sparse blocks one position larger": replace(RIGHT, size=RIGHT.size + 1),
    "one local block more": replace(RIGHT, local=RIGHT.local + 1),
    "one local block less": replace(RIGHT, local=RIGHT.local - 1),
    "stride one block longer": replace(RIGHT, stride=RIGHT.stride + 1),
}
