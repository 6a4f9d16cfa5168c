"""Ranges and histograms of tensors as values, which merge exactly and in any order.

A `Range` is the smallest and the largest value seen. A `Histogram` counts |x| in int64 over bins of one fixed width,
and of each bin how many of its values were negative.

The first batch of a tensor fixes the width, max|x| / 2048; later batches keep it and append bins as the range
grows, `ceil(max / width)` in all. Bin k counts e(k) <= |x| < e(k+1), where the edge e(k) is k·width rounded to
float32, as in `np.histogram` of a float32 array. The maximum of a batch that falls exactly on the upper end of its
last bin is counted there. A tensor that is all zeros in the first batch has width 0: its values are counted together,
and only its range is known. Every batch is counted on its own, so the sum does not depend on who counted which batch,
or in which order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.base.kernels import compiled

INITIAL_BINS = 2048
MAX_BINS = 2**20  # a range that grew 512-fold after the first batch; the index is proven exact below 2**22 bins
WOKEN = "is all zeros in the first calibration batch and not in later ones, so its histogram has no bin width"
_NO_SIGNS = "has no signs: these statistics were written by a version that kept |x| only"
_MIN_ELEMENTS_PER_THREAD = 1 << 16
_ROOM = 4 * INITIAL_BINS  # bins that are counted on an accelerator without asking it for the range first
_COPIES = 16  # of a histogram there, so that equal neighbours do not wait for each other's addition

T = TypeVar("T")
Counts = npt.NDArray[np.int64]


# Numbers that an accelerator is computing, and what makes a value of them once they are here
Later = tuple[Tensor, Callable[[Counts], T | None]]


class StatisticsError(InputError):
    """A tensor that cannot be described by a histogram; the caller adds the name of the site."""


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value seen, in tensor units; 0 belongs to every range, as to every integer grid."""

    low: float
    high: float

    @property
    def max(self) -> float:
        """The largest |x| seen."""
        return max(-self.low, self.high)

    @staticmethod
    def observe(x: Tensor) -> Range:
        """The range of one batch of a tensor of any shape. StatisticsError where it is empty or not finite."""
        low, high = _finite_range(x.detach().float())
        return Range(min(low, 0.0), max(high, 0.0))

    @staticmethod
    def observe_later(x: Tensor, width: float | None = None) -> Later[Range]:
        """As `observe`, for a tensor on an accelerator, without waiting for it."""
        return _range_bits(x.detach().float()), _range_of

    @staticmethod
    def empty() -> Range:
        return Range(0.0, 0.0)

    def merge(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often |x| fell into each bin.

    Attributes:
        width: width of a bin, in tensor units; 0 where the first batch was all zeros, and everything is in bin 0.
        counts: (bins,) int64; bin k covers [k·width, (k+1)·width).
        max: the largest |x| seen, in tensor units; 0 for an empty histogram.
        negative: (bins,) int64, how many of the counts are of x < 0; None in statistics of format 1.
        range: the smallest and the largest value seen; None as above.
    """

    width: float
    counts: Counts
    max: float
    negative: Counts | None = None
    range: Range | None = None

    def __post_init__(self) -> None:
        for array in (self.counts, self.negative):
            if array is not None:
                array.setflags(write=False)

    @property
    def positive(self) -> Counts:
        """(bins,) int64, how many of the counts are of x >= 0. StatisticsError where signs were not kept."""
        if self.negative is None:
            raise StatisticsError(_NO_SIGNS)
        return self.counts - self.negative

    @property
    def woken(self) -> bool:
        """All zeros in the first batch, and not later: how its values are distributed is not known."""
        return self.width == 0 and self.max > 0

    @staticmethod
    def empty(width: float) -> Histogram:
        zeros = np.zeros(INITIAL_BINS, np.int64)
        return Histogram(width, zeros, 0.0, zeros, Range.empty())

    @staticmethod
    def observe(x: Tensor, width: float | None = None) -> Histogram:
        """The histogram of one batch of a tensor of any shape.

        `width` is None for the first batch, which sets it. Raises StatisticsError where `x` is empty, has NaN or
        infinite values, or has outgrown the width `MAX_BINS` times.
        """
        x = x.detach().float()
        seen = Range.observe(x)
        if width is None:
            width = seen.max / INITIAL_BINS
        if width == 0:
            return Histogram._together(x.numel(), seen)
        bins = max(INITIAL_BINS, math.ceil(seen.max / width))
        if bins > MAX_BINS:
            raise StatisticsError(
                f"range grew from {width * INITIAL_BINS:g} in the first batch to {seen.max:g}; "
                "the first batch does not represent the data"
            )
        positive, negative = count_bins(x, width, bins)
        return Histogram(width, positive + negative, seen.max, negative, seen)

    @staticmethod
    def observe_later(x: Tensor, width: float | None = None) -> Later[Histogram]:
        """As `observe`, for a tensor on an accelerator, without waiting for it; None where it has outgrown `_ROOM`."""
        flat = x.detach().float().flatten()
        count = len(flat)  # the tensor itself is not kept
        ends = _range_bits(flat)
        top = ends.view(torch.float64).abs().amax()
        step = top / INITIAL_BINS if width is None else torch.full_like(top, width)
        last = (top / step).ceil().clamp(INITIAL_BINS, _ROOM).long() - 1
        index = _bin_of(flat, step).minimum(last).clamp_min(0)  # of NaN or a width of 0 it is anything

        def value(numbers: Counts) -> Histogram | None:
            seen = _range_of(numbers[:2])
            found = seen.max / INITIAL_BINS if width is None else width
            if found == 0:
                return Histogram._together(count, seen)
            bins = max(INITIAL_BINS, math.ceil(seen.max / found))
            if bins > _ROOM:
                return None
            positive, negative = numbers[2:].reshape(2, _ROOM)[:, :bins]
            return Histogram(found, positive + negative, seen.max, negative.copy(), seen)

        return torch.cat([ends, _add_up(index + _ROOM * (flat < 0), 2 * _ROOM)]), value

    @staticmethod
    def _together(count: int, seen: Range) -> Histogram:
        """Of a tensor without a bin width."""
        counts = np.zeros(INITIAL_BINS, np.int64)
        counts[0] = count
        return Histogram(0.0, counts, seen.max, np.zeros_like(counts), seen)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both; exact, commutative and associative. Widths must be equal."""
        if self.width != other.width:
            raise StatisticsError(f"histograms of widths {self.width!r} and {other.width!r} cannot be merged")
        signed = self.negative is not None and other.negative is not None
        return Histogram(
            self.width,
            _add(self.counts, other.counts),
            max(self.max, other.max),
            _add(self.negative, other.negative) if signed else None,  # type: ignore[arg-type]
            self.range.merge(other.range) if self.range is not None and other.range is not None else None,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        same = (self.width, self.max, self.range) == (other.width, other.max, other.range)
        return same and _equal(self.counts, other.counts) and _equal(self.negative, other.negative)

    __hash__ = None  # type: ignore[assignment]


def range_of(seen: Range | Histogram) -> Range:
    """The smallest and the largest value seen. StatisticsError where signs were not kept."""
    found = seen.range if isinstance(seen, Histogram) else seen
    if found is None:
        raise StatisticsError(_NO_SIGNS)
    return found


def _add(a: Counts, b: Counts) -> Counts:
    longer, shorter = sorted((a, b), key=len, reverse=True)
    counts: Counts = longer.copy()
    counts[: len(shorter)] += shorter
    return counts


def _equal(a: Counts | None, b: Counts | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


def _range_bits(x: Tensor) -> Tensor:
    """(2,) int64 on x's device: the bits of the smallest and the largest value as float64."""
    if x.numel() == 0:
        raise StatisticsError("the tensor is empty")
    return torch.stack(torch.aminmax(x)).double().view(torch.int64)


def _range_of(bits: Counts) -> Range:
    low, high = _finite(*map(float, bits.view(np.float64)))
    return Range(min(low, 0.0), max(high, 0.0))


def _finite_range(x: Tensor) -> tuple[float, float]:
    if x.numel() == 0:
        raise StatisticsError("the tensor is empty")
    return _finite(*(value.item() for value in torch.aminmax(x)))


def _finite(low: float, high: float) -> tuple[float, float]:
    if not (math.isfinite(low) and math.isfinite(high)):  # aminmax propagates NaN
        raise StatisticsError("has NaN or infinite values")
    return low, high


def count_bins(x: Tensor, width: float, bins: int) -> Counts:
    """Counts of |x| in `bins` bins of `width`: (2, bins), of x >= 0 and of x < 0.

    float32 `x` of any shape, values past the end go to the last bin.
    """
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


def _inverse(width: Any) -> Any:
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
    flat = x.flatten()
    index = _bin_of(flat, width).clamp_max(bins - 1) + bins * (flat < 0)
    return torch.bincount(index, minlength=2 * bins).reshape(2, bins).cpu().numpy()


def _bin_of(flat: Tensor, width: Any) -> Tensor:
    """(n,) int64: in which bin |x| falls. `width` is a number, or one on the same device."""
    magnitude = flat.abs()
    index: Tensor = (magnitude.double() * _inverse(width)).long()
    index += magnitude >= ((index + 1).double() * width).float()
    return index


def _add_up(index: Tensor, bins: int) -> Tensor:
    """As `torch.bincount` (bins,), which waits for the device."""
    place = index + bins * (torch.arange(len(index), device=index.device) % _COPIES)
    one = torch.ones((), dtype=torch.int32, device=index.device)
    counts = torch.zeros(_COPIES * bins, dtype=torch.int32, device=index.device)
    return counts.scatter_add_(0, place, one.expand(len(index))).view(_COPIES, bins).sum(0)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="histogram")


@compiled
def _count_kernel(flat: npt.NDArray[np.float32], width: float, inverse: float, bins: int) -> Counts:
    # Indices of a block first (vectorized), then the increments, in copies of the histogram so that equal neighbours
    # (attention probabilities near 0) do not wait for each other's store. Negative values count in the second half.
    block = 1024
    copies = np.zeros((4, 2 * bins), np.int32)
    index = np.empty(block, np.int32)
    last = np.int32(bins - 1)
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        for j in range(part.size):
            k = np.int32(np.float64(abs(part[j])) * inverse)
            k += np.int32(abs(part[j]) >= np.float32(np.float64(k + 1) * width))
            index[j] = min(k, last) + np.int32(part[j] < 0) * np.int32(bins)
        fours = part.size // 4 * 4
        for j in range(0, fours, 4):
            copies[0, index[j]] += 1
            copies[1, index[j + 1]] += 1
            copies[2, index[j + 2]] += 1
            copies[3, index[j + 3]] += 1
        for j in range(fours, part.size):
            copies[0, index[j]] += 1
    counts = np.zeros((2, bins), np.int64)
    for c in range(4):
        for k in range(bins):
            counts[0, k] += copies[c, k]
            counts[1, k] += copies[c, bins + k]
    return counts
