"""Streams the weights into ``model.onnx.data``, a block of rows at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm_export.backends.onnx.layout import (
    Codes,
    Content,
    Layout,
    Matrix,
    Region,
    Scales,
    Table,
    Vector,
)
from pocketlm_export.graph.rotary import rotary_tables
from pocketlm_export.quantization.store import QuantizedTensor
from pocketlm_export.quantization.weights import Weights

__all__ = ["write_data"]

RELEASE_BYTES = 64 << 20  # mapped pages count as resident until they are released
Blocks = Iterator[npt.NDArray[Any]]


def write_data(layout: Layout, weights: Weights, path: Path, progress: Callable[[str, int], None]) -> None:
    """Every region of ``layout``; ``progress`` gets each weight's name and number of elements once it is written."""
    unreleased = 0
    with path.open("wb") as file:
        for region in layout.regions:
            file.seek(region.offset)
            for block in _blocks(region.content, weights):
                file.write(np.ascontiguousarray(block).data)
                unreleased += block.nbytes
                if unreleased > RELEASE_BYTES:
                    weights.release()
                    unreleased = 0
            assert file.tell() == region.offset + region.size
            _report(region, weights, progress)
    weights.release()


def _blocks(content: Content, weights: Weights) -> Blocks:
    match content:
        case Codes():
            return _codes(content, weights)
        case Scales():
            return _scales(content, weights)
        case Matrix():
            return _matrix(content, weights)
        case Vector():
            return iter([_vector(content, weights)])
        case Table():
            cosine, sine = rotary_tables(content.rotary, content.length)
            return iter([cosine if content.part == "cos" else sine])


def _codes(content: Codes, weights: Weights) -> Blocks:
    # Flipping the top bit of each code turns two's complement into an offset of 2^(bits-1).
    flip = np.uint8(0x88 if content.bits == 4 else 0x80)
    width = content.shape[1] * content.shape[2]
    for tensors in _turns(content.weights, content.alternating, weights):
        for start, stop in tensors[0].row_ranges():
            packed = _by_turns([tensor.packed(start, stop) for tensor in tensors]) ^ flip
            yield np.pad(packed, ((0, 0), (0, width - packed.shape[1])), constant_values=flip)


def _scales(content: Scales, weights: Weights) -> Blocks:
    blocks = content.codes.blocks
    for tensors in _turns(content.codes.weights, content.codes.alternating, weights):
        for start, stop in tensors[0].row_ranges():
            scales = _by_turns([tensor.scales(start, stop) for tensor in tensors])
            yield np.repeat(scales, blocks // scales.shape[1], axis=1)


def _matrix(content: Matrix, weights: Weights) -> Blocks:
    for names in _groups(content.weights, content.alternating):
        for parts in zip(*(weights.blocks(name) for name in names), strict=True):
            yield _by_turns([values for _, values in parts])


def _turns(names: tuple[str, ...], alternating: int, weights: Weights) -> Iterator[list[QuantizedTensor]]:
    return ([weights.quantized(name) for name in group] for group in _groups(names, alternating))


def _groups(names: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    return (names[start : start + size] for start in range(0, len(names), size))


def _by_turns(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The rows of ``parts``, all of one shape, in turns."""
    return parts[0] if len(parts) == 1 else np.stack(parts, 1).reshape(-1, parts[0].shape[1])


def _vector(content: Vector, weights: Weights) -> npt.NDArray[np.float32]:
    parts = [np.zeros(size, np.float32) if name is None else weights.values(name) for name, size in content.parts]
    return np.concatenate(parts)


def _report(region: Region, weights: Weights, progress: Callable[[str, int], None]) -> None:
    match region.content:
        case Codes() | Matrix() as content:
            names = content.weights
        case Vector() as content:
            names = tuple(name for name, _ in content.parts if name is not None)
        case _:
            names = ()
    for name in names:
        progress(name, int(np.prod(weights.shape(name))))
