"""Reads the files of an ``.mlpackage``: Manifest.json, the model message, the blobs of weight.bin.

Formats: Manifest.json and the folder layout as ``libmodelpackage`` writes them; the messages of ``Model.proto`` and
``MIL.proto``; the blob file of ``MILBlob`` (storage version 2): a 64-byte file header, then for each blob a 64-byte
record (sentinel 0xDEADBEEF, data type, size in bytes, absolute offset of the data, unused bits of the last byte).
"""

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import BundleError, UnsupportedError

from .protobuf import element_type_names, parse_model

__all__ = [
    "ELEMENT_TYPES",
    "MAXIMUM_ELEMENTS",
    "MAXIMUM_RANK",
    "ElementType",
    "Package",
    "element_type_name",
    "unpack_bits",
]

MAXIMUM_ELEMENTS = 1 << 30  # of one tensor: above it a file is taken for malformed
MAXIMUM_RANK = 32
_MAXIMUM_MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit
_MAXIMUM_MANIFEST_BYTES = 1 << 20

_BLOB_RECORD = struct.Struct("<IIQQQ")
_BLOB_RECORD_BYTES = 64
_BLOB_SENTINEL = 0xDEADBEEF
_BLOB_STORAGE_VERSION = 2
_MODEL_FOLDER_PREFIX = "@model_path/"


@dataclass(frozen=True)
class ElementType:
    """How one element is stored: ``bits`` each, unpacked into ``storage``; ``blob_code`` in a weight file."""

    bits: int
    storage: np.dtype[Any]
    blob_code: int | None = None

    @property
    def is_float(self) -> bool:
        return self.storage.kind == "f"


ELEMENT_TYPES: dict[str, ElementType] = {
    "BOOL": ElementType(8, np.dtype(np.bool_)),
    "FLOAT16": ElementType(16, np.dtype("<f2"), 1),
    "FLOAT32": ElementType(32, np.dtype("<f4"), 2),
    "FLOAT64": ElementType(64, np.dtype("<f8")),
    "INT4": ElementType(4, np.dtype(np.int8), 8),
    "INT8": ElementType(8, np.dtype(np.int8), 4),
    "INT16": ElementType(16, np.dtype("<i2"), 6),
    "INT32": ElementType(32, np.dtype("<i4"), 14),
    "INT64": ElementType(64, np.dtype("<i8")),
    "UINT1": ElementType(1, np.dtype(np.uint8), 9),
    "UINT2": ElementType(2, np.dtype(np.uint8), 10),
    "UINT3": ElementType(3, np.dtype(np.uint8), 12),
    "UINT4": ElementType(4, np.dtype(np.uint8), 11),
    "UINT6": ElementType(6, np.dtype(np.uint8), 13),
    "UINT8": ElementType(8, np.dtype(np.uint8), 3),
    "UINT16": ElementType(16, np.dtype("<u2"), 7),
    "UINT32": ElementType(32, np.dtype("<u4"), 15),
}


def element_type_name(number: int, where: str) -> str:
    """The name of a ``MILSpec.DataType`` that the interpreter holds; UnsupportedError for any other."""
    name = element_type_names().get(number, f"number {number}")
    if name not in ELEMENT_TYPES:
        raise UnsupportedError(f"{where}: data type {name} is not supported; supported: {', '.join(ELEMENT_TYPES)}")
    return name


def unpack_bits(data: NDArray[np.uint8], count: int, element: ElementType) -> NDArray[Any]:
    """``count`` elements out of packed little-endian bytes, the first element in the lowest bits."""
    bits = element.bits
    if bits >= 8:
        whole: NDArray[Any] = data.view(element.storage)
        return whole[:count]
    if 8 % bits:
        digits = np.unpackbits(data, bitorder="little", count=count * bits).reshape(count, bits)
        return np.asarray((digits << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8))
    per_byte = 8 // bits
    codes = np.empty((data.size, per_byte), element.storage)
    signed = data.view(element.storage)  # a right shift of a signed byte extends the sign
    for position in range(per_byte):
        codes[:, position] = (signed << (8 - bits * (position + 1))) >> (8 - bits)
    return codes.reshape(-1)[:count]


def _read(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise BundleError(f"{path}: {size} bytes, more than {limit}")
    return path.read_bytes()


class Package:
    """One opened ``.mlpackage``. ``model`` is the parsed message, ``model_file`` where it lies.

    Files are reached only through :meth:`_inside`, so nothing outside the folder is opened and no link followed.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise BundleError(f"{path}: not a Core ML package (a folder with Manifest.json)")
        self.path = path
        self._root = path.resolve()
        self.model_file = self._model_path()
        try:
            self.model = parse_model(_read(self.model_file, _MAXIMUM_MODEL_BYTES))
        except ValueError as error:
            raise BundleError(f"{self.model_file}: not a Core ML model message ({error})") from error
        if self.model.WhichOneof("Type") != "mlProgram":
            kind = self.model.WhichOneof("Type") or "nothing"
            raise UnsupportedError(f"{self.model_file}: holds {kind}; only mlProgram is supported")
        self._blob_files: dict[str, NDArray[np.uint8]] = {}
        self._maps: list[mmap.mmap] = []

    def release(self) -> None:
        """Let the kernel drop the mapped pages: resident memory counts them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def blob(self, file_name: str, offset: int, element: str, shape: tuple[int, ...], where: str) -> NDArray[np.uint8]:
        """The packed bytes of one blob, mapped and not read; ``where`` names the operator in errors.

        Raises BundleError where the record is out of bounds, has no sentinel, or disagrees with type or shape.
        """
        data = self._blob_file(file_name, where)
        place = f"{where}: {file_name!r} offset {offset}"
        if offset % _BLOB_RECORD_BYTES or offset + _BLOB_RECORD_BYTES > data.size:
            raise BundleError(f"{place}: no blob record there (file of {data.size} bytes, records at multiples of 64)")
        record = data[offset : offset + _BLOB_RECORD.size].tobytes()
        sentinel, code, size, start, unused_bits = _BLOB_RECORD.unpack(record)
        if sentinel != _BLOB_SENTINEL:
            raise BundleError(f"{place}: sentinel is {sentinel:#x}, not {_BLOB_SENTINEL:#x}")
        kind = ELEMENT_TYPES[element]
        if code != kind.blob_code:
            raise BundleError(f"{place}: blob data type {code}, where {element} is {kind.blob_code}")
        bits = math.prod(shape) * kind.bits
        if size != -(-bits // 8):
            raise BundleError(f"{place}: {size} bytes, where {element} {list(shape)} takes {-(-bits // 8)}")
        if kind.bits < 8 and unused_bits != size * 8 - bits:
            raise BundleError(
                f"{place}: {unused_bits} unused bits, where {element} {list(shape)} leaves {size * 8 - bits}"
            )
        if start % max(1, kind.storage.itemsize) or start < offset + _BLOB_RECORD_BYTES or start + size > data.size:
            raise BundleError(f"{place}: data at {start}, {size} bytes, in a file of {data.size} bytes")
        return data[start : start + size]

    def _model_path(self) -> Path:
        manifest = self._inside(PurePosixPath("Manifest.json"), f"{self.path}")
        try:
            content = json.loads(_read(manifest, _MAXIMUM_MANIFEST_BYTES))
            root = content["rootModelIdentifier"]
            item = content["itemInfoEntries"][root]["path"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BundleError(f"{manifest}: no path of the root model ({type(error).__name__}: {error})") from error
        if not isinstance(item, str):
            raise BundleError(f"{manifest}: itemInfoEntries.{root}.path is not text")
        return self._inside(PurePosixPath("Data") / item, f"{manifest}: itemInfoEntries.{root}.path")

    def _inside(self, relative: PurePosixPath, where: str) -> Path:
        if relative.is_absolute() or ".." in relative.parts or "\\" in str(relative) or "\0" in str(relative):
            raise BundleError(f"{where}: {str(relative)!r} leaves the package")
        path = self._root / relative
        if path.resolve() != path:
            raise BundleError(f"{where}: {str(relative)!r} is a link or leaves the package")
        if not path.is_file():
            raise BundleError(f"{where}: {str(relative)!r} is missing")
        return path

    def _blob_file(self, file_name: str, where: str) -> NDArray[np.uint8]:
        if file_name in self._blob_files:
            return self._blob_files[file_name]
        if not file_name.startswith(_MODEL_FOLDER_PREFIX):
            raise BundleError(f"{where}: weight file {file_name!r} does not begin with {_MODEL_FOLDER_PREFIX}")
        folder = PurePosixPath(self.model_file.parent.relative_to(self._root).as_posix())
        path = self._inside(folder / file_name.removeprefix(_MODEL_FOLDER_PREFIX), where)
        if path.stat().st_size < _BLOB_RECORD_BYTES:
            raise BundleError(f"{path}: {path.stat().st_size} bytes, shorter than a weight file's header")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(mapped)
        data: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8)
        version = int.from_bytes(data[4:8].tobytes(), "little")
        if version != _BLOB_STORAGE_VERSION:
            raise BundleError(f"{path}: storage version {version}, not {_BLOB_STORAGE_VERSION}")
        self._blob_files[file_name] = data
        return data
