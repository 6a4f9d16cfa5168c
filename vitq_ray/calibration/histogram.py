"""Histograms of |x| as values: int64 counts over bins of one fixed width, which add exactly and in any order.

The first batch of a tensor fixes the width, max|x| / 2048; later batches keep it and append bins as the range
grows, `ceil(max / width)` in all. Bin k counts e(k) <= |x| < e(k+1), where the edge e(k) is k·width rounded to
float32, as in `np.histogram` of a float32 array. The maximum of a batch that falls exactly on the upper end of its
last bin is counted there. Every batch is counted on its own, so the sum does not depend on who counted which batch,
or in which order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitq_ray.base.config import InputError

INITIAL_BINS = 2048
MAX_BINS = 2**20  # a range that grew 512-fold after the first batch; the index is proven exact below 2**22 bins
_MIN_ELEMENTS_PER_THREAD = 1 << 16

Counts = npt.NDArray[np.int64]


class StatisticsError(InputError):
    """A tensor that cannot be described by a histogram; the caller adds the name of the site."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often |x| fell into each bin.

    Attributes:
        width: width of a bin, in tensor units.
        counts: (bins,) int64; bin k covers [k·width, (k+1)·width).
        max: the largest |x| seen, in tensor units; 0 for an empty histogram.
    """

    width: float
    counts: Counts
    max: float

    def __post_init__(self) -> None:
        self.counts.setflags(write=False)

    @staticmethod
    def empty(width: float) -> Histogram:
        return Histogram(width, np.zeros(INITIAL_BINS, np.int64), 0.0)

    @staticmethod
    def observe(x: Tensor, width: float | None = None) -> Histogram:
        """The histogram of one batch of a tensor of any shape.

        `width` is None for the first batch, which sets it. Raises StatisticsError where `x` is empty, has NaN or
        infinite values, is all zeros while it has to set the width, or has outgrown the width `MAX_BINS` times.
        """
        x = x.detach().float()
        maximum = _absolute_max(x)
        if width is None:
            width = _first_width(maximum)
        bins = max(INITIAL_BINS, math.ceil(maximum / width))
        if bins > MAX_BINS:
            raise StatisticsError(
                f"range grew from {width * INITIAL_BINS:g} in the first batch to {maximum:g}; "
                "the first batch does not represent the data"
            )
        return Histogram(width, count_bins(x, width, bins), maximum)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both; exact, commutative and associative. Widths must be equal."""
        if self.width != other.width:
            raise StatisticsError(f"histograms of widths {self.width!r} and {other.width!r} cannot be merged")
        longer, shorter = sorted((self.counts, other.counts), key=len, reverse=True)
        counts = longer.copy()
        counts[: len(shorter)] += shorter
        return Histogram(self.width, counts, max(self.max, other.max))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        same = self.width == other.width and self.max == other.max
        return same and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]


def _absolute_max(x: Tensor) -> float:
    if x.numel() == 0:
        raise StatisticsError("the tensor is empty")
    low, high = torch.aminmax(x)
    maximum = max(-low.item(), high.item())
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):  # aminmax propagates NaN
        raise StatisticsError("has NaN or infinite values")
    return maximum


def _first_width(maximum: float) -> float:
    if maximum == 0:
        raise StatisticsError("is all zeros in the first calibration batch, so its range is unknown")
    return maximum / INITIAL_BINS


def count_bins(x: Tensor, width: float, bins: int) -> Counts:
    """Counts of |x| in `bins` bins of `width`; float32 `x` of any shape, values past the end go to the last bin."""
    if x.device.type != "cpu":
        return _count_bins_torch(x, width, bins)
    flat = _in_memory_order(x).numpy()
    threads = max(1, min(torch.get_num_threads(), flat.size // _MIN_ELEMENTS_PER_THREAD))
    first, *others = np.array_split(flat, threads)
    inverse = _inverse(width)
    waiting = [_pool(threads).submit(_count_kernel, part, width, inverse, bins) for part in others]
    counts = _count_kernel(first, width, inverse, bins)
    for future in waiting:
        counts += future.result()
    return counts


def _in_memory_order(x: Tensor) -> Tensor:
    """All elements as (x.numel(),), without a copy where they fill a block of memory in whatever order of axes."""
    axes = sorted(range(x.ndim), key=x.stride, reverse=True)
    return x.permute(axes).contiguous().view(-1)


def _inverse(width: float) -> float:
    """1/width, a hair too large, so that truncating |x|·inverse gives the exact k with k·width <= |x|.

    k·width is exact in float64, since width has the 24 significant bits of a float32 and k at most 22. The excess of
    2^-48 outweighs the three roundings of 2^-53 each, so a value at k·width is never taken for a smaller one; and a
    float32 value below k·width is at least 2^-46 (relative) below it, so it is never taken for a larger one.

    What remains is the rounding of the edge itself: where e(k+1) was rounded down, the one float32 value equal to
    it lies below (k+1)·width and has to go up by one bin. Both implementations end with that comparison.
    """
    return (1.0 / width) * (1.0 + 2.0**-48)


def _count_bins_torch(x: Tensor, width: float, bins: int) -> Counts:
    """The same counts with PyTorch ops, for tensors that live on an accelerator."""
    magnitude = x.flatten().abs()
    index = (magnitude.double() * _inverse(width)).long()
    index += magnitude >= ((index + 1).double() * width).float()
    return torch.bincount(index.clamp_max(bins - 1), minlength=bins).cpu().numpy()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="histogram")


def _jit(function: Callable[..., Counts]) -> Callable[..., Counts]:
    return numba.njit(nogil=True, cache=True)(function)


@_jit
def _count_kernel(flat: npt.NDArray[np.float32], width: float, inverse: float, bins: int) -> Counts:
    # Indices of a block first (vectorized), then the increments, in four copies of the histogram so that equal
    # neighbours (attention probabilities near 0) do not wait for each other's store.
    block = 1024
    copies = np.zeros((4, bins), np.int32)
    index = np.empty(block, np.int32)
    last = np.int32(bins - 1)
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        for j in range(part.size):
            k = np.int32(np.float64(abs(part[j])) * inverse)
            k += np.int32(abs(part[j]) >= np.float32(np.float64(k + 1) * width))
            index[j] = min(k, last)
        fours = part.size // 4 * 4
        for j in range(0, fours, 4):
            copies[0, index[j]] += 1
            copies[1, index[j + 1]] += 1
            copies[2, index[j + 2]] += 1
            copies[3, index[j + 3]] += 1
        for j in range(fours, part.size):
            copies[0, index[j]] += 1
    counts = np.zeros(bins, np.int64)
    for c in range(4):
        for k in range(bins):
            counts[k] += copies[c, k]
    return counts
