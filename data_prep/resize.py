"""Reduction of a picture by area: each new pixel is the mean of the old ones under it, by the share that is covered.

In integers, so that the C of csrc/area_resize.c and the numpy here give the same bytes on every machine. OpenCV's
filter of that name takes three times as long where the ratio is no whole number.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np

from data_prep.native import library

_WEIGHT_BITS, _ROW_BITS = 14, 7  # as in csrc/area_resize.c


class _Axis(ctypes.Structure):
    """struct axis."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("taps", ctypes.c_int64),
        ("count", ctypes.c_int64),
    )


@lru_cache(maxsize=256)
def area_weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Which old pixels make each new one: (first, int32 (new,); weights, int16 (new, taps), adding up to 2^14).

    The weight of tap t belongs to old pixel first + t; their number is even, the last ones' weight 0 where need be.
    """
    assert 1 <= new <= old
    numbers = np.arange(new, dtype=np.int64)
    first, last = numbers * old // new, -(-(numbers + 1) * old // new)
    taps = int((last - first).max() + 1) // 2 * 2
    pixels = first[:, None] + np.arange(taps)
    # In units of 1/new of an old pixel, all is whole: new pixel i covers [i old, (i + 1) old).
    start, end = (
        np.maximum(pixels * new, numbers[:, None] * old),
        np.minimum((pixels + 1) * new, (numbers[:, None] + 1) * old),
    )
    covered = np.maximum(end - start, 0)
    # Cumulated, then rounded: the differences then add up to 2^14 without a remainder to place.
    bounds = (np.cumsum(covered, axis=1) * (1 << _WEIGHT_BITS) + old // 2) // old
    weights = np.diff(bounds, axis=1, prepend=0)
    return first.astype(np.int32), np.ascontiguousarray(weights, dtype=np.int16)


def reduce_by_area(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (height, width, 3) for `size` = (width, height), neither larger than the old one."""
    width, height = size
    pixels = np.ascontiguousarray(pixels)
    rows, columns = area_weights(pixels.shape[0], height), area_weights(pixels.shape[1], width)
    loaded = library()
    if loaded is None:
        return _reduce_plainly(pixels, rows, columns)
    old_width = pixels.shape[1]
    out = np.empty((height, width, 3), np.uint8)
    between = np.zeros(3 * (old_width + columns[1].shape[1]) + 8, np.int16)
    loaded.nn_area_resize(
        ctypes.c_void_p(pixels.ctypes.data),
        ctypes.c_int64(3 * old_width),
        ctypes.c_int64(old_width),
        ctypes.byref(_axis(rows)),
        ctypes.byref(_axis(columns)),
        ctypes.c_void_p(between.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
    )
    return out


def _axis(weights_of_axis: tuple[np.ndarray, np.ndarray]) -> _Axis:
    first, weights = weights_of_axis
    count, taps = weights.shape
    return _Axis(first.ctypes.data, weights.ctypes.data, taps, count)


def _reduce_plainly(
    pixels: np.ndarray, rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """The specification: height first, kept to 7 bits below the point; then width."""
    between = _weighed(pixels, *rows, _WEIGHT_BITS - _ROW_BITS)
    return _weighed(between.swapaxes(0, 1), *columns, _WEIGHT_BITS + _ROW_BITS).swapaxes(0, 1).astype(np.uint8)


def _weighed(values: np.ndarray, first: np.ndarray, weights: np.ndarray, shift: int) -> np.ndarray:
    """Along the first axis: (old, ...) -> (new, ...), rounded to the nearest after the shift."""
    total = np.full((len(first), *values.shape[1:]), 1 << (shift - 1), np.int64)
    for tap in range(weights.shape[1]):
        taken = values[np.minimum(first + tap, len(values) - 1)].astype(np.int64)  # beyond the end the weight is 0
        total += weights[:, tap].astype(np.int64).reshape(-1, *[1] * (values.ndim - 1)) * taken
    return total >> shift
