"""The bytes of a .pte in pieces of known size, each streamed when the file is written.

XNNPACK's int4 filter holds code + 8 with the even column in the low nibble; ExecuTorch's ``embedding_4bit`` holds
code + 8 with the even column in the high nibble.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm_export.quantization.weights import Weights

__all__ = ["Packing", "Piece", "array_piece"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """``size`` bytes; ``blocks`` makes them, in order, each time it is called."""

    size: int
    blocks: Callable[[], Iterator[Array]]


def array_piece(make: Callable[[], Array], size: int) -> Piece:
    """A piece that is made at once."""

    def blocks() -> Iterator[Array]:
        yield make()

    return Piece(size, blocks)


def _as_stored(packed: npt.NDArray[np.uint8]) -> Array:
    return packed


def _low_even(packed: npt.NDArray[np.uint8]) -> Array:
    return packed ^ np.uint8(0x88)


def _high_even(packed: npt.NDArray[np.uint8]) -> Array:
    biased = packed ^ np.uint8(0x88)
    return (biased << 4) | (biased >> 4)


def _bfloat16(scales: npt.NDArray[np.float32]) -> Array:
    return (np.ascontiguousarray(scales).view(np.uint32) >> 16).astype(np.uint16)


SCALES: dict[str, tuple[int, Callable[[npt.NDArray[np.float32]], Array]]] = {
    "bfloat16": (2, _bfloat16),
    "float16": (2, lambda scales: scales.astype(np.float16)),
    "float32": (4, lambda scales: scales),
}


@dataclass(frozen=True, slots=True)
class Packing:
    """Makes pieces of the weights; ``progress`` hears of each weight when its codes or values have been made."""

    weights: Weights
    progress: Callable[[str, int], None]

    def codes(self, names: Sequence[str], *, even_high: bool = False) -> Piece:
        """The codes of quantized matrices of one row of the scheme, one below the other."""
        tensors = [self.weights.quantized(name) for name in names]
        pack = _as_stored
        if tensors[0].row.bits == 4:
            pack = _high_even if even_high else _low_even
        widths = [tensor.shape[1] * tensor.row.bits // 8 for tensor in tensors]

        def blocks() -> Iterator[Array]:
            for name, tensor in zip(names, tensors, strict=True):
                for start, stop in tensor.row_ranges():
                    yield pack(tensor.packed(start, stop))
                self.progress(name, tensor.shape[0] * tensor.shape[1])

        return Piece(sum(tensor.shape[0] * width for tensor, width in zip(tensors, widths, strict=True)), blocks)

    def scales(self, names: Sequence[str], dtype: str) -> Piece:
        """The scales of the same matrices; ``dtype`` is ``bfloat16``, ``float16`` or ``float32``: exact in each."""
        tensors = [self.weights.quantized(name) for name in names]
        itemsize, convert = SCALES[dtype]

        def blocks() -> Iterator[Array]:
            for tensor in tensors:
                yield convert(tensor.scales())

        count = sum(tensor.shape[0] * tensor.row.groups(tensor.shape[1]) for tensor in tensors)
        return Piece(count * itemsize, blocks)

    def values(self, names: Sequence[str]) -> Piece:
        """The float32 values of unquantized matrices, one below the other."""

        def blocks() -> Iterator[Array]:
            for name in names:
                for _, values in self.weights.blocks(name):
                    yield values
                self.progress(name, int(np.prod(self.weights.shape(name))))

        return Piece(4 * sum(int(np.prod(self.weights.shape(name))) for name in names), blocks)

    def vectors(self, parts: Sequence[tuple[str | None, int]]) -> Piece:
        """Vectors end to end, each of a name and a length; zeros where there is no name."""

        def blocks() -> Iterator[Array]:
            for name, length in parts:
                if name is None:
                    yield np.zeros(length, np.float32)
                else:
                    yield self.weights.values(name)
                    self.progress(name, length)

        return Piece(4 * sum(length for _, length in parts), blocks)
