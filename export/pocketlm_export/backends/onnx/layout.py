"""Where each byte of ``model.onnx.data`` goes, and which weights it is made of; no weight is read here.

Every tensor begins at a page boundary. Tensors of the same content are one region of the file, whatever reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul

from pocketlm_export.backends.base import merged_name
from pocketlm_export.graph.rotary import Rotary
from pocketlm_export.quantization.schemes import SchemeRow

__all__ = [
    "DATA_FILE",
    "PAGE",
    "Codes",
    "Content",
    "Layout",
    "Matrix",
    "Region",
    "Scales",
    "Table",
    "Vector",
]

DATA_FILE = "model.onnx.data"
PAGE = 4096
MOST_TOLD = 8  # parts of a name that stand for matrices side by side
INT8_BLOCK = 32  # of columns: MatMulNBits knows no scale per channel, and rounds activations block by block


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of matrices ``[N_i, columns]`` below one another, as MatMulNBits wants them: uint8 ``[N, blocks, bytes]``.

    Unsigned, zero at ``2^(bits-1)``; int4 two a byte, the even column low; the last block is filled up with zeros. Of
    every ``alternating`` matrices, all of one shape, the rows take turns.
    """

    weights: tuple[str, ...]
    rows: int
    columns: int
    bits: int
    block: int
    alternating: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of columns in a row."""
        return -(-self.columns // self.block)

    @property
    def shape(self) -> tuple[int, ...]:
        """uint8 elements."""
        return self.rows, self.blocks, self.block * self.bits // 8


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of ``codes``: float32 ``[N, blocks]``, a scale of a whole row repeated for each of its blocks."""

    codes: Codes

    @property
    def shape(self) -> tuple[int, ...]:
        """float32 elements."""
        return self.codes.rows, self.codes.blocks


@dataclass(frozen=True, slots=True)
class Matrix:
    """Unquantized matrices ``[N_i, K]`` below one another, float32; ``alternating`` as that of :class:`Codes`."""

    weights: tuple[str, ...]
    shape: tuple[int, ...]
    alternating: int = 1


@dataclass(frozen=True, slots=True)
class Vector:
    """Vectors behind one another, float32; a name of None stands for zeros."""

    parts: tuple[tuple[str | None, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """float32 elements."""
        return (sum(size for _, size in self.parts),)


@dataclass(frozen=True, slots=True)
class Table:
    """A rotary table, float32 ``[length, pairs]``; ``part`` is ``cos`` or ``sin``."""

    rotary: Rotary
    length: int
    part: str

    @property
    def shape(self) -> tuple[int, ...]:
        """float32 elements."""
        return self.length, len(self.rotary.frequencies)


Content = Codes | Scales | Matrix | Vector | Table


@dataclass(frozen=True, slots=True)
class Region:
    """``size`` bytes at ``offset`` of the data file, and the name of the initializer that has its shape."""

    name: str
    content: Content
    offset: int
    size: int


class Layout:
    """Gives each content its place, in the order in which the graph asks for them."""

    def __init__(self, rows: Mapping[str, SchemeRow | None]) -> None:
        self._rows = rows
        self._regions: dict[Content, Region] = {}
        self._end = 0

    @property
    def regions(self) -> list[Region]:
        """In the order of their offsets."""
        return list(self._regions.values())

    def place(self, content: Content) -> Region:
        """The region of ``content``, the same one for the same content."""
        found = self._regions.get(content)
        if found is not None:
            return found
        size = reduce(mul, content.shape, 1) * (1 if isinstance(content, Codes) else 4)
        offset = -(-self._end // PAGE) * PAGE
        region = self._regions[content] = Region(self._name(content), content, offset, size)
        self._end = offset + size
        return region

    def row(self, weight: str) -> SchemeRow | None:
        """How a weight is quantized; None if it is not."""
        return self._rows[weight]

    def codes(self, weights: tuple[str, ...], rows: int, columns: int) -> Codes | None:
        """The codes of ``weights``; None if they are not quantized."""
        row = self._rows[weights[0]]
        if row is None:
            return None
        return Codes(weights, rows, columns, row.bits, row.group or INT8_BLOCK)

    def expert_codes(self, weights: tuple[str, ...], rows: int, columns: int, alternating: int) -> Codes:
        """The codes of quantized matrices ``[rows, columns]`` each: QMoE knows a scale of a whole row."""
        row = self._rows[weights[0]]
        assert row is not None
        return Codes(weights, rows * len(weights), columns, row.bits, row.group or columns, alternating)

    def _name(self, content: Content) -> str:
        match content:
            case Codes() | Matrix():
                return _matrix_name(content.weights)
            case Scales():
                return _matrix_name(content.codes.weights) + ".scales"
            case Vector():
                return merged_name(tuple(name for name, _ in content.parts if name is not None))
            case Table():
                tables = sum(isinstance(other, Table) for other in self._regions)
                return f"rotary.{tables // 2}.{content.part}"


def _matrix_name(weights: tuple[str, ...]) -> str:
    """That of :func:`merged_name`; of many experts only the first and the last are told."""
    parts = (part.split("+") for part in merged_name(weights).split("."))
    return ".".join("+".join(part) if len(part) <= MOST_TOLD else f"{part[0]}..{part[-1]}" for part in parts)
