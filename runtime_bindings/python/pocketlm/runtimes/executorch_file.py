"""What is checked of a .pte before and while ExecuTorch loads it, whichever binding does."""

import struct
from collections.abc import Sequence

from pocketlm.artifact import Artifact
from pocketlm.errors import BundleError

__all__ = ["RELEASE_LINE", "Bounds", "check_header", "check_signature"]

RELEASE_LINE = "1.5"
# executorch/runtime/executor/program.cpp and schema/extended_header.h: root offset, identifier, magic, header's length,
# program's size, start of the segments.
HEADER = struct.Struct("<I4s4sIQQ")
FILE_IDENTIFIER, HEADER_MAGIC = b"ET12", b"eh00"
INT64, FLOAT32 = 4, 6  # executorch/runtime/core/portable_type/scalar_type.h

Bounds = tuple[int, tuple[int, ...]]
"""A tensor's type as ExecuTorch's ScalarType, and the most that its shape may be."""


def check_header(artifact: Artifact) -> None:
    """Refuse what the runtime would read past its end, or not at all: it trusts the sizes of the extended header.

    Raises :class:`BundleError`.
    """
    path = artifact.path
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size or start[4:8] != FILE_IDENTIFIER or start[8:12] != HEADER_MAGIC:
        raise BundleError(
            f"{path}: not a program of ExecuTorch {RELEASE_LINE} with an extended header: damaged, or an older one's"
        )
    program, segments = HEADER.unpack(start)[-2:]
    if not HEADER.size <= program <= segments <= size:
        raise BundleError(f"{path}: the header says {program} bytes of program, but the file has {size}: truncated")


def check_signature(artifact: Artifact, inputs: Sequence[Bounds], outputs: Sequence[Bounds]) -> None:
    """Refuse a ``forward`` whose declared bounds are not the artifact's. Raises :class:`BundleError`."""
    expected_inputs = [(INT64, (1, artifact.longest_call)), (INT64, (1,))]
    expected_outputs = [(FLOAT32, (1, artifact.rows, artifact.vocabulary_size))]
    if (list(inputs), list(outputs)) != (expected_inputs, expected_outputs):
        raise BundleError(
            f"{artifact.path}: another model's program: from {list(inputs)} it makes {list(outputs)}; "
            f"the manifest says {expected_outputs} from {expected_inputs}"
        )
