"""MIL operators that sum, compare or normalize along axes: reductions, products, attention, normalization.

Conventions as in ``elementwise``; inside an operator the arithmetic is float32 (float64 in that precision), whatever
the declared types.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .tensors import WeightReader

Array = NDArray[Any]


class _Reduction(Protocol):
    def __call__(self, x: Array, /, *, axis: tuple[int, ...] | None, keepdims: bool) -> Any: ...


def _reduce(function: _Reduction, x: Array, axes: Array | None, keep_dims: Array | bool) -> Array:
    chosen = None if axes is None else tuple(int(axis) for axis in axes)
    return np.asarray(function(x, axis=chosen, keepdims=bool(keep_dims)))


def reduce_sum(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
    return _reduce(np.sum, x, axes, keep_dims)


def reduce_mean(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
    return _reduce(np.mean, x, axes, keep_dims)


def reduce_max(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
    return _reduce(np.max, x, axes, keep_dims)


def reduce_min(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
    return _reduce(np.min, x, axes, keep_dims)


def reduce_prod(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
    return _reduce(np.prod, x, axes, keep_dims)


def reduce_sum_square(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
    return _reduce(np.sum, x * x, axes, keep_dims)


def reduce_l2_norm(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
    return np.asarray(np.sqrt(reduce_sum_square(x, axes, keep_dims)))


def reduce_argmax(
    x: Array, axis: Array | int = -1, keep_dims: Array | bool = False, output_dtype: str = "int32"
) -> Array:
    """The first of equal ones; ``output_dtype`` repeats the declared type."""
    _check_index_type(output_dtype)
    return np.asarray(np.argmax(x, axis=int(axis), keepdims=bool(keep_dims)))


def reduce_argmin(
    x: Array, axis: Array | int = -1, keep_dims: Array | bool = False, output_dtype: str = "int32"
) -> Array:
    _check_index_type(output_dtype)
    return np.asarray(np.argmin(x, axis=int(axis), keepdims=bool(keep_dims)))


def cumsum(x: Array, axis: Array | int = 0, exclusive: Array | bool = False, reverse: Array | bool = False) -> Array:
    along = int(axis)
    ordered = np.flip(x, along) if reverse else x
    total = np.cumsum(ordered, axis=along, dtype=x.dtype)
    if exclusive:
        total = total - ordered
    return np.flip(total, along) if reverse else total


def topk(
    x: Array,
    k: Array | int = 1,
    axis: Array | int = -1,
    ascending: Array | bool = False,
    sort: Array | bool = True,
    return_indices: Array | bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Array, ...]:
    """Sorted whether asked or not; of equal values the first comes first."""
    del sort
    _check_index_type(output_indices_dtype)
    count, along = int(k), int(axis)
    if not 0 < count <= x.shape[along]:
        raise ValueError(f"k {count} of {x.shape[along]}")
    order = np.argsort(x if ascending else -x, axis=along, kind="stable")
    chosen = np.take(order, np.arange(count), axis=along)
    values = np.take_along_axis(x, chosen, axis=along)
    return (values, chosen) if return_indices else (values,)


def softmax(x: Array, axis: Array | int = -1) -> Array:
    exponentials = x - np.max(x, axis=int(axis), keepdims=True)
    np.exp(exponentials, out=exponentials)
    exponentials /= np.sum(exponentials, axis=int(axis), keepdims=True)
    return np.asarray(exponentials)


def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    chosen = tuple(range(x.ndim)) if axes is None else tuple(int(axis) % x.ndim for axis in axes)
    centred = x - np.mean(x, axis=chosen, keepdims=True)
    variance = np.mean(centred * centred, axis=chosen, keepdims=True)
    normed = centred / np.sqrt(variance + epsilon)
    shape = [size if axis in chosen else 1 for axis, size in enumerate(x.shape)]
    if gamma is not None:
        normed = normed * gamma.reshape(shape)
    if beta is not None:
        normed = normed + beta.reshape(shape)
    return np.asarray(normed, x.dtype)


def matmul(x: Array, y: Array, transpose_x: Array | bool = False, transpose_y: Array | bool = False) -> Array:
    left = np.swapaxes(x, -1, -2) if transpose_x else x
    right = np.swapaxes(y, -1, -2) if transpose_y else y
    return np.asarray(left @ right)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x @ weight.T + bias``: x [..., K], weight [N, K], bias [N]."""
    return add_bias(x @ weight.T, bias)


def add_bias(y: Array, bias: Array | None = None) -> Array:
    return y if bias is None else np.asarray(y + bias)


def multiply(inputs: Sequence[Array], weight: WeightReader, *, stacked: bool = False) -> list[Array]:
    """``x @ weight.T`` for each x ``[..., K]``, as new arrays; each block of rows is decoded once for all.

    ``stacked``: the rows of all inputs in one product, which is faster and sums in another order than each alone.
    """
    results = [np.empty((*x.shape[:-1], weight.shape[0]), x.dtype) for x in inputs]
    ends = np.cumsum([math.prod(x.shape[:-1]) for x in inputs])[:-1]
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs]) if stacked else None
    for start, stop, block in weight.blocks():
        if rows is None:
            products = [x @ block.T for x in inputs]
        else:
            products = np.split(rows @ block.T, ends)
        for result, product in zip(results, products, strict=True):
            result[..., start:stop] = product.reshape(*result.shape[:-1], stop - start)
    return results


def einsum(values: tuple[Array, ...], equation: str) -> Array:
    return np.asarray(np.einsum(equation, *values, optimize=True))


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """``softmax(query @ key.T / sqrt(E) + mask) @ value``; a boolean mask says what takes part.

    Scores and weights stay unrounded in every precision: only the result is a tensor of the program.
    """
    scores = query @ np.swapaxes(key, -1, -2)
    scores *= scores.dtype.type(1 / math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        if attn_mask.dtype == np.bool_:
            scores = np.where(attn_mask, scores, scores.dtype.type(-np.inf))
        else:
            scores = scores + attn_mask
    return np.asarray(softmax(scores) @ value)


def _check_index_type(name: str) -> None:
    if name not in {"int32", "int16", "uint16", "int8", "uint8"}:
        raise ValueError(f"indices of type {name!r}")
