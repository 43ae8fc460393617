"""Rotary position embedding as numbers: frequencies, and the tables that all backends store.

Half-split rotation: element ``i`` of the rotated part pairs with element ``i + len(frequencies)``. Rope types and their
formulas follow transformers' ``modeling_rope_utils``; frequencies are float32 as there, computed in float64 so that
they don't depend on the machine's vector units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "LongRotary",
    "Rotary",
    "default_frequencies",
    "linear_frequencies",
    "llama3_frequencies",
    "longrope_frequencies",
    "longrope_scale",
    "rotary_tables",
    "yarn_frequencies",
    "yarn_scale",
]


@dataclass(frozen=True, slots=True)
class Rotary:
    """Radians per position of each rotated pair, float32 values, and the factor on cosine and sine.

    The first ``2 * len(frequencies)`` elements of each head are rotated, the others pass.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LongRotary:
    """LongRoPE: ``short`` for contexts of up to ``original_context`` positions, ``long`` beyond.

    transformers chooses by the length so far, anew at every call, and so rotates the same key in two ways; a cache
    can't. What is exported is one of the two.
    """

    short: Rotary
    long: Rotary
    original_context: int

    def at(self, context_length: int) -> Rotary:
        """The rotation of an export for ``context_length`` positions."""
        return self.short if context_length <= self.original_context else self.long


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


def yarn_frequencies(
    theta: float, width: int, factor: float, original_context: int, fast: float, slow: float, truncate: bool
) -> tuple[float, ...]:
    """YaRN's: pairs that turn more than ``fast`` times in the original context as they are, those below ``slow`` turns
    divided by ``factor``, a ramp between, whose ends are whole pairs if ``truncate``. ``theta`` is above 1."""

    def pair_of(turns: float) -> float:
        return width * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(fast), pair_of(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    frequencies = np.asarray(default_frequencies(theta, width), np.float64)
    ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
    return _round(frequencies / factor * ramp + frequencies * (1 - ramp))


def yarn_scale(factor: float, numerator: float | None, denominator: float | None) -> float:
    """The factor on cosine and sine: ``0.1 ln(factor) + 1``; with both multipliers of the logarithm, the ratio."""

    def scale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1 if factor > 1 else 1.0

    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1)


def longrope_frequencies(theta: float, width: int, factors: Sequence[float]) -> tuple[float, ...]:
    """Each frequency divided by its own of ``width/2`` factors."""
    return _round(theta ** -(np.arange(0, width, 2, dtype=np.float64) / width) / np.asarray(factors, np.float64))


def longrope_scale(factor: float, original_context: int) -> float:
    """The factor on cosine and sine: ``sqrt(1 + ln(factor) / ln(original_context))``."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0


def rotary_tables(rotary: Rotary, length: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosine and sine, times ``scale``, float32 ``[length, len(frequencies)]``.

    The angle is rounded to float32 before the cosine is taken, as in transformers.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * np.asarray(rotary.frequencies, np.float32)[None, :]
    wide = angles.astype(np.float64)
    return (np.cos(wide) * rotary.scale).astype(np.float32), (np.sin(wide) * rotary.scale).astype(np.float32)
