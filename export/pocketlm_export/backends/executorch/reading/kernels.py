"""What the kernels of a method mean, in float64: one table from operator to function of its arguments' values.

``llama::update_cache`` and ``llama::custom_sdpa`` are functions of caches too, whose content the execution keeps.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.executorch.importing import schema
from pocketlm_export.backends.executorch.reading.matrices import embedding_table
from pocketlm_export.backends.executorch.reading.pte import PteFile
from pocketlm_export.backends.executorch.reading.steps import KernelStep

__all__ = ["ATTENTION", "DIVIDE", "KERNELS", "SELECT", "SLICE", "SUM", "TOP", "UPDATE_CACHE", "attend", "check_kernels"]

UPDATE_CACHE, ATTENTION = "llama::update_cache.out", "llama::custom_sdpa.out"
SLICE = "aten::slice_copy.Tensor_out"
SELECT, TOP, SUM, DIVIDE = ("aten::select_copy.int_out", "aten::topk.values", "aten::sum.IntList_out", "aten::div.out")

Array = npt.NDArray[Any]


def check_kernels(file: PteFile) -> None:
    """Refuse an operator, or an argument of one, that this reader does not know."""
    for step in file.steps:
        if not isinstance(step, KernelStep):
            continue
        if step.operator not in ARGUMENTS:
            raise UnsupportedError(f"{file.path}: operator {step.operator} is none that PocketLM writes")
        if len(step.arguments) != ARGUMENTS[step.operator] or len(step.results) != (2 if step.operator == TOP else 1):
            counts = f"{len(step.arguments)} arguments and {len(step.results)} results"
            raise BundleError(f"{file.path}: {step.operator} with {counts}")
        embedding_table(file, step)
        if step.operator == ATTENTION:
            _, _, _, _, mask, dropout, causal, _ = step.arguments
            masked = isinstance(file.forward.values[mask].val, schema.Tensor)
            if file.scalar(dropout) or masked == bool(file.scalar(causal)):
                raise UnsupportedError(
                    f"{file.path}: {step.operator} with dropout {file.scalar(dropout)}, "
                    f"{'a' if masked else 'no'} mask and is_causal {file.scalar(causal)}"
                )


def attend(
    query: Array, keys: Array, values: Array, start: int, mask: Array | None, scale: float | None
) -> npt.NDArray[np.float64]:
    """``[1, S, heads, head_dim]`` over whole caches ``[1, context, kv_heads, head_dim]``, in float64.

    Query head h reads key/value head ``h // (heads / kv_heads)``. With a mask ``[S, context]`` all rows of the caches
    count, without one those up to the query's own position.
    """
    _, length, heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    if mask is None:
        position = np.arange(start, start + length)
        seen = np.arange(start + length)[None] <= position[:, None]
        mask = np.where(seen, 0.0, -np.inf)
    columns = np.flatnonzero((mask != -np.inf).any(0))  # the weight of any other is exactly zero
    addend = mask[:, columns].astype(np.float64)
    grouped = query[0].reshape(length, kv_heads, heads // kv_heads, head_dim)
    result = np.empty_like(grouped)
    for head in range(kv_heads):
        scores = np.einsum("sgd,td->gst", grouped[:, head], keys[0, columns, head], optimize=True)
        scores *= head_dim**-0.5 if scale is None else scale
        scores += addend
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        result[:, head] = np.einsum("gst,td->sgd", scores, values[0, columns, head], optimize=True)
    return result.reshape(query.shape)


def _topk(
    x: Array,
    count: int,
    dimension: int,
    largest: bool,
    ordered: bool,  # noqa: ARG001  each order is one of them
) -> tuple[Array, Array]:
    """Values and indices; of equal ones the first."""
    chosen = np.argsort(-x if largest else x, dimension, kind="stable").take(range(count), dimension)
    return np.take_along_axis(x, chosen, dimension), chosen


def _sum(x: Array, dimensions: list[int], keep: bool, _dtype: None) -> Array:
    result: Array = x.sum(tuple(dimensions), keepdims=keep)
    return result


def _any(x: Array, dimension: int, keep: bool) -> Array:
    return np.asarray(x.astype(bool).any(dimension, keepdims=keep))


def _scatter(x: Array, dimension: int, indices: Array, source: Array) -> Array:
    result = x.copy()
    np.put_along_axis(result, indices, source, dimension)
    return result


def _index_put(x: Array, indices: list[Array | None], values: Array, accumulate: bool) -> Array:
    """Rows along the one dimension that has indices, as the kernel that changes its argument has it."""
    given = [dimension for dimension, index in enumerate(indices) if index is not None]
    if len(given) != 1 or accumulate:
        raise ValueError(f"indices of {len(given)} dimensions, accumulate {accumulate}")
    result = x.copy()
    result[(slice(None),) * given[0] + (indices[given[0]],)] = values
    return result


def _slice_copy(x: Array, dimension: int, start: int, stop: int, step: int) -> Array:
    return x[(slice(None),) * dimension + (slice(start, stop, step),)]


KERNELS: Mapping[str, Callable[..., Any]] = {
    SELECT: lambda x, dimension, index: np.take(x, index, dimension),
    "aten::_local_scalar_dense": int,
    "aten::sym_size.int": lambda x, dimension: x.shape[dimension],
    SLICE: _slice_copy,
    "aten::full_like.out": lambda x, value, _memory_format: np.full_like(x, value),
    TOP: _topk,
    SUM: _sum,
    DIVIDE: lambda left, right: left / right,
    "aten::scatter.src_out": _scatter,
    "aten::any.out": _any,
    "aten::nonzero.out": lambda x: np.argwhere(x),
    "aten::index_select.out": lambda x, dimension, index: np.take(x, index, dimension),
    "aten::index_put_": _index_put,
    "executorch_prim::add.Scalar": lambda left, right: left + right,
    "executorch_prim::sub.Scalar": lambda left, right: left - right,
    "executorch_prim::mod.Scalar": lambda left, right: left % right,
}

ARGUMENTS: Mapping[str, int] = {
    SELECT: 3,
    "aten::_local_scalar_dense": 1,
    "aten::sym_size.int": 2,
    SLICE: 5,
    "aten::full_like.out": 3,
    TOP: 5,
    SUM: 4,
    DIVIDE: 2,
    "aten::scatter.src_out": 4,
    "aten::any.out": 3,
    "aten::nonzero.out": 1,
    "aten::index_select.out": 3,
    "aten::index_put_": 4,
    "aten::embedding.out": 5,
    "quantized_decomposed::embedding_4bit.dtype_out": 7,
    "quantized_decomposed::embedding_byte.dtype_out": 7,
    "executorch_prim::add.Scalar": 2,
    "executorch_prim::sub.Scalar": 2,
    "executorch_prim::mod.Scalar": 2,
    UPDATE_CACHE: 3,
    ATTENTION: 8,
}
