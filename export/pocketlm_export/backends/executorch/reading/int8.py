"""Activations as XNNPACK quantizes them for a quantized filter: asymmetric int8, a scale and a zero point for each row.

After ``xnn_f32_qd8_asymmetric_quantization_params`` and its convert kernels, in float32 throughout.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["round_rows"]

Floats = npt.NDArray[np.float32]
LOWEST, HIGHEST = np.float32(-128), np.float32(127)


def round_rows(x: Floats) -> Floats:
    """float32 ``[..., K]`` -> the values that its int8 codes stand for."""
    x = np.asarray(x, np.float32)
    low = np.minimum(x.min(-1, keepdims=True), 0)
    high = np.maximum(x.max(-1, keepdims=True), 0)
    flat = low == high
    scale = np.where(flat, np.float32(1), np.float32(255) / np.where(flat, np.float32(1), high - low))
    below, above = low * scale, high * scale
    # The end of the range whose rounding error is the larger decides where zero lies.
    zero = np.where((LOWEST + below) + (HIGHEST + above) > 0, LOWEST - below, HIGHEST - above)
    zero = np.rint(np.clip(zero, LOWEST, HIGHEST))
    codes = np.clip(np.rint(x * scale) + zero, LOWEST, HIGHEST)
    result: Floats = (codes - zero) * (1 / scale)
    return result
