"""Writes a .pte: the program's flatbuffer, then the segments, streamed piece by piece."""

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pocketlm_export.backends.executorch.emission import Emission
from pocketlm_export.backends.executorch.importing import CONSTANT_ALIGNMENT, program_to_flatbuffer, schema
from pocketlm_export.backends.executorch.layout import PAGE, Layout, align, place
from pocketlm_export.backends.executorch.packing import Piece
from pocketlm_export.backends.executorch.xnnpack import number_key

__all__ = ["write_pte"]

DIGEST = re.compile(rb"[0-9a-f]{64}")
HEADER = struct.Struct("<4sIQQQ")  # magic, its own length, bytes of header and program, first segment, all segments


def write_pte(path: Path, emission: Emission, facts: Sequence[schema.ExecutionPlan]) -> dict[str, str]:
    """Write the method ``forward`` and the constant methods ``facts``; return the key of each placeholder.

    Keys are hashes of content that is made only while it is written, so graphs and program are written last: a key is
    as long as its placeholder and nothing moves.
    """
    graphs, alike = list(emission.method.delegates), dict[str, bytes]()
    payloads = [graph.to_bytes(alike) for graph in graphs]
    layout = place(emission.method.constants, [len(payload) for payload in payloads], emission.named)
    program = _program(emission, layout, facts)
    base = align(len(program), PAGE)
    with path.open("wb") as file:
        file.truncate(base + layout.size)
        digests: dict[Piece, bytes] = {}
        for piece, offset in layout.pieces.items():
            file.seek(base + offset)
            digest = hashlib.sha256()
            for block in piece.blocks():
                content = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                digest.update(content)
                file.write(content)
            if file.tell() != base + offset + piece.size:
                raise AssertionError(f"{file.tell() - base - offset} bytes where {piece.size} were planned")
            digests[piece] = digest.digest()
        keys = {constant.placeholder: constant.key(digests) for constant in emission.named}
        for graph, payload, segment in zip(graphs, payloads, layout.delegate_segments, strict=True):
            own = {number_key(number): keys[item.placeholder] for number, item in enumerate(graph.constants)}
            file.seek(base + layout.segments[segment].offset)
            file.write(_replaced(payload, own))
        file.seek(0)
        file.write(_replaced(program, keys))
    return keys


def _program(emission: Emission, layout: Layout, facts: Sequence[schema.ExecutionPlan]) -> bytes:
    program = schema.Program(
        version=0,
        execution_plan=[emission.method.finish("forward", emission.output, layout.delegate_segments), *facts],
        constant_buffer=[],
        backend_delegate_data=[],
        segments=layout.segments,
        constant_segment=schema.SubsegmentOffsets(segment_index=0, offsets=layout.constant_offsets),
        named_data=layout.named_data,
    )
    flatbuffer = program_to_flatbuffer(program, constant_tensor_alignment=CONSTANT_ALIGNMENT)
    return _with_header(flatbuffer.data, flatbuffer.max_alignment, layout.size)


def _with_header(flatbuffer: bytes, alignment: int, segment_bytes: int) -> bytes:
    """Insert the extended header behind the flatbuffer's magic (runtime/executor, schema/extended_header.h)."""
    width = align(HEADER.size, alignment)
    size = width + len(flatbuffer)
    header = HEADER.pack(b"eh00", HEADER.size, size, align(size, PAGE), segment_bytes)
    root = int.from_bytes(flatbuffer[:4], "little") + width
    return root.to_bytes(4, "little") + flatbuffer[4:8] + header.ljust(width, b"\0") + flatbuffer[8:]


def _replaced(content: bytes, keys: Mapping[str, str]) -> bytes:
    """What stands for keys are the only strings of 64 hexadecimal digits; a string lies between zeros."""
    return DIGEST.sub(lambda found: keys[found[0].decode()].encode(), content)
