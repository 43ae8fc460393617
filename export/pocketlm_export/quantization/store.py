"""The weight store: every quantized tensor once on disk, found by what it was made from.

An entry is a safetensors file with ``codes`` (int8, or uint8 with two nibbles a byte, the even column low) and
``scales`` (bfloat16). Its name is the sha256 of the source's bytes, dtype and shape, of the scheme row and of the
calibration, so that a changed input is another entry. Entries are written beside their place, read back and renamed
into it: a reader sees a whole entry or none, and one that isn't what its name and its own digest say is made again.

Whoever has an entry open keeps its content: a file that is mapped outlives its name, so pruning takes nothing from an
export that runs, and its disk space returns when that export ends. Two exports that miss the same entry both make it,
from the same bytes the same bytes; the later name wins.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pocketlm.cache import cache_folder
from pocketlm.errors import CheckpointError, InputError
from pocketlm_export.checkpoint.checkpoint import Tensors
from pocketlm_export.checkpoint.tensors import TensorFile, bfloat16_to_float32
from pocketlm_export.ownership import abandoned, hold
from pocketlm_export.quantization.rounding import dequantize_rows, pack_nibbles, quantize_rows, unpack_nibbles
from pocketlm_export.quantization.schemes import SchemeRow

__all__ = ["LIMIT", "ContentDigest", "QuantizedTensor", "WeightStore", "default_store"]

FORMAT = "1"  # of the entries; a change of the rounding is a change of the format
LIMIT = 32 << 30  # bytes that an export leaves in the store
READ_ELEMENTS = 1 << 20
BLOCK_ELEMENTS = 1 << 17  # float32 temporaries of one block stay in the cache of a core


class ContentDigest:
    """What a quantized matrix is known by: the sha256 of two hashes, of its codes as packed here and of its scales as
    bfloat16, both given in order, in any number of blocks."""

    def __init__(self) -> None:
        self._codes, self._scales = hashlib.sha256(), hashlib.sha256()

    def update(self, packed: bytes | memoryview, scales: bytes | memoryview) -> None:
        """The next rows."""
        self._codes.update(packed)
        self._scales.update(scales)

    def hexdigest(self) -> str:
        """Of all rows so far."""
        return hashlib.sha256(self._codes.digest() + self._scales.digest()).hexdigest()


def default_store() -> Path:
    """The user's cache folder."""
    return cache_folder()


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix ``[N, K]`` as the store holds it; reads are of mapped blocks of rows."""

    row: SchemeRow
    shape: tuple[int, int]
    file: TensorFile

    @property
    def sha256(self) -> str:
        """The :class:`ContentDigest` of the whole matrix; it was compared with the bytes when the entry was opened."""
        return str(self.file.metadata["sha256"])

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """``(start, stop)`` of blocks of rows that are read together, in order: about a million codes each.

        Pages are released behind the reader; a block that is looked at again is mapped again.
        """
        step = max(1, READ_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])
            self.file.release()

    def packed(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Bytes of the codes of rows ``start..stop``: int4 ``[n, K/2]`` as packed, int8 ``[n, K]`` as bit patterns."""
        codes: npt.NDArray[Any] = self.file.raw("codes")[start:stop]
        return codes.view(np.uint8)

    def codes(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int8]:
        """int8 ``[n, K]``."""
        packed = self.packed(start, stop)
        return unpack_nibbles(packed) if self.row.bits == 4 else packed.view(np.int8)

    def scales(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """float32 ``[n, groups]``, one group a row for a row without groups."""
        values = bfloat16_to_float32(self.file.raw("scales")[start:stop])
        self.file.release("scales")
        return values

    def dequantized(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """float32 ``[n, K]``: code times scale, exact in float32."""
        return dequantize_rows(self.codes(start, stop), self.scales(start, stop))


class WeightStore:
    """A folder of entries; safe for several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root / "weights"
        with self._writing():
            self.root.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.root}: the weight store can't be written: {error.strerror or error}; --store chooses another"
            ) from error

    def quantized(self, tensors: Tensors, name: str, row: SchemeRow) -> tuple[QuantizedTensor, bool]:
        """The entry of tensor ``name``, and whether it had to be made.

        Raises :class:`CheckpointError` naming tensor and index where a value is NaN or infinite, :class:`InputError`
        where the store can't be written.
        """
        rows, columns = tensors.shape(name)
        path = self._path(tensors, name, row)
        found = self._open(path, path.stem, row, (rows, columns))
        if found is not None:
            with contextlib.suppress(OSError):  # a store that is only read, or that another process prunes
                os.utime(path)
            return found, False
        with self._writing():
            path.parent.mkdir(exist_ok=True)
            temporary, descriptor = _make_temporary(path)
            try:
                self._write(temporary, path.stem, tensors, name, row)
                made = self._open(temporary, path.stem, row, (rows, columns))
                if made is None:
                    raise CheckpointError(f"{path}: the entry just written can't be read back: is the disk failing?")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
                os.close(descriptor)
        return made, True

    def has(self, tensors: Tensors, name: str, row: SchemeRow) -> bool:
        """Whether there is an entry of tensor ``name``; it isn't opened."""
        return self._path(tensors, name, row).exists()

    def entries(self) -> Iterator[Path]:
        """Every whole entry."""
        return self.root.glob("*/[0-9a-f]*.safetensors")

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(status.st_size for _, status in _present(self.entries()))

    def prune(self, limit: int = 0) -> int:
        """Delete the entries least recently used until at most ``limit`` bytes stay; returns the bytes freed.

        What killed processes left unfinished goes too. A process that has an entry open keeps reading it. Raises
        :class:`InputError` where an entry can't be deleted.
        """
        for path in abandoned(self.root.glob("*/.*")):
            with contextlib.suppress(OSError):  # a store that is only read
                path.unlink(missing_ok=True)
        kept = freed = 0
        for path, status in sorted(_present(self.entries()), key=lambda entry: entry[1].st_mtime, reverse=True):
            kept += status.st_size
            if kept > limit:
                with self._writing():
                    path.unlink(missing_ok=True)
                freed += status.st_size
        return freed

    def _path(self, tensors: Tensors, name: str, row: SchemeRow) -> Path:
        recipe = {"format": FORMAT, "row": asdict(row), "source": tensors.digest(name), "calibration": None}
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        return self.root / key[:2] / f"{key}.safetensors"

    @staticmethod
    def _open(path: Path, key: str, row: SchemeRow, shape: tuple[int, int]) -> QuantizedTensor | None:
        """The entry ``key`` at ``path``; None if there is none or it is damaged, in which case it is made again."""
        if not path.exists():
            return None
        try:
            file = TensorFile(path)
            codes, scales = file.tensors["codes"], file.tensors["scales"]
        except (CheckpointError, KeyError):
            return None
        rows, columns = shape
        expected = (rows, columns // 2 if row.bits == 4 else columns), (rows, row.groups(columns))
        if (codes.shape, scales.shape) != expected or (codes.dtype, scales.dtype) != (_code_type(row), "BF16"):
            return None
        if file.metadata.get("key") != key or file.metadata.get("sha256") != _payload_digest(file):
            return None
        return QuantizedTensor(row, shape, file)

    @staticmethod
    def _write(path: Path, key: str, tensors: Tensors, name: str, row: SchemeRow) -> None:
        with _EntryWriter(path, key, tensors.shape(name), row) as entry:
            for start, values in tensors.blocks(name, BLOCK_ELEMENTS):
                codes, scales = quantize_rows(values, row)
                entry.put(start, pack_nibbles(codes) if row.bits == 4 else codes.view(np.uint8), scales)


def _make_temporary(path: Path) -> tuple[Path, int]:
    """A file beside ``path`` that this process holds, and the descriptor that does."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        temporary.touch()
        descriptor = hold(temporary)
        if descriptor is not None:
            return temporary, descriptor


def _code_type(row: SchemeRow) -> str:
    return "U8" if row.bits == 4 else "I8"


def _present(paths: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    """Each with its status; without those that another process renames or removes meanwhile."""
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        yield path, status


class _EntryWriter:
    """Writes codes and scales block by block into a file whose sizes are known beforehand."""

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], row: SchemeRow) -> None:
        rows, columns = shape
        self._width = columns // 2 if row.bits == 4 else columns
        self._groups = row.groups(columns)
        size = rows * self._width
        self._tensors = {
            "codes": {
                "dtype": _code_type(row),
                "shape": [rows, self._width],
                "data_offsets": [0, size],
            },
            "scales": {
                "dtype": "BF16",
                "shape": [rows, self._groups],
                "data_offsets": [size, size + 2 * rows * self._groups],
            },
        }
        self._key = key
        self._scales_start = size
        self._digest_place = len(self._header("0" * 64))
        self._file = path.open("w+b")
        self._digest = ContentDigest()

    def _header(self, digest: str) -> bytes:
        text = json.dumps(
            {"__metadata__": {"key": self._key, "sha256": digest}, **self._tensors}, separators=(",", ":")
        ).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def put(self, start: int, packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> None:
        """Rows from ``start`` on; blocks must come in order."""
        half = (scales.view(np.uint32) >> 16).astype(np.uint16)
        self._digest.update(packed.data, half.data)
        base = self._digest_place
        self._file.seek(base + start * self._width)
        self._file.write(packed.data)
        self._file.seek(base + self._scales_start + start * self._groups * 2)
        self._file.write(half.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._file.seek(0)
            self._file.write(self._header(self._digest.hexdigest()))
        self._file.close()


def _payload_digest(file: TensorFile) -> str:
    digest = ContentDigest()
    for chunk in file.chunks("codes"):
        digest.update(chunk, b"")
    for chunk in file.chunks("scales"):
        digest.update(b"", chunk)
    return digest.hexdigest()
