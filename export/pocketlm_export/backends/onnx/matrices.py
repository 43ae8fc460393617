"""Quantized matrices as MatMulNBits, GatherBlockQuantized and QMoE define their bytes, and products with them.

Codes are uint8 with their zero at ``2^(bits-1)``; of 4 bits there are two a byte, the even column low. Scales are
float32, one for each block of columns: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.onnx.file import MICROSOFT, OnnxFile, WrittenNode

__all__ = ["QMOE", "QuantizedMatrix", "dequantized", "product", "quantized_matrices", "row_ranges", "signed_codes"]

Array = npt.NDArray[Any]
QMOE = f"{MICROSOFT}QMoE"
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
        if codes.dtype != np.uint8 or codes.size != size:
            raise BundleError(f"{file.path}: {self.codes}: {codes.dtype} {codes.shape} is not a matrix of {self}")
        if scales.dtype != np.float32 or scales.size != self.rows * blocks:
            raise BundleError(f"{file.path}: {self.scales}: {scales.dtype} {scales.shape} are not scales of {self}")
        return codes.reshape(self.rows, -1), scales.reshape(self.rows, blocks)

    def __str__(self) -> str:
        return f"[{self.rows}, {self.columns}] in {self.bits} bits and blocks of {self.block}"


def quantized_matrices(file: OnnxFile) -> Iterator[tuple[WrittenNode, QuantizedMatrix]]:
    """Every quantized matrix that an operator reads, in the order of the file; all experts' are one."""
    for node in file.nodes:
        read, zero_points = MATRICES.get(node.operator, (None, ()))
        if read is None:
            continue
        if any(node.input(index) for index in zero_points):
            raise UnsupportedError(f"{file.path}: {node.name}: has zero points, but all schemes are symmetric")
        try:
            for matrix in read(file, node):
                _check_blocks(file, node, matrix)
                yield node, matrix
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{file.path}: {node.name}: its matrices can't be read: {error!r}") from error


def _check_blocks(file: OnnxFile, node: WrittenNode, matrix: QuantizedMatrix) -> None:
    bits, block = matrix.bits, matrix.block
    if not all(isinstance(size, int) and size > 0 for size in (matrix.rows, matrix.columns, block)):
        raise ValueError(str(matrix))
    whole_row = node.operator == QMOE and bits == 8 and block == matrix.columns
    if bits not in (4, 8) or not (whole_row or (block >= 16 and not block & (block - 1))):
        raise UnsupportedError(f"{file.path}: {node.name}: {bits} bits in blocks of {block} are not supported")


def _of_product(_file: OnnxFile, node: WrittenNode) -> Iterator[QuantizedMatrix]:
    stated = node.attributes
    yield QuantizedMatrix(
        node.input(1), node.input(2), stated["N"], stated["K"], stated["bits"], stated["block_size"],
        stated.get("accuracy_level", 0),
    )  # fmt: skip


def _of_gather(file: OnnxFile, node: WrittenNode) -> Iterator[QuantizedMatrix]:
    rows, width = file.constant(node.input(0)).shape
    bits = node.attributes["bits"]
    columns = _kept(file, node.outputs[0], width * 8 // bits)
    yield QuantizedMatrix(node.input(0), node.input(2), rows, columns, bits, node.attributes["block_size"])


def _of_experts(file: OnnxFile, node: WrittenNode) -> Iterator[QuantizedMatrix]:
    bits = node.attributes["expert_weight_bits"]
    for codes, scales in ((2, 3), (5, 6)):
        experts, rows, size = file.constant(node.input(codes)).shape
        columns = size * 8 // bits
        block = node.attributes.get("block_size", columns)
        yield QuantizedMatrix(node.input(codes), node.input(scales), experts * rows, columns, bits, block)


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


# How an operator's matrices are read, and which of its inputs are zero points.
MATRICES: Mapping[str, tuple[Callable[[OnnxFile, WrittenNode], Iterator[QuantizedMatrix]], tuple[int, ...]]] = {
    f"{MICROSOFT}GatherBlockQuantized": (_of_gather, (3,)),
    f"{MICROSOFT}MatMulNBits": (_of_product, (3,)),
    QMOE: (_of_experts, (11, 12, 13)),
}
