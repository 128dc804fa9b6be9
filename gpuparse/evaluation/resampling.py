"""Resampling tables in torch's arithmetic: what `torch.nn.functional.interpolate` does to uint8, as tables.

They are made in double precision on the host and serve CPU and GPU alike.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FixedPointTable", "fixed_point_table", "nearest_table"]

_CUBIC_A = -0.75
_NUM_TAPS = 4
_MAX_WEIGHT = 1 << 15  # torch keeps weights in 16 bits and gives them as many fractional bits as fit


@dataclass(frozen=True, eq=False)
class FixedPointTable:
    """Bicubic weights for one axis in fixed point.

    Attributes:
        first: (target,) int32, the first source pixel that counts.
        weights: (4, target) int32 in units of 2^-bits, for that pixel and the three behind it; 0 for those that are
            outside the source.
        bits: Fractional bits of the weights.
    """

    first: npt.NDArray[np.int32]
    weights: npt.NDArray[np.int32]
    bits: int


@functools.lru_cache(maxsize=1024)
def fixed_point_table(source: int, target: int) -> FixedPointTable:
    """The weights that torch's uint8 bicubic (align_corners=False, no antialiasing) uses for one axis.

    Args:
        source: Source length in pixels, at least 1.
        target: Target length in pixels, at least 1.

    Returns:
        Its table. Equal lengths copy; torch skips the pass then.
    """
    if source == target:
        first = np.arange(target, dtype=np.int32)
        weights = np.zeros((_NUM_TAPS, target), np.int32)
        weights[0] = 2
        return _frozen(first, weights, bits=1)
    position = (source / target) * (np.arange(target) + 0.5) - 0.5
    left = np.minimum(np.floor(position).astype(np.int64), source - 1)
    offset = np.clip(position - left, 0, 1)
    first = np.maximum(left - 1, 0)
    num_inside = np.minimum(left + 3, source) - first
    exact = np.zeros((target, _NUM_TAPS))
    rows, slot, largest = np.arange(target), np.zeros(target, np.int64), 0.0
    for tap in range(_NUM_TAPS):
        at = left - 1 + tap
        slot = np.where(at <= 0, 0, np.where(at >= source - 1, num_inside - 1, slot))
        exact[rows, slot] += _cubic(tap - 1 - offset)
        # Torch looks for the largest weight while it adds taps beyond the edge, which may lower a weight again.
        largest = max(largest, float(exact[rows, slot].max()))
        slot = slot + 1
    bits = 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < _MAX_WEIGHT:
        bits += 1
    scaled = exact.T * (1 << bits)
    weights = np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int32)  # half away from zero
    return _frozen(first.astype(np.int32), np.ascontiguousarray(weights), bits)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x = np.abs(x)
    near = ((_CUBIC_A + 2) * x - (_CUBIC_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _CUBIC_A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _frozen(first: npt.NDArray[np.int32], weights: npt.NDArray[np.int32], bits: int) -> FixedPointTable:
    for array in (first, weights):
        array.setflags(write=False)
    return FixedPointTable(first, weights, bits)


@functools.lru_cache(maxsize=1024)
def nearest_table(source: int, target: int) -> npt.NDArray[np.int64]:
    """The source pixel of each target pixel under torch's `mode="nearest"`.

    Args:
        source: Source length in pixels, at least 1.
        target: Target length in pixels, at least 1.

    Returns:
        (target,) int64. Torch computes in single precision: floor(d * float(source / target)), at most source - 1.
    """
    scale = np.float32(source) / np.float32(target)
    at = np.floor(np.arange(target, dtype=np.float32) * scale).astype(np.int64)
    result: npt.NDArray[np.int64] = np.minimum(at, source - 1)
    result.setflags(write=False)
    return result
