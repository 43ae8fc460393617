"""A block of rows to codes and scales. Scales are fixed before the codes, and exact in bfloat16 and float16."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from pocketlm_export.quantization.schemes import SchemeRow

__all__ = ["LARGEST_SCALE", "SMALLEST_SCALE", "dequantize_rows", "pack_nibbles", "quantize_rows", "unpack_nibbles"]

SMALLEST_SCALE = 2.0**-17  # below it a bfloat16's 8 bits don't fit into a subnormal float16
LARGEST_SCALE = 65280.0  # the largest bfloat16 that float16 holds

Floats = npt.NDArray[np.float32]


def _round_to_bfloat16(values: Floats) -> Floats:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: npt.NDArray[np.uint32] = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _fit(smallest: Floats, largest: Floats) -> Floats:
    return np.maximum(largest / np.float32(7), smallest / np.float32(-8))


def _absmax(smallest: Floats, largest: Floats) -> Floats:
    return np.divide(np.maximum(largest, -smallest), 127, dtype=np.float32)


SCALE_RULES: Mapping[str, Callable[[Floats, Floats], Floats]] = {"fit": _fit, "absmax": _absmax}


def quantize_rows(values: Floats, row: SchemeRow) -> tuple[npt.NDArray[np.int8], Floats]:
    """float32 ``[n, K]`` -> codes int8 ``[n, K]`` and scales float32 ``[n, groups]``.

    Every scale is a positive bfloat16 in 2^-17..65280; a group of zeros gets the smallest one. ``values`` must be
    finite.
    """
    rows, columns = values.shape
    group = row.group or columns
    # The group's axis comes first: reductions over a short last axis are slow in numpy. Always a copy: it is worked on
    # in place, and a single group is contiguous either way.
    grouped = values.reshape(-1, group).T.copy(order="C")
    scales = _round_to_bfloat16(SCALE_RULES[row.scale_rule](grouped.min(0), grouped.max(0)))
    np.clip(scales, SMALLEST_SCALE, LARGEST_SCALE, out=scales)
    np.divide(grouped, scales, out=grouped)
    np.rint(grouped, out=grouped)
    top = 2 ** (row.bits - 1) - 1
    np.clip(grouped, -top if row.bits == 8 else -top - 1, top, out=grouped)
    codes = np.ascontiguousarray(grouped.astype(np.int8).T).reshape(rows, columns)
    return codes, scales.reshape(rows, columns // group)


def dequantize_rows(codes: npt.NDArray[np.int8], scales: Floats) -> Floats:
    """The inverse of :func:`quantize_rows` up to its rounding: code times scale, exact in float32."""
    rows, columns = codes.shape
    wide = codes.reshape(rows, scales.shape[1], -1).astype(np.float32)
    wide *= scales[:, :, None]
    return wide.reshape(rows, columns)


def pack_nibbles(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """int4 codes ``[n, K]`` -> two's complement nibbles uint8 ``[n, K/2]``, the even column low."""
    unsigned = codes.view(np.uint8)
    packed = np.left_shift(unsigned[:, 1::2], 4)
    packed |= unsigned[:, 0::2] & 0xF
    return packed


def unpack_nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """The inverse of :func:`pack_nibbles`."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    codes[:, 0::2] = (packed << 4).view(np.int8) >> 4
    codes[:, 1::2] = packed.view(np.int8) >> 4
    return codes
