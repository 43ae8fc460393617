"""What XNNPACK's nodes mean, in float64: one table from kind to function. FullyConnected and Convert stand apart: the
first works on all calls at once (:mod:`execution`), the second only rounds activations, which float64 never does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import BundleError, UnsupportedError
from pocketlm_export.backends.executorch.reading.payload import Payload, PayloadNode

__all__ = ["check_nodes", "compute"]

Array = npt.NDArray[np.float64]


def check_nodes(payload: Payload, where: str) -> None:
    """Refuse a kind of node that this reader does not know."""
    for node in payload.nodes:
        if node.kind not in NODES and node.kind not in ("FullyConnected", "Convert"):
            raise UnsupportedError(f"{where}: node {node.kind}; PocketLM writes {', '.join(sorted(NODES))}")


def compute(node: PayloadNode, inputs: Sequence[Array], where: str) -> Array:
    """The output of a node of :data:`NODES`. Raises :class:`BundleError` after ``where`` if shapes don't fit."""
    try:
        return NODES[node.kind](node.attributes, *inputs)
    except (ValueError, MemoryError) as error:  # shapes that don't broadcast, reshape or concatenate, or do to excess
        shapes = ", ".join(str(list(array.shape)) for array in inputs)
        raise BundleError(f"{where}: {node.kind} of {shapes}: {error}") from error


def _reshape(attributes: Mapping[str, Any], x: Array) -> Array:
    """A zero stands for the dimension that the number of elements leaves open."""
    return x.reshape([size or -1 for size in attributes["new_shape"]])


def _slice(attributes: Mapping[str, Any], x: Array) -> Array:
    """A size of zero: everything from the offset on."""
    offsets, sizes = attributes["offsets"], attributes["sizes"]
    if not len(offsets) == len(sizes) == x.ndim:
        raise ValueError(f"offsets {offsets} and sizes {sizes}")
    stops = [start + size if size else whole for start, size, whole in zip(offsets, sizes, x.shape, strict=True)]
    if any(stop > whole for stop, whole in zip(stops, x.shape, strict=True)):
        raise ValueError(f"a slice {sizes} at {offsets}")
    return x[tuple(map(slice, offsets, stops))]


def _gelu(_: Mapping[str, Any], x: Array) -> Array:
    import torch  # numpy has no erf

    erf: Array = torch.special.erf(torch.from_numpy(np.ascontiguousarray(x * 2**-0.5))).numpy()
    return x * 0.5 * (1 + erf)


def _sigmoid(_: Mapping[str, Any], x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) is infinite where the sigmoid is zero
        return 1 / (1 + np.exp(-x))


def _softmax(_: Mapping[str, Any], x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    result: Array = weights / weights.sum(-1, keepdims=True)
    return result


def _concatenate(attributes: Mapping[str, Any], *parts: Array) -> Array:
    return np.concatenate(parts, attributes["axis"])


NODES: Mapping[str, Callable[..., Array]] = {
    "Add": lambda _, left, right: left + right,
    "Subtract": lambda _, left, right: left - right,
    "Multiply": lambda _, left, right: left * right,
    "Div": lambda _, left, right: left / right,
    "Minimum": lambda _, left, right: np.minimum(left, right),
    "Maximum": lambda _, left, right: np.maximum(left, right),
    "BatchMatrixMultiply": lambda _, left, right: left @ right,
    "Square": lambda _, x: x * x,
    "ReciprocalSquareRoot": lambda _, x: 1 / np.sqrt(x),
    "Sigmoid": _sigmoid,
    "Tanh": lambda _, x: np.tanh(x),
    "Gelu": _gelu,
    "Softmax": _softmax,
    "StaticReshape": _reshape,
    "StaticTranspose": lambda attributes, x: x.transpose(attributes["perm"]),
    "StaticSlice": _slice,
    "Concatenate2": _concatenate,
    "Concatenate3": _concatenate,
}
