"""Matrices as a .pte stores them: rows back in the store's convention, or as float32 values.

XNNPACK's int4 filter holds code + 8 with the even column in the low nibble; ExecuTorch's ``embedding_4bit`` the even
column in the high nibble. Scales are bfloat16 (int4 filters), float16 (4-bit embeddings) or float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.executorch.reading.payload import Payload, PayloadConstant
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import KernelStep
from pocketlm_export.backends.reading import WrittenMatrix

__all__ = ["FloatMatrix", "Matrix", "QuantizedMatrix", "embedding_table", "filter_matrix", "row_blocks"]

BLOCK_ELEMENTS = 1 << 18  # in float64 it stays in a core's cache: half the time of a million
EMBEDDINGS = {
    "quantized_decomposed::embedding_4bit.dtype_out": 4,
    "quantized_decomposed::embedding_byte.dtype_out": 8,
}

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Rows = slice | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FloatMatrix:
    """float32 ``[N, K]``, or a vector ``[N]``, mapped."""

    content: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.content.shape

    def written(self, rows: Rows) -> Floats:
        """The rows as they are."""
        return np.array(self.content[rows], np.float32)

    def values(self, rows: Rows) -> Floats:
        """The same."""
        return self.content[rows]


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Packed codes ``[N, bytes]`` and scales ``[N, groups]``, both mapped."""

    name: str
    bits: int
    packed: Array
    scales: Array
    even_high: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the codes."""
        return self.packed.shape[0], self.packed.shape[1] * 8 // self.bits

    def written(self, rows: Rows) -> WrittenMatrix:
        """Codes and scales of ``rows``."""
        return WrittenMatrix(self.name, self.bits, self._codes(rows), self._float_scales(rows))

    def values(self, rows: Rows) -> Floats:
        """Code times scale, float32 ``[n, K]``."""
        codes, scales = self._codes(rows), self._float_scales(rows)
        wide = codes.reshape(*scales.shape, -1).astype(np.float32)
        wide *= scales[..., None]
        return wide.reshape(codes.shape)

    def _codes(self, rows: Rows) -> npt.NDArray[np.int8]:
        packed = self.packed[rows]
        if self.bits == 8:
            return packed.view(np.int8)
        codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
        codes[:, self.even_high :: 2] = packed & 15
        codes[:, not self.even_high :: 2] = packed >> 4
        codes -= 8
        return codes

    def _float_scales(self, rows: Rows) -> Floats:
        scales = self.scales[rows]
        if scales.dtype == np.uint16:  # bfloat16
            return (scales.astype(np.uint32) << 16).view(np.float32)
        return scales.astype(np.float32)


Matrix = FloatMatrix | QuantizedMatrix


def row_blocks(matrix: Matrix, rows: slice | None = None) -> Iterator[tuple[slice, Floats]]:
    """Blocks of ``rows``, by default of all, about :data:`BLOCK_ELEMENTS` values each."""
    count, *rest = matrix.shape
    first, end = (0, count) if rows is None else (rows.start, rows.stop)
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(rest)))
    for start in range(first, end, step):
        block = slice(start, min(start + step, end))
        yield block, matrix.values(block)


def filter_matrix(file: PteFile, payload: Payload, number: int) -> Matrix:
    """The constant that value ``number`` of a payload is: a filter, or a bias as a vector."""
    value = payload.values[number]
    if value.constant is None:
        raise UnsupportedError(f"{file.path}: FullyConnected with a filter or bias (value {number}) that is computed")
    content = _named(file, value.constant, number)
    count = math.prod(value.shape)
    if value.datatype == "fp32":
        _expect(file, number, value.constant, 4 * count)
        return FloatMatrix(content.view("<f4").reshape(value.shape))
    assert value.scales is not None  # a parsed payload has them
    if len(value.shape) != 2 or 0 in value.shape:
        raise BundleError(f"{file.path}: value {number}: a quantized filter of shape {list(value.shape)}")
    rows, columns = value.shape
    scales = _named(file, value.scales, number)
    if value.datatype == "qcint8":
        _expect(file, number, value.constant, count)
        _expect(file, number, value.scales, 4 * rows)
        packed, wide = content.view(np.int8).reshape(rows, columns), scales.view("<f4").reshape(rows, 1)
        return QuantizedMatrix(value.constant.key, 8, packed, wide)
    group = value.group or 0
    if group <= 0 or columns % group or columns % 2:
        raise BundleError(f"{file.path}: value {number}: groups of {group} in {columns} columns")
    _expect(file, number, value.constant, count // 2)
    _expect(file, number, value.scales, 2 * count // group)
    return QuantizedMatrix(value.constant.key, 4, content.reshape(rows, -1), scales.view("<u2").reshape(rows, -1))


def embedding_table(file: PteFile, step: KernelStep) -> Matrix | None:
    """The table that a kernel looks rows up in; None for any other kernel."""
    if step.operator == "aten::embedding.out":
        return FloatMatrix(_constant(file, step.arguments[0], np.dtype("<f4")))
    bits = EMBEDDINGS.get(step.operator)
    if bits is None:
        return None
    zero_points, lowest, highest = (file.scalar(index) for index in step.arguments[2:5])
    limit = 2 ** (bits - 1)
    if (zero_points, lowest, highest) != (None, -limit, limit - 1):
        raise UnsupportedError(f"{file.path}: {step.operator} with zero points or codes {lowest}..{highest}")
    codes = _constant(file, step.arguments[0], np.dtype("u1" if bits == 4 else "i1"))
    scales = _constant(file, step.arguments[1], np.dtype("<f2" if bits == 4 else "<f4"))
    columns = codes.shape[1] * 8 // bits
    if scales.shape[0] != codes.shape[0] or scales.shape[1] == 0 or columns % scales.shape[1]:
        raise BundleError(f"{file.path}: {step.operator}: {scales.shape} scales for codes {codes.shape}")
    index = file.tensor(step.arguments[0]).data_buffer_idx
    return QuantizedMatrix(f"constant/{index}", bits, codes, scales, even_high=bits == 4)


def _constant(file: PteFile, index: int, dtype: np.dtype[Any]) -> Array:
    content = file.constant_tensor(index)
    if content is None or content.dtype != dtype or content.ndim != 2:
        raise UnsupportedError(f"{file.path}: an embedding whose table, value {index}, is no matrix of {dtype}")
    return content


def _named(file: PteFile, constant: PayloadConstant, number: int) -> npt.NDArray[np.uint8]:
    try:
        return file.named_data(constant.key, constant.size)
    except BundleError as error:
        raise BundleError(f"{error} (value {number} of a delegate)") from error


def _expect(file: PteFile, number: int, constant: PayloadConstant, size: int) -> None:
    if constant.size != size:
        raise BundleError(f"{file.path}: value {number} of a delegate: {constant.size} bytes for {size}")
