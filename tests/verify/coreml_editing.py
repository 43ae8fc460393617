"""Editing of a written Core ML package: its message, and the constants in weight.bin."""

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.runtimes.coreml_interpreter.protobuf import parse_model
from tests.verify.coreml_operators import Block

__all__ = ["FUNCTIONS", "appended", "blocks", "change", "edited", "mapped", "model_file"]

FUNCTIONS = ("decode", "prefill", "score")
DTYPES = {10: np.dtype("<f2"), 21: np.dtype(np.int8), 23: np.dtype("<i4"), 25: np.dtype(np.uint8)}  # MILSpec.DataType
INT4 = 25
BLOB_RECORD = struct.Struct("<IIQQQ32x")


def model_file(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


@contextmanager
def edited(package: Path) -> Iterator[dict[str, Block]]:
    """The functions of ``package`` by name; their message is written again when the block ends."""
    path = model_file(package)
    model = parse_model(path.read_bytes())
    found = {name: Block(f.block_specializations[f.opset]) for name, f in model.mlProgram.functions.items()}
    yield found
    for block in found.values():
        block.save()
    path.write_bytes(model.SerializeToString(deterministic=True))


def blocks(package: Path) -> dict[str, Block]:
    """The functions of ``package``, to look at."""
    functions = parse_model(model_file(package).read_bytes()).mlProgram.functions
    return {name: Block(function.block_specializations[function.opset]) for name, function in functions.items()}


def mapped(package: Path, value: Any, offset: int | None = None) -> np.memmap:
    """The bytes of a constant in weight.bin, as they can be changed; two codes of int4 in a byte."""
    file = weight_file(package)
    record = BLOB_RECORD.unpack_from(np.memmap(file, np.uint8, "r"), offset or value.blobFileValue.offset)
    tensor = value.type.tensorType
    shape = [dimension.constant.size for dimension in tensor.dimensions]
    if tensor.dataType == INT4:
        shape[-1] //= 2
    return np.memmap(file, DTYPES[tensor.dataType], "r+", record[3], tuple(shape))


def weight_file(package: Path) -> Path:
    return model_file(package).parent / "weights" / "weight.bin"


def appended(package: Path, value: Any) -> int:
    """A copy of a constant at the end of weight.bin: the offset of its record."""
    with weight_file(package).open("r+b") as file:
        content = np.array(mapped(package, value))
        file.seek(value.blobFileValue.offset)
        sentinel, kind, size, _, unused = BLOB_RECORD.unpack(file.read(BLOB_RECORD.size))
        file.seek(0, 2)
        file.write(b"\0" * (-file.tell() % 64))
        offset = file.tell()
        file.write(BLOB_RECORD.pack(sentinel, kind, size, offset + BLOB_RECORD.size, unused) + content.tobytes())
    return offset


def change(package: Path, entry: str, functions: Iterable[str], alter: Callable[[dict[str, np.ndarray]], None]) -> None:
    """``alter`` the arrays of a constant in place: ``data`` and ``scale`` of a quantized one, else ``val``.

    Where only some functions get it, they read an altered copy of their own under another name.
    """
    chosen = tuple(functions)
    with edited(package) as found:
        if set(chosen) == set(FUNCTIONS):
            alter({part: mapped(package, value) for part, value in found[chosen[0]].parts(entry).items()})
            return
        offsets = {part: appended(package, value) for part, value in found[chosen[0]].parts(entry).items()}
        for name in chosen:
            for part, value in found[name].parts(entry).items():
                value.blobFileValue.offset = offsets[part]
            found[name].rename(entry, f"{entry}_altered")
        alter({part: mapped(package, value) for part, value in found[chosen[0]].parts(f"{entry}_altered").items()})
