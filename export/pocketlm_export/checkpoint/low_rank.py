"""What an adapter adds to one tensor: the product of two thin matrices, made for the rows that are being read."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketlm_export.checkpoint.tensors import TensorFile, row_blocks
from pocketlm_export.selection import RowSelection

__all__ = ["LowRankChange"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LowRankChange:
    """``scale * left @ right``, added to a tensor ``[N, K]``.

    ``left`` ``[N, rank]`` and ``right`` ``[rank, K]`` are names in ``file``; with ``transposed`` they are stored as
    ``[rank, N]`` and ``[K, rank]``. Arithmetic is float32.
    """

    file: TensorFile
    left: str
    right: str
    transposed: bool
    scale: float

    @property
    def digest(self) -> str:
        """sha256 of both factors' content and of how they are combined."""
        parts = self.file.digest(self.left), self.file.digest(self.right), self.scale, self.transposed
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def blocks(self, step: int, selection: RowSelection | None) -> Iterator[Floats]:
        """What is added to the blocks of about ``step`` rows that :meth:`TensorFile.float_blocks` gives of the tensor.

        ``right`` is held meanwhile, and ``left`` too where it is stored transposed.
        """
        right = self.file.values(self.right)
        if self.transposed:
            right = np.ascontiguousarray(right.T)
        for left in self._left_blocks(step, right.shape[0], selection):
            # Not matmul: its last bits depend on how many rows it is given, and the same rows are read in blocks of
            # several sizes. einsum adds the products of each element in the order of the rank.
            change: Floats = np.einsum("nr,rk->nk", left, right)
            change *= np.float32(self.scale)
            yield change

    def _left_blocks(self, step: int, rank: int, selection: RowSelection | None) -> Iterator[Floats]:
        if not self.transposed:
            for _, left in self.file.float_blocks(self.left, step * rank, selection):
                yield left
            return
        yield from row_blocks(np.ascontiguousarray(self.file.values(self.left).T), step, selection)
