"""Quantized matrices as MatMulNBits and GatherBlockQuantized define their bytes, and products with them.

Codes are uint8 with their zero at ``2^(bits-1)``; of 4 bits there are two a byte, the even column low. Scales are
float32, one for each block of columns: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.onnx.file import MICROSOFT, OnnxFile, WrittenNode

__all__ = ["QuantizedMatrix", "dequantized", "product", "quantized_matrices", "row_ranges", "signed_codes"]

Array = npt.NDArray[Any]
BLOCK_ELEMENTS = 1 << 20  # of a matrix at a time in float64


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Names of the codes and scales that an operator reads as a ``[rows, columns]`` matrix; ``block`` counts columns.

    ``accuracy_level`` is the operator's: 4 rounds activations to int8; a gather has none.
    """

    codes: str
    scales: str
    rows: int
    columns: int
    bits: int
    block: int
    accuracy_level: int = 0

    def packed(self, file: OnnxFile) -> tuple[Array, Array]:
        """uint8 ``[rows, bytes]`` and float32 ``[rows, blocks]``, mapped. Raises :class:`BundleError` if the sizes in
        the file aren't those that the operator states."""
        blocks = -(-self.columns // self.block)
        codes, scales = file.constant(self.codes), file.constant(self.scales)
        size = self.rows * blocks * self.block * self.bits // 8
        if codes.dtype != np.uint8 or codes.size != size or len(codes) != self.rows:
            raise BundleError(f"{file.path}: {self.codes}: {codes.dtype} {codes.shape} is not a matrix of {self}")
        if scales.dtype != np.float32 or scales.size != self.rows * blocks:
            raise BundleError(f"{file.path}: {self.scales}: {scales.dtype} {scales.shape} are not scales of {self}")
        return codes.reshape(self.rows, -1), scales.reshape(self.rows, blocks)

    def __str__(self) -> str:
        return f"[{self.rows}, {self.columns}] in {self.bits} bits and blocks of {self.block}"


def quantized_matrices(file: OnnxFile) -> Iterator[tuple[WrittenNode, QuantizedMatrix]]:
    """Every operator that reads a quantized matrix, in the order of the file."""
    for node in file.nodes:
        if node.operator not in (f"{MICROSOFT}MatMulNBits", f"{MICROSOFT}GatherBlockQuantized"):
            continue
        if node.input(3):
            raise UnsupportedError(f"{file.path}: {node.name}: has zero points, but all schemes are symmetric")
        try:
            yield node, _matrix(file, node)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{file.path}: {node.name}: can't be read as a product or a gather: {error!r}") from error


def _matrix(file: OnnxFile, node: WrittenNode) -> QuantizedMatrix:
    bits, block = node.attributes["bits"], node.attributes["block_size"]
    if bits not in (4, 8) or not isinstance(block, int) or block < 16 or block & (block - 1):
        raise UnsupportedError(f"{file.path}: {node.name}: {bits} bits in blocks of {block} are not supported")
    if node.operator.endswith("MatMulNBits"):
        rows, columns = node.attributes["N"], node.attributes["K"]
        level = node.attributes.get("accuracy_level", 0)
        if not all(isinstance(size, int) and size > 0 for size in (rows, columns)):
            raise ValueError(f"[{rows}, {columns}]")
        return QuantizedMatrix(node.input(1), node.input(2), rows, columns, bits, block, level)
    rows, width = file.constant(node.input(0)).shape
    return QuantizedMatrix(
        node.input(0), node.input(2), rows, _kept(file, node.outputs[0], width * 8 // bits), bits, block
    )


def _kept(file: OnnxFile, output: str, width: int) -> int:
    """The columns that a Slice of ``output`` keeps; all of them without one."""
    ends = [node.input(2) for node in file.nodes if node.operator == "Slice" and node.input(0) == output]
    return int(file.constant(ends[0])[0]) if ends else width


def signed_codes(packed: Array, bits: int) -> npt.NDArray[np.int8]:
    """uint8 ``[..., bytes]`` -> int8 ``[..., columns]``."""
    unsigned = np.stack((packed & 0xF, packed >> 4), -1).reshape(*packed.shape[:-1], -1) if bits == 4 else packed
    return (unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def dequantized(packed: Array, scales: Array, bits: int) -> npt.NDArray[np.float64]:
    """uint8 ``[..., bytes]`` and float32 ``[..., blocks]`` -> float64 ``[..., columns]``."""
    values = VALUES_OF_BYTE[bits].take(packed, 0).reshape(*scales.shape, -1)
    values *= scales[..., None]
    return values.reshape(*scales.shape[:-1], -1)


# The codes of each byte as float64 ``[256, codes]``: a look-up is the fastest way to unpack.
VALUES_OF_BYTE = {
    bits: signed_codes(np.arange(256, dtype=np.uint8)[:, None], bits).astype(np.float64) for bits in (4, 8)
}


def row_ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows of a matrix, about :data:`BLOCK_ELEMENTS` each."""
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def product(x: Array, packed: Array, scales: Array, bits: int) -> npt.NDArray[np.float64]:
    """``[..., K]`` times the transposed matrix -> float64 ``[..., N]``; unpacked by blocks of rows."""
    y = np.empty((*x.shape[:-1], len(packed)), np.float64)
    for start, stop in row_ranges(len(packed), x.shape[-1]):
        matrix = dequantized(packed[start:stop], scales[start:stop], bits)
        y[..., start:stop] = x @ matrix[:, : x.shape[-1]].T
    return y
