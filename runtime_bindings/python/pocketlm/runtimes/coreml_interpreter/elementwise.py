"""Elementwise MIL operators on numpy, named as MIL names them and with MIL's parameters and defaults.

Arrays come in and go out as the interpreter holds them; rounding to a declared type is the caller's work. A parameter
without a default is required. Scalars come as 0-d arrays, strings as ``str``.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_CAST_TYPES = frozenset({"fp16", "fp32", "int32", "int16", "int8", "uint16", "uint8", "bool"})


def cast(x: Array, dtype: str) -> Array:
    """The declared output type decides; to integers truncates toward zero, as ``astype`` does."""
    if dtype not in _CAST_TYPES:
        raise ValueError(f"dtype {dtype!r}; known: {', '.join(sorted(_CAST_TYPES))}")
    return x != 0 if dtype == "bool" else x


def identity(x: Array) -> Array:
    return x


def real_div(x: Array, y: Array) -> Array:
    """Integers must divide exactly: MIL states no rounding for them."""
    if x.dtype.kind == "f":
        return np.asarray(x / y)
    _refuse_zero_divisor(y)
    if np.any(x % y):
        raise ValueError("real_div of integers with a remainder")
    return np.asarray(x // y)


def floor_div(x: Array, y: Array) -> Array:
    _refuse_zero_divisor(y)
    return np.asarray(x // y)


def mod(x: Array, y: Array) -> Array:
    """The sign follows the divisor, as in Python."""
    _refuse_zero_divisor(y)
    return np.asarray(x % y)


def power(x: Array, y: Array) -> Array:
    return np.asarray(x**y)


def inverse(x: Array, epsilon: Array | float = 1e-4) -> Array:
    return np.asarray(1 / (x + epsilon), x.dtype)


def log(x: Array, epsilon: Array | float = 1e-45) -> Array:
    return np.asarray(np.log(x + epsilon), x.dtype)


def rsqrt(x: Array, epsilon: Array | float = 1e-12) -> Array:
    return np.asarray(1 / np.sqrt(x + epsilon), x.dtype)


def clip(x: Array, alpha: Array, beta: Array) -> Array:
    clipped: Array = np.clip(x, alpha, beta)
    return clipped


def relu(x: Array) -> Array:
    return np.asarray(np.maximum(x, x.dtype.type(0)))


def leaky_relu(x: Array, alpha: Array) -> Array:
    return np.asarray(np.where(x >= 0, x, alpha * x))


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(x, x.dtype.type(0)))


def erf(x: Array) -> Array:
    values: Array = np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size)
    return np.asarray(values.reshape(x.shape), x.dtype)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "EXACT":
        return np.asarray(0.5 * x * (1 + erf(x / x.dtype.type(math.sqrt(2)))))
    if mode == "TANH_APPROXIMATION":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return np.asarray(0.5 * x * (1 + np.tanh(inner)))
    if mode == "SIGMOID_APPROXIMATION":
        return np.asarray(x / (1 + np.exp(-1.702 * x)))
    raise ValueError(f"mode {mode!r}; known: EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION")


def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


def _refuse_zero_divisor(divisor: Array) -> None:
    if divisor.dtype.kind != "f" and not np.all(divisor):
        raise ValueError("integer division by zero")
