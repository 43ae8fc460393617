"""The operators that an artifact may hold, each a function in numpy: :data:`OPERATORS`, one table.

A function's positional parameters are the operator's inputs (None: left out), its keyword parameters the operator's
attributes in lower case with ONNX's defaults: an input or an attribute that it doesn't have is one that is not known,
and is refused. Results are float64 or integers. Meanings: https://onnx.ai/onnx/operators/ (opset 23), and for
``com.microsoft`` https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from pocketlm.errors import UnsupportedError
from pocketlm_export.backends.onnx.experts import experts, quantized_experts, softmax
from pocketlm_export.backends.onnx.grouped_attention import group_query_attention, rotary_embedding
from pocketlm_export.backends.onnx.matrices import dequantized, product, row_ranges
from pocketlm_export.backends.onnx.sparse_attention import sparse_attention

__all__ = ["OPERATORS", "WITH_MATRIX"]

Array = npt.NDArray[Any]
Results = Array | Sequence[Array | None]


def matmul_n_bits(
    x: Array,
    codes: Array,
    scales: Array,
    zero_points: None = None,
    group_index: None = None,
    bias: Array | None = None,
    *,
    k: int,
    n: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
) -> Array:
    """Activations are never rounded here, whatever the accuracy level."""
    if zero_points is not None or group_index is not None:
        raise UnsupportedError("zero points and group indices are not supported")
    if accuracy_level not in (0, 4):
        raise UnsupportedError(f"accuracy_level {accuracy_level} is not supported; supported: 0, 4")
    blocks = -(-k // block_size)
    if bits not in (4, 8) or codes.shape != (n, blocks, block_size * bits // 8) or x.shape[-1] != k:
        raise ValueError(f"{bits} bits in {codes.shape} are not [{n}, {k}] in blocks of {block_size}")
    y = product(x, codes.reshape(n, -1), scales.reshape(n, blocks), bits)
    return y if bias is None else y + bias


def fused_matmul(x: Array, matrix: Array, *, transb: int = 0) -> Array:
    """A matrix ``[N, K]``, converted by blocks of rows."""
    if transb != 1 or matrix.ndim != 2:
        raise UnsupportedError("only products with a transposed matrix are supported")
    y = np.empty((*x.shape[:-1], len(matrix)), np.float64)
    for start, stop in row_ranges(*matrix.shape):
        y[..., start:stop] = x @ matrix[start:stop].astype(np.float64).T
    return y


def gather_block_quantized(
    codes: Array,
    indices: Array,
    scales: Array,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Array:
    """Rows of a quantized matrix."""
    if (gather_axis, quantize_axis) != (0, 1) or bits not in (4, 8):
        raise UnsupportedError("only rows of matrices of 4 and 8 bits that are quantized along them are supported")
    if codes.shape[1] * 8 // bits != scales.shape[1] * block_size:
        raise ValueError(f"scales {scales.shape} for rows of {codes.shape[1] * 8 // bits} in blocks of {block_size}")
    return dequantized(codes[indices], scales[indices], bits)


def rms_normalization(x: Array, weight: Array, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Array:
    """``stash_type`` names a precision that float64 exceeds."""
    if axis not in (-1, x.ndim - 1) or stash_type != 1:
        raise UnsupportedError(f"axis {axis} with stash_type {stash_type} is not supported; supported: -1 with 1")
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * weight


def skip_simplified_layer_normalization(
    x: Array, skip: Array, weight: Array, bias: Array | None = None, *, epsilon: float = 1e-12
) -> Results:
    """The norm of a sum, two outputs that no CPU kernel makes, and the sum."""
    total = x + skip if bias is None else x + skip + bias
    return rms_normalization(total, weight, epsilon=epsilon), None, None, total


def layer_normalization(
    x: Array, weight: Array, bias: Array | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Array:
    """The RMS norm of what is left of ``x`` without its mean, plus ``bias``."""
    y = rms_normalization(x - x.mean(-1, keepdims=True), weight, axis=axis, epsilon=epsilon, stash_type=stash_type)
    return y if bias is None else y + bias


def skip_layer_normalization(
    x: Array, skip: Array, weight: Array, beta: Array | None = None, bias: Array | None = None, *,
    epsilon: float = 1e-12,
) -> Results:  # fmt: skip
    """As :func:`skip_simplified_layer_normalization`; ``bias`` belongs to the sum, ``beta`` to the norm."""
    total = x + skip if bias is None else x + skip + bias
    return layer_normalization(total, weight, beta, epsilon=epsilon), None, None, total


def add(x: Array, y: Array) -> Array:
    """Two constants, which are float32, turn to float64."""
    return np.add(x, y, dtype=np.float64) if x.dtype == y.dtype == np.float32 else x + y


def clip(x: Array, least: Array | None = None, most: Array | None = None) -> Array:
    """Within the bounds that are given."""
    return np.clip(x, least, most) if least is not None or most is not None else x


def sigmoid(x: Array) -> Array:
    """Without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1 + small)


def gelu(x: Array, *, approximate: bytes = b"none") -> Array:
    """Exact by the error function, or its approximation by tanh."""
    match approximate:
        case b"none":
            erf = np.vectorize(math.erf, [np.float64])(x / math.sqrt(2))
        case b"tanh":
            erf = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        case kind:
            raise UnsupportedError(f"approximate {kind!r} is not supported")
    return x * (1 + erf) / 2


def gather(x: Array, indices: Array, *, axis: int = 0) -> Array:
    """Slices of ``x``; unquantized embeddings turn to float64."""
    y = np.take(x, indices, axis)
    return y.astype(np.float64) if y.dtype == np.float32 else y


def cast(x: Array, *, to: int) -> Array:
    """Between integers."""
    if to not in (onnx.TensorProto.INT32, onnx.TensorProto.INT64) or x.dtype.kind != "i":
        raise UnsupportedError(f"a cast of {x.dtype} to type {to} is not supported; supported: int32, int64")
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(to))


def reduce_sum(x: Array, axes: Array, *, keepdims: int = 1) -> Array:
    """Over ``axes``."""
    return np.asarray(x.sum(tuple(axes.tolist()), keepdims=bool(keepdims)))


def reshape(x: Array, shape: Array) -> Array:
    """A 0 in ``shape`` keeps the size."""
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())])


def shape_of(x: Array, *, start: int = 0, end: int | None = None) -> Array:
    """int64."""
    return np.array(x.shape[start:end], np.int64)


def slice_of(x: Array, starts: Array, ends: Array, axes: Array) -> Array:
    """Steps are 1."""
    parts = [slice(None)] * x.ndim
    for axis, start, end in zip(axes.tolist(), starts.tolist(), ends.tolist(), strict=True):
        parts[axis] = slice(start, end)
    return x[tuple(parts)]


def split(x: Array, sizes: Array, *, axis: int = 0) -> Results:
    """Pieces of the given sizes."""
    if sizes.sum() != x.shape[axis]:
        raise ValueError(f"pieces of {sizes.tolist()} from {x.shape[axis]}")
    return np.split(x, np.cumsum(sizes)[:-1].tolist(), axis)


def pad(x: Array, pads: Array, constant_value: Array | None, axes: Array) -> Array:
    """With zeros, or the given value."""
    widths = [(0, 0)] * x.ndim
    for index, axis in enumerate(axes.tolist()):
        widths[axis] = (int(pads[index]), int(pads[index + len(axes)]))
    return np.pad(x, widths, constant_values=0 if constant_value is None else constant_value.item())


OPERATORS: Mapping[str, Callable[..., Results]] = {
    "Add": add,
    "Cast": cast,
    "Clip": clip,
    "Gather": gather,
    "Gelu": gelu,
    "LayerNormalization": layer_normalization,
    "Mul": lambda x, y: x * y,
    "Pad": pad,
    "RMSNormalization": rms_normalization,
    "ReduceSum": reduce_sum,
    "Reshape": reshape,
    "Shape": shape_of,
    "Sigmoid": sigmoid,
    "Slice": slice_of,
    "Softmax": softmax,
    "Split": split,
    "Sub": lambda x, y: x - y,
    "Tanh": lambda x: np.tanh(x),
    "com.microsoft.FusedMatMul": fused_matmul,
    "com.microsoft.GatherBlockQuantized": gather_block_quantized,
    "com.microsoft.GroupQueryAttention": group_query_attention,
    "com.microsoft.MatMulNBits": matmul_n_bits,
    "com.microsoft.MoE": experts,
    "com.microsoft.QMoE": quantized_experts,
    "com.microsoft.RotaryEmbedding": rotary_embedding,
    "com.microsoft.SparseAttention": sparse_attention,
    "com.microsoft.SkipLayerNormalization": skip_layer_normalization,
    "com.microsoft.SkipSimplifiedLayerNormalization": skip_simplified_layer_normalization,
}
# The inputs that may hold all calls' positions behind one another, in the last axis but one, so that a matrix is
# unpacked once.
WITH_MATRIX: Mapping[str, tuple[int, ...]] = {
    "com.microsoft.FusedMatMul": (0,),
    "com.microsoft.MatMulNBits": (0,),
    "com.microsoft.MoE": (0, 1),
    "com.microsoft.QMoE": (0, 1, 14),
}
