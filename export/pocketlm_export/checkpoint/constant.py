"""A tensor that belongs to the model but to no file: its configuration implies it."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketlm_export.architectures import DecoderConfig
from pocketlm_export.checkpoint.tensors import TensorInfo
from pocketlm_export.selection import RowSelection

__all__ = ["ConstantVector", "suppressing_bias"]

# On the logits, where those of released models stay below 50. A larger one would make errors look small to checks that
# measure them by the deviation of the logits.
SUPPRESSION = -100.0


class ConstantVector:
    """Is read as a :class:`pocketlm_export.checkpoint.tensors.TensorFile` with one float32 vector; ``path`` is the file
    that it follows from."""

    def __init__(self, path: Path, name: str, content: npt.NDArray[np.float32]) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = {name: TensorInfo("F32", content.shape, 0, content.nbytes)}
        self._content = content

    def digest(self, _name: str) -> str:
        """sha256 of the values."""
        return hashlib.sha256(self._content.astype("<f4").tobytes()).hexdigest()

    def float_blocks(
        self, _name: str, _elements: int, selection: RowSelection | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """The vector, in one block."""
        assert selection is None
        yield 0, self._content

    def release(self) -> None:
        """Nothing is mapped."""


def suppressing_bias(path: Path, name: str, config: DecoderConfig) -> ConstantVector:
    """The head's bias that keeps ``config.suppressed_ids`` from being chosen: it takes 100 from their logits."""
    bias = np.zeros(config.vocabulary_size, np.float32)
    bias[list(config.suppressed_ids)] = SUPPRESSION / config.logit_scale
    return ConstantVector(path, name, bias)
