"""MIL operators that move, repeat, index or make elements. Conventions as in ``elementwise``.

Nothing is written in place; results may be views of the inputs.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .package import MAXIMUM_ELEMENTS
from .tensors import WeightReader

Array = NDArray[Any]


def shape(x: Array | WeightReader) -> Array:
    return np.array(x.shape, np.int32)


def reshape(x: Array, shape: Array) -> Array:
    """0 keeps the size of that axis, -1 is whatever remains."""
    sizes = [int(size) for size in shape]
    if 0 in sizes and len(sizes) != x.ndim and x.size:
        raise ValueError(f"shape {sizes} keeps axes of a tensor of rank {x.ndim}")
    return x.reshape([x.shape[axis] if size == 0 and x.size else size for axis, size in enumerate(sizes)])


def transpose(x: Array, perm: Array) -> Array:
    return x.transpose([int(axis) for axis in perm])


def expand_dims(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes))


def concat(values: tuple[Array, ...], axis: Array, interleave: Array | bool = False) -> Array:
    if interleave:
        raise ValueError("interleave is not supported")
    return np.concatenate([np.atleast_1d(value) for value in values], axis=int(axis))


def stack(values: tuple[Array, ...], axis: Array) -> Array:
    return np.stack(values, axis=int(axis))


def split(
    x: Array, axis: Array, num_splits: Array | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    if split_sizes is None and num_splits is None:
        raise ValueError("neither num_splits nor split_sizes")
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits), axis=int(axis)))  # type: ignore[arg-type]
    if int(split_sizes.sum()) != x.shape[int(axis)] or (num_splits is not None and int(num_splits) != len(split_sizes)):
        raise ValueError(f"split_sizes {split_sizes.tolist()} of an axis of {x.shape[int(axis)]}")
    return tuple(np.split(x, np.cumsum(split_sizes)[:-1].tolist(), axis=int(axis)))


def tile(x: Array, reps: Array) -> Array:
    counts = [int(count) for count in reps]
    if len(counts) != x.ndim or min(counts, default=1) < 1:
        raise ValueError(f"reps {counts} of a tensor of rank {x.ndim}")
    _check_size([size * count for size, count in zip(x.shape, counts, strict=True)])
    if all(size == 1 or count == 1 for size, count in zip(x.shape, counts, strict=True)):
        return np.broadcast_to(x, [size * count for size, count in zip(x.shape, counts, strict=True)])
    return np.tile(x, counts)


def reverse(x: Array, axes: Array | None = None) -> Array:
    return np.flip(x, None if axes is None else tuple(int(axis) for axis in axes))


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """As numpy slices; an ``end`` past the axis is cut to it, a ``begin`` past it is an error."""
    return x[_slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """``size`` -1 takes all that remains."""
    slices = []
    for axis, (start, count) in enumerate(zip(begin.tolist(), size.tolist(), strict=True)):
        start = start + x.shape[axis] if start < 0 else start
        stop = x.shape[axis] if count == -1 else start + count
        if not 0 <= start <= stop <= x.shape[axis]:
            raise ValueError(f"rows {start}..{stop} of axis {axis} with {x.shape[axis]}")
        slices.append(slice(start, stop))
    return x[tuple(slices)]


def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """A copy of ``x`` with ``update`` in the slice, which must have exactly its shape."""
    return write_slice(x.copy(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask)


def write_slice(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """:func:`slice_update` written into ``x`` itself."""
    slices = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    target = x[slices]
    if target.shape != update.shape:
        raise ValueError(f"update of shape {list(update.shape)} for a slice of shape {list(target.shape)}")
    x[slices] = update
    return x


def gather(
    x: Array | WeightReader,
    indices: Array,
    axis: Array | int = 0,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool | None = None,
) -> Array:
    """Only the rows that are asked for are decoded of a stored tensor.

    iOS 15 and 16 count negative indices from the end; since iOS 17, whose form has ``validate_indices``, they are out
    of bounds. An index out of bounds is an error here, validated or not.
    """
    rank = len(x.shape)
    along, batches = int(axis) % rank, int(batch_dims) % max(1, indices.ndim)
    index = _checked_indices(indices, x.shape[along], negative=validate_indices is None)
    if isinstance(x, WeightReader):
        if along == 0 and not batches:
            return x.rows(index.reshape(-1)).reshape(*index.shape, *x.shape[1:])
        x = x.whole()
    if not batches:
        return np.take(x, index, axis=along)
    if along < batches or x.shape[:batches] != index.shape[:batches]:
        raise ValueError(f"batch_dims {batches} and axis {along} of {list(x.shape)} by {list(indices.shape)}")
    rows = x.reshape(-1, *x.shape[batches:])
    per_row = index.reshape(-1, *index.shape[batches:])
    picked = [np.take(row, position, axis=along - batches) for row, position in zip(rows, per_row, strict=True)]
    return np.stack(picked).reshape(*x.shape[:along], *index.shape[batches:], *x.shape[along + 1 :])


def gather_along_axis(
    x: Array, indices: Array, axis: Array | int = 0, validate_indices: Array | bool | None = None
) -> Array:
    along = int(axis) % x.ndim
    index = _checked_indices(indices, x.shape[along], negative=validate_indices is None)
    return np.take_along_axis(x, index, axis=along)


def gather_nd(
    x: Array, indices: Array, batch_dims: Array | int = 0, validate_indices: Array | bool | None = None
) -> Array:
    if int(batch_dims):
        raise ValueError("batch_dims is not supported")
    depth = indices.shape[-1]
    parts = [
        _checked_indices(indices[..., axis], x.shape[axis], negative=validate_indices is None) for axis in range(depth)
    ]
    return x[tuple(parts)]


def scatter_nd(
    data: Array,
    indices: Array,
    updates: Array,
    mode: str = "add",
    validate_indices: Array | bool | None = None,
) -> Array:
    depth = indices.shape[-1]
    parts = tuple(
        _checked_indices(indices[..., axis], data.shape[axis], negative=validate_indices is None)
        for axis in range(depth)
    )
    if updates.shape != (*indices.shape[:-1], *data.shape[depth:]):
        raise ValueError(f"updates of shape {list(updates.shape)} for indices of shape {list(indices.shape)}")
    result = data.copy()
    if mode == "update":
        result[parts] = updates
    elif mode == "add":
        np.add.at(result, parts, updates)
    else:
        raise ValueError(f"mode {mode!r}; supported: add, update")
    return result


def range_1d(end: Array, start: Array, step: Array) -> Array:
    if step == 0:
        raise ValueError("step 0")
    _check_size([max(0, math.ceil((float(end) - float(start)) / float(step)))])
    return np.arange(start.item(), end.item(), step.item()).astype(end.dtype)


def fill(shape: Array, value: Array | float = 0.0) -> Array:
    sizes = [int(size) for size in shape]
    _check_size(sizes)
    return np.full(sizes, value)


def fill_like(ref_tensor: Array, value: Array | float = 0.0) -> Array:
    return np.full(ref_tensor.shape, value)


def band_part(x: Array, lower: Array | int = -1, upper: Array | int = -1) -> Array:
    """Elements outside the band are zero; a negative bound keeps that whole side."""
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    below, above = int(lower), int(upper)
    inside = ((below < 0) | (rows - columns <= below)) & ((above < 0) | (columns - rows <= above))
    return np.where(inside, x, x.dtype.type(0))


def _slices(
    sizes: tuple[int, ...],
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    slices: list[slice | int] = []
    for axis, size in enumerate(sizes):
        first, last = int(begin[axis]), int(end[axis])
        step = 1 if stride is None else int(stride[axis])
        from_start = begin_mask is not None and bool(begin_mask[axis])
        to_end = end_mask is not None and bool(end_mask[axis])
        if squeeze_mask is not None and squeeze_mask[axis]:
            if not -size <= first < size:
                raise ValueError(f"index {first} of axis {axis} with {size}")
            slices.append(0 if from_start else first)
            continue
        if not from_start and not -size <= first <= size:
            raise ValueError(f"begin {first} of axis {axis} with {size}")
        slices.append(slice(None if from_start else first, None if to_end else last, step))
    if not len(begin) == len(end) == len(sizes):
        raise ValueError(f"begin and end of {len(begin)} and {len(end)} axes for a tensor of rank {len(sizes)}")
    return tuple(slices)


def _checked_indices(indices: Array, size: int, *, negative: bool) -> NDArray[np.int64]:
    index = indices.astype(np.int64)
    if index.size and not (-size if negative else 0) <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"index {int(index.min())}..{int(index.max())} of an axis with {size}")
    return np.where(index < 0, index + size, index)


def _check_size(sizes: list[int]) -> None:
    if math.prod(sizes) > MAXIMUM_ELEMENTS or min(sizes, default=0) < 0:
        raise ValueError(f"a tensor of shape {sizes}")
