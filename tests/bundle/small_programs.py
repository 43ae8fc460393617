"""Programs of one kernel, to run it in whichever binding with whatever arguments."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketlm_export.backends.executorch.emission import Emission
from pocketlm_export.backends.executorch.importing import ScalarType
from pocketlm_export.backends.executorch.program import MethodBuilder
from pocketlm_export.backends.executorch.writer import write_pte

__all__ = ["attention_program", "cache_program", "product_program"]

DTYPES = {np.dtype(np.float32): ScalarType.FLOAT, np.dtype(np.int64): ScalarType.LONG}


def attention_program(
    path: Path, arrays: Sequence[np.ndarray], *, start: int, causal: bool, scale: float | None
) -> Path:
    """``forward(query, key, value[, mask])``: one call of ``llama::custom_sdpa``."""
    method = MethodBuilder()
    query, key, value, *mask = (_input(method, array) for array in arrays)
    arguments = [query, key, value, method.scalar(start), *(mask or [method.scalar(None)])]
    arguments += [method.scalar(0.0), method.scalar(causal), method.scalar(scale)]
    output = method.kernel("llama::custom_sdpa.out", arguments, method.activation(arrays[0].shape))
    return _write(path, method, output)


def cache_program(
    path: Path,
    value: np.ndarray,
    length: int,
    *,
    start: int,
    indices: np.ndarray | None = None,
    returned: int | None = None,
) -> Path:
    """``forward(value[, indices])``: one call of ``llama::update_cache``, or of the one with indices; returns the first
    ``returned`` positions of the cache of ``length``, by default all."""
    method = MethodBuilder()
    rows = _input(method, value)
    cache = method.cache((value.shape[0], length, *value.shape[2:]))
    arguments = [rows, cache, method.scalar(start)]
    name = "llama::update_cache"
    if indices is not None:
        arguments.append(_input(method, indices))
        name += "_with_indices"
    method.kernel(f"{name}.out", arguments, method.activation((1,)))
    shown = length if returned is None else returned
    output = method.activation((value.shape[0], shown, *value.shape[2:]))
    arguments = [cache, *map(method.scalar, (1, 0, shown, 1))]
    return _write(path, method, method.kernel("aten::slice_copy.Tensor_out", arguments, output))


def product_program(path: Path, left: np.ndarray, right: np.ndarray) -> Path:
    """``forward(left, right)``: their matrix product in a portable kernel."""
    method = MethodBuilder()
    arguments = [_input(method, left), _input(method, right)]
    output = method.activation((left.shape[0], right.shape[1]))
    return _write(path, method, method.kernel("aten::mm.out", arguments, output))


def _input(method: MethodBuilder, array: np.ndarray) -> int:
    return method.input(DTYPES[array.dtype], array.shape)


def _write(path: Path, method: MethodBuilder, output: int) -> Path:
    write_pte(path, Emission(method, output, [], {}), [])
    return path
