"""What the constants of the package hold: codes, scales, vectors and tables as bytes, produced block by block."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import UnsupportedError
from pocketlm_export.backends.base import Entry, Lowering, merged_name
from pocketlm_export.graph.graph import WeightInfo
from pocketlm_export.graph.rotary import Rotary, rotary_tables

__all__ = ["Constant", "Layout", "Matrix"]

LARGEST_FLOAT16 = 65504.0
ELEMENT_BITS = {"float16": 16, "int8": 8, "int4": 4, "int32": 32}
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Constant:
    """One blob of ``element`` (a key of ELEMENT_BITS; int4 two a byte, the first low); ``blocks`` makes its bytes."""

    name: str
    element: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Bytes]]

    @property
    def bits(self) -> int:
        """Of all elements."""
        return ELEMENT_BITS[self.element] * math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes; half of the last one may be unused."""
        return -(-self.bits // 8)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of one or several weights below each other: ``data`` holds fp16 values, or codes where there are scales."""

    name: str
    data: Constant
    scales: Constant | None


@dataclass(slots=True)
class Layout:
    """The constants of a program by name; all its functions share them. ``entries`` says where each weight went."""

    lowering: Lowering
    constants: dict[str, Constant] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    _holders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _rotaries: list[Rotary] = field(default_factory=list)

    def matrix(self, weights: tuple[WeightInfo, ...]) -> Matrix:
        """``weights`` of one width and one scheme row as one matrix."""
        row = self.lowering.weights.row(weights[0].name)
        rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        name = self._place(weights, [weight.shape[0] for weight in weights])
        if row is None:
            return Matrix(name, self._constant(name, "float16", (rows, columns), lambda: self._values(weights)), None)
        groups = row.groups(columns)
        element = "int4" if row.bits == 4 else "int8"
        return Matrix(
            name,
            self._constant(f"{name}_codes", element, (rows, columns), lambda: self._codes(weights)),
            self._constant(f"{name}_scales", "float16", (rows, groups), lambda: self._scales(weights)),
        )

    def vector(self, weight: WeightInfo) -> Constant:
        """A norm's weight or bias."""

        def blocks() -> Iterator[Bytes]:
            yield _float16(weight.name, self.lowering.weights.values(weight.name))
            self._done(weight)

        return self._constant(self._place((weight,), [0]), "float16", weight.shape, blocks)

    def bias(self, weights: tuple[WeightInfo, ...], biases: tuple[WeightInfo | None, ...]) -> Constant:
        """The biases of linears below each other, zeros for one that is missing."""
        sizes = [weight.shape[0] for weight in weights]

        def blocks() -> Iterator[Bytes]:
            for size, bias in zip(sizes, biases, strict=True):
                if bias is None:
                    yield np.zeros(2 * size, np.uint8)
                else:
                    yield _float16(bias.name, self.lowering.weights.values(bias.name))
                    self._done(bias)

        name = self._place(biases, sizes) if any(biases) else f"zeros_{sum(sizes)}"
        return self._constant(name, "float16", (sum(sizes),), blocks)

    def rotary(self, rotary: Rotary, length: int) -> tuple[Constant, Constant]:
        """fp16 ``[length, rotated]``: cosine twice side by side, and sine, negative in the first half."""
        if rotary not in self._rotaries:
            self._rotaries.append(rotary)
        index = self._rotaries.index(rotary)
        cosine, sine = (table.astype(np.float16) for table in rotary_tables(rotary, length))
        return (
            self.table(f"rotary_{index}_cosine", np.concatenate((cosine, cosine), 1)),
            self.table(f"rotary_{index}_sine", np.concatenate((-sine, sine), 1)),
        )

    def table(self, name: str, values: npt.NDArray[Any]) -> Constant:
        """A small fp16 or int32 table that the graph implies."""
        content = np.ascontiguousarray(values)
        return self._constant(name, content.dtype.name, content.shape, lambda: iter([_bytes(content)]))

    def _constant(
        self, name: str, element: str, shape: tuple[int, ...], blocks: Callable[[], Iterator[Bytes]]
    ) -> Constant:
        return self.constants.setdefault(name, Constant(name, element, shape, blocks))

    def _place(self, weights: tuple[WeightInfo | None, ...], rows: list[int]) -> str:
        """The name of the entry that holds ``weights``, the i-th ``rows[i]`` rows long."""
        names = tuple(weight.name for weight in weights if weight is not None)
        entry = re.sub(r"[^A-Za-z0-9_]", "_", merged_name(names))  # what MIL accepts
        if self._holders.setdefault(entry, names) != names:
            raise UnsupportedError(f"coreml: {names[0]} and {self._holders[entry][0]} would both be named {entry}")
        first = 0
        for weight, count in zip(weights, rows, strict=True):
            if weight is not None:
                self.entries[weight.name] = Entry(entry, first)
            first += count
        return entry

    def _values(self, weights: tuple[WeightInfo, ...]) -> Iterator[Bytes]:
        for weight in weights:
            for start, values in self.lowering.weights.blocks(weight.name):
                yield _float16(weight.name, values, start)
            self._done(weight)

    def _codes(self, weights: tuple[WeightInfo, ...]) -> Iterator[Bytes]:
        for weight in weights:
            tensor = self.lowering.weights.quantized(weight.name)
            for start, stop in tensor.row_ranges():
                yield _bytes(tensor.packed(start, stop))
            self._done(weight)

    def _scales(self, weights: tuple[WeightInfo, ...]) -> Iterator[Bytes]:
        for weight in weights:
            tensor = self.lowering.weights.quantized(weight.name)
            for start, stop in tensor.row_ranges():
                scales = tensor.scales(start, stop)
                if float(scales.max()) * 2 ** (tensor.row.bits - 1) > LARGEST_FLOAT16:
                    _float16(weight.name, tensor.dequantized(start, stop), start)
                yield _bytes(scales.astype(np.float16))

    def _done(self, weight: WeightInfo) -> None:
        self.lowering.progress(weight.name, math.prod(weight.shape))


def _bytes(content: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(content).reshape(-1).view(np.uint8)


def _float16(name: str, values: npt.NDArray[np.float32], first_row: int = 0) -> Bytes:
    """Raises :class:`UnsupportedError` naming ``name`` and the index of a value beyond fp16, NaN included."""
    if not (values.min() >= -LARGEST_FLOAT16 and values.max() <= LARGEST_FLOAT16):
        position = np.unravel_index(np.argmin(np.abs(values) <= LARGEST_FLOAT16), values.shape)
        index = [int(position[0]) + first_row, *(int(axis) for axis in position[1:])]
        raise UnsupportedError(
            f"coreml: {name}{index} is {values[position]:g}, which the fp16 that Core ML stores can't hold "
            f"(at most {LARGEST_FLOAT16:g}); valid: the targets onnx and executorch"
        )
    return _bytes(values.astype(np.float16))
