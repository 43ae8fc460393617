"""QMoE and MoE of ``com.microsoft`` in numpy, as ONNX Runtime's CPU kernels mean them: gated SiLU, whose two matrices
are one with rows that take turns.

Sources: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, and where it is silent
``onnxruntime/contrib_ops/cpu/moe`` (``moe_cpu.cc``, ``moe_quantization_cpu.cc``). Parameters are named as the
operators' inputs and attributes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketlm.errors import UnsupportedError
from pocketlm_export.backends.onnx.file import MICROSOFT
from pocketlm_export.backends.onnx.matrices import product, row_ranges

__all__ = ["MIXTURES", "experts", "quantized_experts", "softmax"]

MIXTURES = (f"{MICROSOFT}MoE", f"{MICROSOFT}QMoE")
Array = npt.NDArray[Any]
Product = Callable[[Array, int], Array]  # of rows with the matrix of an expert


def experts(
    x: Array,
    router_probs: Array,
    fc1: Array,
    fc1_bias: None,
    fc2: Array,
    *,
    k: int,
    normalize_routing_weights: int = 0,
    activation_type: bytes = b"relu",
    swiglu_fusion: int = 0,
    activation_alpha: float,
    activation_beta: float,
) -> Array:
    """Float32 matrices ``fc1`` ``[E, 2I, D]`` and ``fc2`` ``[E, D, I]``."""
    _check_form(fc1_bias, activation_type, swiglu_fusion, activation_alpha, activation_beta)
    shares = _chosen(softmax(router_probs), router_probs, k, bool(normalize_routing_weights))
    return _mixed(x, shares, lambda rows, e: _dense(rows, fc1[e]), lambda rows, e: _dense(rows, fc2[e]))


def quantized_experts(
    x: Array,
    router_probs: Array,
    fc1: Array,
    fc1_scales: Array,
    fc1_bias: None,
    fc2: Array,
    fc2_scales: Array,
    fc2_bias: None = None,
    fc3: None = None,
    fc3_scales: None = None,
    fc3_bias: None = None,
    fc1_zero_points: None = None,
    fc2_zero_points: None = None,
    fc3_zero_points: None = None,
    router_weights: Array | None = None,
    *,
    k: int,
    normalize_routing_weights: int = 0,
    activation_type: bytes = b"relu",
    swiglu_fusion: int = 0,
    activation_alpha: float,
    activation_beta: float,
    expert_weight_bits: int = 4,
    block_size: int = 0,
) -> Array:
    """Codes ``[E, 2I, bytes]`` and ``[E, D, bytes]``; scales of blocks, or without ``block_size`` of whole rows.

    ``router_probs`` choose. ``router_weights`` are the shares then; without them the chosen are divided by their sum
    whatever ``normalize_routing_weights`` says.
    """
    left_out = (fc2_bias, fc3, fc3_scales, fc3_bias, fc1_zero_points, fc2_zero_points, fc3_zero_points)
    if any(value is not None for value in left_out):
        raise UnsupportedError("fc3, biases and zero points are not supported")
    _check_form(fc1_bias, activation_type, swiglu_fusion, activation_alpha, activation_beta)
    if router_weights is None:
        shares = _chosen(softmax(router_probs), router_probs, k, True)
    else:
        shares = _chosen(router_weights, router_probs, k, bool(normalize_routing_weights))

    def by(codes: Array, scales: Array) -> Product:
        count, rows, size = codes.shape
        columns = size * 8 // expert_weight_bits
        scales = scales.reshape(count, rows, columns // (block_size or columns))
        return lambda values, e: product(values, codes[e], scales[e], expert_weight_bits)

    return _mixed(x, shares, by(fc1, fc1_scales), by(fc2, fc2_scales))


def _check_form(bias: None, activation: bytes, fusion: int, alpha: float, beta: float) -> None:
    if bias is not None or (activation, fusion, alpha, beta) != (b"swiglu", 1, 1.0, 0.0):
        raise UnsupportedError(
            f"activation {activation!r} with fusion {fusion}, alpha {alpha} and beta {beta}, or a bias, is not "
            "supported; supported: swiglu with 1, 1.0 and 0.0"
        )


def softmax(x: Array, *, axis: int = -1) -> Array:
    """Over the last axis."""
    if axis not in (-1, x.ndim - 1):
        raise UnsupportedError(f"a softmax over axis {axis} is not supported; supported: the last")
    y = np.exp(x - x.max(-1, keepdims=True))
    result: Array = y / y.sum(-1, keepdims=True)
    return result


def _chosen(shares: Array, scores: Array, k: int, renormalize: bool) -> Array:
    """``shares`` ``[S, E]`` where they are among the k largest ``scores`` of their row, else zero."""
    best = np.argsort(-scores, -1, kind="stable")[:, :k]
    kept = np.zeros_like(shares)
    np.put_along_axis(kept, best, np.take_along_axis(shares, best, -1), -1)
    return kept / kept.sum(-1, keepdims=True) if renormalize else kept


def _mixed(x: Array, shares: Array, fc1: Product, fc2: Product) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    y = np.zeros_like(rows)
    for expert in np.flatnonzero(shares.any(0)).tolist():
        here = np.flatnonzero(shares[:, expert])
        inner = fc1(rows[here], expert)
        gate, up = inner[:, 0::2], inner[:, 1::2]
        y[here] += shares[here, expert, None] * fc2(gate * np.exp(-np.logaddexp(0, -gate)) * up, expert)
    return y.reshape(x.shape)


def _dense(x: Array, matrix: Array) -> Array:
    """A float32 matrix ``[N, K]``, converted by blocks of rows."""
    y = np.empty((len(x), len(matrix)), np.float64)
    for start, stop in row_ranges(*matrix.shape):
        y[:, start:stop] = x @ matrix[start:stop].astype(np.float64).T
    return y
