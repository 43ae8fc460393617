"""Where each byte of a .pte lies: header and program, then segments.

Segment 0 holds the program's constants. Named constants that lie inside it (a tied head reads the embedding's bytes)
are segments of their own over the same bytes; then follow the delegates' graphs and the other named constants.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pocketlm_export.backends.executorch.importing import schema
from pocketlm_export.backends.executorch.packing import Piece

__all__ = ["PAGE", "Layout", "NamedConstant", "align", "place"]

PAGE = 4096
SMALL = 1 << 16
CONSTANT_ALIGNMENT = 64
DELEGATE_ALIGNMENT = 128


@dataclass(frozen=True, slots=True, eq=False)
class NamedConstant:
    """What a delegate finds by a key. XNNPACK's weight cache knows a packed filter by its key alone, so the key must
    stand for all that is packed: datatype, shape, codes and scales (``parts``, the constant's own piece first).

    Until the bytes are written the key is a placeholder of the same length.
    """

    description: str
    parts: tuple[Piece, ...]
    placeholder: str

    @property
    def piece(self) -> Piece:
        """The constant's own bytes."""
        return self.parts[0]

    def key(self, digests: Mapping[Piece, bytes]) -> str:
        """The sha256 that names the content, given the sha256 of each piece."""
        content = b"".join(digests[part] for part in self.parts)
        return hashlib.sha256(self.description.encode() + b"\0" + content).hexdigest()


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets from the first segment, known before the bytes are; ``pieces`` in the order of the file."""

    segments: list[schema.DataSegment]
    constant_offsets: list[int]
    delegate_segments: list[int]
    named_data: list[schema.NamedData]
    pieces: dict[Piece, int]
    size: int


def align(offset: int, alignment: int) -> int:
    """The next multiple of ``alignment``."""
    return -(-offset // alignment) * alignment


def place(constants: Sequence[Piece], delegate_sizes: Sequence[int], named: Sequence[NamedConstant]) -> Layout:
    """Give every piece its place. ``constant_offsets[0]`` is the schema's reserved entry."""
    pieces: dict[Piece, int] = {}
    cursor = 0
    for piece in constants:
        cursor = align(cursor, _alignment(piece))
        pieces[piece] = cursor
        cursor += piece.size
    segments = [schema.DataSegment(offset=0, size=cursor)]
    constant_offsets = [0, *(pieces[piece] for piece in constants)]

    index_of: dict[Piece, int] = {}
    inside = {constant.piece for constant in named if constant.piece in pieces}
    for piece in sorted(inside, key=lambda piece: pieces[piece]):
        index_of[piece] = len(segments)
        segments.append(schema.DataSegment(offset=pieces[piece], size=piece.size))

    delegate_segments = []
    for size in delegate_sizes:
        cursor = align(cursor, DELEGATE_ALIGNMENT)
        delegate_segments.append(len(segments))
        segments.append(schema.DataSegment(offset=cursor, size=size))
        cursor += size

    for constant in named:
        piece = constant.piece
        if piece not in index_of:
            cursor = align(cursor, _alignment(piece))
            pieces[piece] = cursor
            index_of[piece] = len(segments)
            segments.append(schema.DataSegment(offset=cursor, size=piece.size))
            cursor += piece.size
    named_data = [
        schema.NamedData(key=constant.placeholder, segment_index=index_of[constant.piece]) for constant in named
    ]
    return Layout(segments, constant_offsets, delegate_segments, named_data, pieces, cursor)


def _alignment(piece: Piece) -> int:
    return PAGE if piece.size > SMALL else CONSTANT_ALIGNMENT
