"""Constants of a program: stored tensors that are decoded when and as far as they are needed.

A :class:`StoredTensor` decodes any rows (first axis) of itself, so that a large quantized weight is never whole in
memory unless the :class:`WeightCache` has room for it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .package import ELEMENT_TYPES, unpack_bits

__all__ = [
    "BlockwiseShiftScale",
    "LookupTable",
    "PackedTensor",
    "Precision",
    "PrecisionName",
    "StoredTensor",
    "WeightCache",
    "WeightReader",
]

PrecisionName = Literal["float16", "float32", "float64"]
_BLOCK_ELEMENTS = 1 << 21  # decoded at a time: 8 MB of float32
_SMALL_ELEMENTS = 1 << 12


@dataclass(frozen=True)
class Precision:
    """How floating-point tensors are held: float32 arrays, or float64 ones.

    In ``"float16"`` the fp16-typed ones hold only values of fp16: :meth:`hold` rounds them (to the nearest, ties to
    even; beyond 65,504 to infinity).
    """

    name: PrecisionName

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.name == "float64" else np.float32)

    def held_dtype(self, element: str) -> np.dtype[Any]:
        kind = ELEMENT_TYPES[element]
        return self.dtype if kind.is_float else kind.storage.newbyteorder("=")

    def hold(self, array: NDArray[Any], element: str) -> NDArray[Any]:
        """``array`` as a tensor declared ``element`` is held."""
        if element == "FLOAT16" and self.name == "float16" and array.dtype != np.float16:
            array = array.astype(np.float16)
        return array.astype(self.held_dtype(element), copy=False)


class StoredTensor(ABC):
    """A constant of ``shape``, declared ``element``; ``identity`` is equal where the stored bytes are."""

    shape: tuple[int, ...]
    element: str
    identity: Hashable

    @abstractmethod
    def rows(self, index: NDArray[np.int64], precision: Precision) -> NDArray[Any]:
        """Entries ``index`` (1-D, each in 0..shape[0]-1) of the first axis as held; a scalar has the one row 0."""

    @property
    def row_count(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1:]


class PackedTensor(StoredTensor):
    """Elements as they lie in the file, packed where an element is smaller than a byte."""

    def __init__(self, data: NDArray[np.uint8], element: str, shape: tuple[int, ...], identity: Hashable) -> None:
        self.shape, self.element, self.identity = shape, element, identity
        self._data = data

    def reshaped(self, shape: tuple[int, ...]) -> "PackedTensor":
        return PackedTensor(self._data, self.element, shape, (self.identity, shape))

    def rows(self, index: NDArray[np.int64], precision: Precision) -> NDArray[Any]:
        return precision.hold(self._codes(index), self.element)

    def scalar(self) -> int:
        """The one element of an integer scalar."""
        return int(self._codes(np.zeros(1, np.int64))[0])

    def _codes(self, index: NDArray[np.int64]) -> NDArray[Any]:
        kind, row_elements = ELEMENT_TYPES[self.element], math.prod(self.row_shape)
        shape = (len(index), *self.row_shape)
        row_bits = row_elements * kind.bits
        if row_bits % 8 or not row_bits:
            whole = unpack_bits(np.asarray(self._data), self.row_count * row_elements, kind)
            return whole.reshape(self.row_count, *self.row_shape)[index]
        rows = np.ascontiguousarray(self._data.reshape(self.row_count, row_bits // 8)[_as_slice(index)])
        return unpack_bits(rows.reshape(-1), len(index) * row_elements, kind).reshape(shape)


class BlockwiseShiftScale(StoredTensor):
    """``scale * (data - offset)``; scale and offset hold one value for each block of data.

    The sizes of a block follow from the shapes: ``data.shape[i] / scale.shape[i]``.
    """

    def __init__(
        self, data: StoredTensor, scale: StoredTensor, offset: StoredTensor | None, element: str, identity: Hashable
    ) -> None:
        self.shape, self.element, self.identity = data.shape, element, identity
        self._data, self._scale, self._offset = data, scale, offset
        _check_blocks(data.shape, scale.shape, "scale")
        if scale.element != element:
            raise ValueError(f"scale of type {scale.element}, result of {element}")
        if offset is not None and offset.shape != scale.shape:
            raise ValueError(f"offset has shape {list(offset.shape)}, scale {list(scale.shape)}")

    def rows(self, index: NDArray[np.int64], precision: Precision) -> NDArray[Any]:
        groups = self._scale.shape
        blocks: tuple[int, ...] = (len(index),)
        block_row = index
        if groups:
            sizes = [size // count for size, count in zip(self.shape, groups, strict=True)]
            block_row = index // sizes[0]
            pairs = zip(groups[1:], sizes[1:], strict=True)
            blocks = (len(index), *(size for pair in pairs for size in pair))
        per_block = (len(index), *(size for count in groups[1:] for size in (count, 1)))
        values = self._data.rows(index, precision).astype(precision.dtype).reshape(blocks)
        if self._offset is not None:
            values -= self._offset.rows(block_row, precision).astype(precision.dtype).reshape(per_block)
        values *= self._scale.rows(block_row, precision).reshape(per_block)
        return precision.hold(values.reshape(len(index), *self.row_shape), self.element)


class LookupTable(StoredTensor):
    """``lut[group of the position][index]``; a table's entries may be vectors along ``vector_axis``."""

    def __init__(
        self, indices: StoredTensor, lut: StoredTensor, vector_axis: int | None, element: str, identity: Hashable
    ) -> None:
        rank = len(indices.shape)
        if rank < 1 or len(lut.shape) != rank + 2:
            raise ValueError(f"lut of rank {len(lut.shape)}, where indices of rank {rank} need rank {rank + 2}")
        *groups, entries, width = lut.shape
        _check_blocks(indices.shape, tuple(groups), "lut")
        if entries != 1 << ELEMENT_TYPES[indices.element].bits:
            raise ValueError(f"{entries} entries in a lookup table for {indices.element} indices")
        if vector_axis is None and width != 1:
            raise ValueError(f"lut has vectors of {width} and no vector_axis")
        if lut.element != element:
            raise ValueError(f"lut of type {lut.element}, result of {element}")
        axis = vector_axis or 0
        if not -rank <= axis < rank:
            raise ValueError(f"vector_axis {axis} of a tensor of rank {rank}")
        self._vector_axis = axis % rank
        self.shape = tuple(size * width if i == self._vector_axis else size for i, size in enumerate(indices.shape))
        self.element, self.identity = element, identity
        self._indices, self._lut, self._width = indices, lut, width
        self._groups, self._entries = tuple(groups), entries

    def rows(self, index: NDArray[np.int64], precision: Precision) -> NDArray[Any]:
        vectors_along_rows = self._vector_axis == 0
        index_row = index // self._width if vectors_along_rows else index
        position = self._indices.rows(index_row, precision).astype(np.int64)
        table = np.zeros((1,) * position.ndim, np.int64)
        for axis, (size, count) in enumerate(zip(self._indices.shape, self._groups, strict=True)):
            along = (index_row if axis == 0 else np.arange(size)) // (size // count)
            table = table * count + along.reshape([-1 if i == axis else 1 for i in range(position.ndim)])
        lut = self._lut.rows(np.arange(self._lut.row_count), precision).reshape(-1, self._width)
        values = lut[table * self._entries + position]
        if vectors_along_rows:
            component = (index % self._width).reshape(-1, *(1,) * position.ndim)
            return precision.hold(np.take_along_axis(values, component, axis=-1)[..., 0], self.element)
        values = np.moveaxis(values, -1, self._vector_axis + 1)
        return precision.hold(values.reshape(len(index), *self.row_shape), self.element)


class WeightCache:
    """Decoded tensors, at most ``capacity`` bytes of them, small ones aside.

    What is full stays: a program walks over its weights in the same order at each step, and evicting the oldest would
    evict each one just before its turn.
    """

    def __init__(self, capacity: int) -> None:
        self._room = capacity
        self._held: dict[Hashable, NDArray[Any]] = {}

    def get(self, tensor: StoredTensor) -> NDArray[Any] | None:
        return self._held.get(tensor.identity)

    def has_room(self, tensor: StoredTensor, precision: Precision) -> bool:
        """Always for small ones: decoding them at each use would cost more than they take."""
        elements = math.prod(tensor.shape)
        return elements <= _SMALL_ELEMENTS or elements * precision.held_dtype(tensor.element).itemsize <= self._room

    def put(self, tensor: StoredTensor, value: NDArray[Any]) -> None:
        value.flags.writeable = False
        self._held[tensor.identity] = value
        self._room -= value.nbytes


class WeightReader:
    """A stored tensor in one precision, through the cache: what the operators see."""

    def __init__(self, tensor: StoredTensor, precision: Precision, cache: WeightCache) -> None:
        self._tensor, self._precision, self._cache = tensor, precision, cache

    @property
    def shape(self) -> tuple[int, ...]:
        return self._tensor.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._precision.held_dtype(self._tensor.element)

    def whole(self) -> NDArray[Any]:
        held = self._cache.get(self._tensor)
        if held is None:
            held = np.empty(self.shape, self.dtype)
            rows = held.reshape(self._tensor.row_count, *self._tensor.row_shape)
            for start, stop in self._block_ranges():
                rows[start:stop] = self._tensor.rows(np.arange(start, stop), self._precision)
            if self._cache.has_room(self._tensor, self._precision):
                self._cache.put(self._tensor, held)
        return held

    def rows(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """Entries ``index`` (1-D, in range) of the first axis."""
        held = self._cache.get(self._tensor)
        return held[index] if held is not None else self._tensor.rows(index, self._precision)

    def blocks(self) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """(first row, past the last row, those rows) until the first axis is covered; whole where the cache has it."""
        if self._cache.get(self._tensor) is not None or self._cache.has_room(self._tensor, self._precision):
            yield 0, self._tensor.row_count, self.whole()
            return
        for start, stop in self._block_ranges():
            yield start, stop, self._tensor.rows(np.arange(start, stop), self._precision)

    def _block_ranges(self) -> Iterator[tuple[int, int]]:
        step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(self._tensor.row_shape)))
        for start in range(0, self._tensor.row_count, step):
            yield start, min(start + step, self._tensor.row_count)


def _as_slice(index: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    contiguous = len(index) and int(index[-1]) - int(index[0]) + 1 == len(index) and bool(np.all(np.diff(index) == 1))
    return slice(int(index[0]), int(index[-1]) + 1) if contiguous else index


def _check_blocks(shape: tuple[int, ...], groups: tuple[int, ...], name: str) -> None:
    if len(shape) != len(groups) or any(not count or size % count for size, count in zip(shape, groups, strict=True)):
        raise ValueError(f"{name} of shape {list(groups)} does not divide a tensor of shape {list(shape)} into blocks")
