"""Rotary position embedding as numbers: frequencies, and the tables that all backends store.

Half-split rotation: element ``i`` of the rotated part pairs with element ``i + len(frequencies)``. Rope types and their
formulas follow transformers' ``modeling_rope_utils``; frequencies are float32 as there, computed in float64 so that
they don't depend on the machine's vector units.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Rotary", "default_frequencies", "linear_frequencies", "llama3_frequencies", "rotary_tables"]


@dataclass(frozen=True, slots=True)
class Rotary:
    """Radians per position of each rotated pair, float32 values, and the factor on cosine and sine.

    The first ``2 * len(frequencies)`` elements of each head are rotated, the others pass.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


def _round(frequencies: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(f) for f in frequencies.astype(np.float32))


def default_frequencies(theta: float, width: int) -> tuple[float, ...]:
    """``theta^(-2i/width)`` for ``width/2`` pairs."""
    return _round(theta ** -(np.arange(0, width, 2, dtype=np.float64) / width))


def linear_frequencies(theta: float, width: int, factor: float) -> tuple[float, ...]:
    """Position interpolation: every frequency divided by ``factor``."""
    return _round(np.asarray(default_frequencies(theta, width), np.float64) / factor)


def llama3_frequencies(
    theta: float, width: int, factor: float, low: float, high: float, original_context: int
) -> tuple[float, ...]:
    """Llama 3.1's: short wavelengths as they are, long ones divided by ``factor``, a ramp between."""
    frequencies = np.asarray(default_frequencies(theta, width), np.float64)
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return _round((1 - smooth) * frequencies / factor + smooth * frequencies)


def rotary_tables(rotary: Rotary, length: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosine and sine, times ``scale``, float32 ``[length, len(frequencies)]``.

    The angle is rounded to float32 before the cosine is taken, as in transformers.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * np.asarray(rotary.frequencies, np.float32)[None, :]
    wide = angles.astype(np.float64)
    return (np.cos(wide) * rotary.scale).astype(np.float32), (np.sin(wide) * rotary.scale).astype(np.float32)
