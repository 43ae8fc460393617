"""Safetensors files, memory-mapped and read a block of rows at a time.

Format: https://github.com/huggingface/safetensors#format. Files are hostile until their header has been checked: the
header's length, every dtype, shape and offset; the tensors must cover the data exactly once, without holes or overlaps.
"""

import hashlib
import math
import mmap
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import CheckpointError
from pocketlm.strict_json import parse_object
from pocketlm_export.fields import read_json
from pocketlm_export.selection import RowSelection

__all__ = [
    "FLOAT_TYPES",
    "TensorFile",
    "TensorInfo",
    "bfloat16_to_float32",
    "decode_float",
    "foreign_format",
    "open_shards",
    "row_blocks",
]

LONGEST_HEADER = 100_000_000  # the limit of the reference implementation
MOST_DIMENSIONS = 32
LARGEST_EXTENT = 1 << 56
CHUNK = 16 << 20  # bytes that are resident at once where only bytes are asked for
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
NUMPY_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8, "I8": np.int8}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: ``start`` and ``stop`` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def bfloat16_to_float32(raw: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 bit patterns, any shape, to the same values in float32."""
    wide = raw.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def decode_float(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """The stored values of a tensor of one of :data:`FLOAT_TYPES` in float32, exactly."""
    if dtype == "BF16":
        return bfloat16_to_float32(raw)
    return np.ascontiguousarray(raw, dtype=np.float32)


class TensorFile:
    """One safetensors file. Raises :class:`CheckpointError` naming the file and the tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            with path.open("rb") as file:
                size = path.stat().st_size
                if size < 8:
                    raise CheckpointError(f"{path}: truncated: {size} bytes are too few for a safetensors file")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
        length = int.from_bytes(self._map[:8], "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise CheckpointError(
                f"{path}: the header's length of {length} bytes is beyond the file: truncated or not safetensors"
            )
        self._data_start = 8 + length
        self.tensors: Mapping[str, TensorInfo] = self._parse(self._map[8 : self._data_start], size - self._data_start)

    def _parse(self, text: bytes, data_size: int) -> dict[str, TensorInfo]:
        try:
            header = parse_object(text)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: the header is not a valid JSON object: {str(error)[:100]}") from error
        metadata = header.pop("__metadata__", None)
        self.metadata: Mapping[str, Any] = metadata if isinstance(metadata, dict) else {}
        tensors = {name: self._entry(name, entry, data_size) for name, entry in header.items()}
        end = 0
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if info.start != end:
                problem = (
                    "overlaps another tensor"
                    if info.start < end
                    else f"leaves a hole of {info.start - end} bytes before it"
                )
                raise CheckpointError(f"{self.path}: {name} {problem}")
            end = info.stop
        if end != data_size:
            raise CheckpointError(
                f"{self.path}: the tensors end at {end} but the data has {data_size} bytes: truncated or altered"
            )
        return tensors

    def _entry(self, name: str, entry: object, data_size: int) -> TensorInfo:
        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0

        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]} if (
                all(map(whole, shape)) and whole(start) and whole(stop)
            ):
                pass
            case _:
                raise CheckpointError(f"{self.path}: {name}: malformed header entry")
        if dtype not in ITEM_SIZES:
            raise CheckpointError(f"{self.path}: {name}: unknown dtype {dtype!r}")
        # An empty tensor takes no bytes whatever its other sizes; numpy has bounds for them.
        if len(shape) > MOST_DIMENSIONS or math.prod(max(1, extent) for extent in shape) > LARGEST_EXTENT:
            raise CheckpointError(f"{self.path}: {name}: no tensor of {len(shape)} dimensions is that large")
        size = math.prod(shape) * ITEM_SIZES[dtype]
        if not start <= stop <= data_size:
            raise CheckpointError(f"{self.path}: {name}: its bytes {start}..{stop} lie outside the file")
        if stop - start != size:
            raise CheckpointError(f"{self.path}: {name}: {dtype} {shape} needs {size} bytes, not {stop - start}")
        return TensorInfo(dtype, tuple(shape), start, stop)

    def buffer(self, name: str) -> memoryview:
        """The tensor's bytes, mapped."""
        info = self.tensors[name]
        return memoryview(self._map)[self._data_start + info.start : self._data_start + info.stop]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in order; pages are released behind the reader."""
        content = self.buffer(name)
        for start in range(0, len(content), CHUNK):
            yield content[start : start + CHUNK]
            self.release(name)

    def digest(self, name: str) -> str:
        """sha256 of the tensor's dtype, shape and bytes."""
        info = self.tensors[name]
        digest = hashlib.sha256(f"{info.dtype} {list(info.shape)}\n".encode())
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def raw(self, name: str) -> npt.NDArray[Any]:
        """The tensor as stored, mapped and read-only; bfloat16 as its bit patterns in uint16."""
        info = self.tensors[name]
        return np.frombuffer(self.buffer(name), dtype=NUMPY_TYPES[info.dtype]).reshape(info.shape)

    def float_blocks(
        self, name: str, elements: int, selection: RowSelection | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """``(first row, float32 values)`` of a tensor's blocks of rows, about ``elements`` values each.

        With a ``selection``, which must fit, rows are counted among the selected ones. Pages are released behind the
        reader.
        Raises :class:`CheckpointError` for a tensor that isn't floating point or holds NaN or infinity.
        """
        info = self.tensors[name]
        if info.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{self.path}: {name}: dtype {info.dtype} is not one of {', '.join(sorted(FLOAT_TYPES))}"
            )
        start = 0
        for raw in row_blocks(self.raw(name), max(1, elements // max(1, math.prod(info.shape[1:]))), selection):
            values = decode_float(raw, info.dtype)
            if not np.isfinite(values).all():
                place = np.argwhere(~np.isfinite(values))[0]
                place[0] += start
                weight = name if selection is None else selection.of(name)
                raise CheckpointError(f"{self.path}: {weight}{place.tolist()} is not finite")
            yield start, values
            start += len(values)
            self.release(name)

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor in float32, checked as in :meth:`float_blocks`."""
        blocks = [values for _, values in self.float_blocks(name, 1 << 22)]
        return np.concatenate(blocks) if blocks else np.empty(self.tensors[name].shape, np.float32)

    def release(self, name: str | None = None) -> None:
        """Let the kernel drop the mapped pages of a tensor, or of all: resident memory counts them."""
        if name is None:
            self._map.madvise(mmap.MADV_DONTNEED)
            return
        info = self.tensors[name]
        if info.start == info.stop:
            return
        start = (self._data_start + info.start) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, self._data_start + info.stop - start)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


def row_blocks(raw: npt.NDArray[Any], step: int, selection: RowSelection | None) -> Iterator[npt.NDArray[Any]]:
    """Blocks of about ``step`` rows; views, but for short pieces of a selection, which are gathered."""
    if selection is None:
        selection = RowSelection(0, max(1, len(raw)), max(1, len(raw)))
    periods = raw.reshape(-1, selection.period, *raw.shape[1:])[:, selection.start : selection.stop]
    width = selection.stop - selection.start
    together = max(1, step // width)
    for first in range(0, len(periods), together):
        rows = periods[first : first + together].reshape(-1, *raw.shape[1:])
        for start in range(0, len(rows), step):
            yield rows[start : start + step]


def open_shards(folder: Path) -> dict[str, TensorFile]:
    """Tensor name to the open file that holds it, by the index if there is one, else from ``model.safetensors``.

    A shard outside the folder, a missing one, one that lacks a tensor of the index, or an index of pickle files raises
    :class:`CheckpointError`.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        paths = _read_index(index)
        files = {path: TensorFile(path) for path in sorted(set(paths.values()))}
        for name, path in paths.items():
            if name not in files[path].tensors:
                raise CheckpointError(f"{path}: tensor {name} is missing, but the index promises it")
        return {name: files[path] for name, path in paths.items()}
    single = folder / "model.safetensors"
    if single.exists():
        file = TensorFile(single)
        return dict.fromkeys(file, file)
    raise CheckpointError(_explain_missing(folder))


def foreign_format(folder: Path) -> str | None:
    """What ``folder`` holds in place of a checkpoint, and what to do; None if it is nothing that is known."""
    names = sorted(path.name for path in folder.iterdir())
    quantized = next((name for name in names if name.endswith(".gguf")), None)
    if quantized is not None:
        return f"{folder / quantized}: GGUF, which is already quantized: take the original safetensors checkpoint"
    return None


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must be an object of tensor name to file name")
    paths = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name}: {shard!r} is not the name of a safetensors file in this folder")
        paths[name] = index.parent / shard
    _refuse_missing(index, paths.values())
    return paths


def _refuse_missing(index: Path, shards: Iterable[Path]) -> None:
    for shard in sorted(set(shards)):
        if not shard.exists():
            raise CheckpointError(f"{index}: the shard {shard.name} is missing")


def _explain_missing(folder: Path) -> str:
    foreign = foreign_format(folder)
    if foreign is not None:
        return foreign
    names = sorted(path.name for path in folder.iterdir())
    if "consolidated.safetensors" in names:
        return (
            f"{folder}: holds Mistral's consolidated.safetensors only: take the Hugging Face files (model.safetensors)"
        )
    pickled = next((name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))), None)
    if pickled is not None:
        return f"{folder / pickled}: a pickle, which is never loaded: save it again with safe_serialization=True"
    return f"{folder}: no model.safetensors and no model.safetensors.index.json"
