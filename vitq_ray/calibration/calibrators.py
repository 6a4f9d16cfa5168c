"""Calibrators: from what was seen of a tensor to amax, the value that the largest integer stands for.

Pure functions, and at the end the one table of them: a calibrator is a function and a row. Command line, search spaces,
messages and the statistics that are collected read the table. Definitions follow NVIDIA's pytorch-quantization
(retired; its successor is nvidia-modelopt). Histograms come with bin width w; bin k covers [k·w, (k+1)·w).

`mse` and `entropy` try about 1,900 candidates per histogram. Entropy needs no loop over bins: with running sums of
counts, of non-empty bins and of c·log c, one candidate costs one logarithm per quantization level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitq_ray.base.config import InputError, is_number, require_choice
from vitq_ray.base.kernels import compiled, compiled_with
from vitq_ray.calibration.histogram import Histogram, Range
from vitq_ray.quant.fake_quant import integer_range, step_of

FIRST_CANDIDATE = 128  # bin at which the searches of mse and entropy start, at every bit width
_TIE = 1e-12  # KL divergences closer than this differ by rounding only

Amax = npt.NDArray[np.float64]


def max_amax(seen: Sequence[Range | Histogram]) -> Amax:
    """The largest |x| seen. Returns (sites,)."""
    return np.array([s.max for s in seen], np.float64)


def percentile_amax(histograms: Sequence[Histogram], percentiles: Sequence[float]) -> Amax:
    """Lower edge of the first bin at which the cumulative share of values reaches p/100.

    Args:
        percentiles: each in [0, 100]; 100 means `max`.

    Returns:
        (percentiles, sites). The cumulative sums are made once for all percentiles.
    """
    wanted = np.asarray(percentiles, np.float64)
    if not ((wanted >= 0) & (wanted <= 100)).all():
        raise InputError(f"percentile: expected numbers in [0, 100], got {list(percentiles)!r}")
    columns = [_percentiles_of(h, wanted) for h in histograms]
    return np.stack(columns, axis=1) if columns else np.empty((len(wanted), 0))


def _percentiles_of(histogram: Histogram, percentiles: npt.NDArray[np.float64]) -> Amax:
    share = np.cumsum(histogram.counts / histogram.counts.sum())
    index = np.searchsorted(share, percentiles / 100)
    # The last bin's share can round to just under 1, in which case nothing "reaches" p.
    amax = np.minimum(index, len(share) - 1) * histogram.width
    return np.where(percentiles == 100, histogram.max, amax)


def mse_amax(histograms: Sequence[Histogram], bits: int = 8) -> Amax:
    """Bin centre, from the 129th on, that as amax has the least mean squared quantization error. Returns (sites,).

    The error is that of the bin centres weighted by their counts, quantized with the narrow range
    [-qmax, qmax]; the first minimum wins.
    """
    qmax = 2 ** (bits - 1) - 1
    return _for_each_site(lambda h: (_mse_kernel(h.counts, qmax) + 0.5) * h.width, histograms)


def entropy_amax(histograms: Sequence[Histogram], bits: int = 8) -> Amax:
    """Upper bin edge that minimizes the KL divergence between the clipped and the quantized histogram.

    For i from 128 to the number of bins: the reference is the first i bins, with the mass of all further bins added
    to the last; the candidate is those i bins without that mass, merged into 2^(bits-1) levels (bin j goes to level
    ⌊j·levels/i⌋) and spread back evenly over each level's non-empty bins. The last minimum of KL(reference ‖
    candidate) wins; amax is edge i. The count of bin 0 is replaced by that of bin 1 first. Returns (sites,).
    """
    levels = 2 ** (bits - 1)
    return _for_each_site(lambda h: entropy_bin(h.counts, levels) * h.width, histograms)


def entropy_bin(counts: npt.NDArray[np.int64], levels: int) -> int:
    """The winning i of `entropy_amax` for one histogram of (bins,) counts."""
    divergence = entropy_divergences(counts, levels)
    return int(np.flatnonzero(divergence <= divergence.min() + _TIE)[-1]) + FIRST_CANDIDATE


def entropy_divergences(counts: npt.NDArray[np.int64], levels: int) -> npt.NDArray[np.float64]:
    """KL(reference ‖ candidate) in nats for i = 128 … bins; infinite where only the candidate is 0 in some bin."""
    smoothed = counts.astype(np.float64)
    smoothed[0] = smoothed[1]
    divergences: npt.NDArray[np.float64] = _divergence_kernel(smoothed, levels)
    return divergences


def noise_to_signal(histogram: Histogram, amax: float, levels: tuple[int, int]) -> float:
    """Mean squared quantization error over mean square, of the bin centres weighted by their counts.

    What a setting costs at a site, as far as the statistics tell: 1 where amax is 0 and everything becomes 0; 0 where
    everything is 0 already, or the distribution is not known. `levels` are those of `SiteRule`, but a symmetric grid
    ends at -high here: so it was forecast since the first searches, whose logs go on. Where signs were not kept, all
    values count as positive.
    """
    if histogram.width == 0:
        return 0.0
    negative = np.zeros_like(histogram.counts) if histogram.negative is None else histogram.negative
    low, high = levels
    low = -high if low == -high - 1 else low
    noise: float = _noise_kernel(histogram.counts - negative, negative, amax / histogram.width, low, high)
    return noise


def weight_max(weight: Tensor, axis: int | None) -> Tensor:
    """max|w| of a (rows, columns) weight: shape (rows, 1) with axis 0, () with axis None."""
    magnitude = weight.detach().abs()
    return magnitude.amax() if axis is None else magnitude.amax(dim=1, keepdim=True)


def weight_mse(weight: Tensor, axis: int | None, bits: int) -> Tensor:
    """Of 1.00, 0.99, … 0.30 times max|w|, the amax with the least squared error; the largest on a tie."""
    largest, (low, high) = weight_max(weight, axis), integer_range(bits)
    tried = torch.stack([largest * (percent / 100) for percent in range(100, 29, -1)])  # (71, rows, 1), or (71,)
    values = weight.detach().float().cpu().contiguous().numpy()
    steps = step_of(tried, high).cpu().reshape(len(tried), -1).expand(-1, len(values)).numpy()
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        parts = np.array_split(np.arange(len(values)), max(1, torch.get_num_threads()))
        found = pool.map(
            lambda rows: _squared_errors(values[rows], np.ascontiguousarray(steps[:, rows]), low, high), parts
        )
        errors = torch.from_numpy(np.concatenate(list(found), axis=1))  # (71, rows)
    if axis is None:
        return tried[int(errors.sum(dim=1).argmin())]
    rows = torch.arange(len(weight), device=largest.device)
    return tried[errors.argmin(dim=0).to(largest.device), rows]


def _for_each_site(amax_of: Callable[[Histogram], float], histograms: Sequence[Histogram]) -> Amax:
    # The kernels release the GIL, so threads are enough to use every core this process was given.
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return np.array(list(pool.map(amax_of, histograms)), np.float64)


@compiled
def _mse_kernel(counts: npt.NDArray[np.int64], qmax: int) -> int:
    """Index of the best bin centre; in units of the bin width, so centre k is k + 0.5."""
    filled = np.flatnonzero(counts)
    centres = filled + 0.5
    weights = counts[filled].astype(np.float64)
    best, best_error = FIRST_CANDIDATE, np.inf
    for candidate in range(FIRST_CANDIDATE, counts.size):
        amax = candidate + 0.5
        to_level, to_value = qmax / amax, amax / qmax
        error = 0.0
        for j in range(centres.size):
            level = min(np.rint(centres[j] * to_level), np.float64(qmax))
            difference = centres[j] - level * to_value
            error += weights[j] * difference * difference
        if error < best_error:
            best, best_error = candidate, error
    return best


@compiled_with(fastmath=True)
def _squared_errors(
    weight: npt.NDArray[np.float32], steps: npt.NDArray[np.float32], low: int, high: int
) -> npt.NDArray[np.float64]:
    """Of every row (rows, columns) at every step (tries, rows): (tries, rows)."""
    lowest, highest = np.float32(low), np.float32(high)
    errors = np.zeros(steps.shape)
    for row in range(weight.shape[0]):
        values = weight[row]
        for index in range(steps.shape[0]):
            step = steps[index, row]
            inverse, total = np.float32(1) / step, np.float32(0)
            for column in range(values.shape[0]):
                level = min(max(np.rint(values[column] * inverse), lowest), highest)
                error = level * step - values[column]
                total += error * error
            errors[index, row] = total
    return errors


@compiled
def _noise_kernel(
    positive: npt.NDArray[np.int64], negative: npt.NDArray[np.int64], amax: float, low: int, high: int
) -> float:
    """`amax` in units of the bin width; bin k is at k + 0.5, or at -(k + 0.5)."""
    noise, signal = 0.0, 0.0
    for k in range(positive.size):
        centre = k + 0.5
        level = np.rint(centre * high / amax) if amax > 0 else 0.0
        above = centre - min(level, np.float64(high)) * amax / high
        below = centre - min(level, np.float64(-low)) * amax / high
        noise += positive[k] * above * above + negative[k] * below * below
        signal += (positive[k] + negative[k]) * centre * centre
    return noise / signal


@compiled
def _divergence_kernel(counts: npt.NDArray[np.float64], levels: int) -> npt.NDArray[np.float64]:
    """With T all counts, S the counts kept, o = T - S the outliers, M and n the mass and non-empty bins of a level:

    KL = Σ_bins r·log r - Σ_levels R·log(M / (n·S)),   r = c/T,   R = M/T; o/T is added to the last r and R.
    """
    bins = counts.size
    mass = np.zeros(bins + 1)
    filled = np.zeros(bins + 1)
    c_log_c = np.zeros(bins + 1)
    for k in range(bins):
        c = counts[k]
        mass[k + 1] = mass[k] + c
        filled[k + 1] = filled[k] + (1.0 if c > 0 else 0.0)
        c_log_c[k + 1] = c_log_c[k] + (c * np.log(c) if c > 0 else 0.0)
    total = mass[bins]
    result = np.full(max(bins - FIRST_CANDIDATE + 1, 1), np.inf)
    for i in range(FIRST_CANDIDATE, bins + 1):
        kept, outliers, last = mass[i], total - mass[i], counts[i - 1]
        if kept == 0 or (last == 0 and outliers > 0):
            continue
        reference = c_log_c[i - 1]
        if last + outliers > 0:
            reference += (last + outliers) * np.log(last + outliers)
        cross = 0.0
        begin = 0
        for level in range(levels):
            end = min(i, ((level + 1) * i + levels - 1) // levels)
            level_mass = mass[end] - mass[begin]
            if level_mass > 0:
                weight = level_mass + (outliers if level == levels - 1 else 0.0)
                cross += weight * np.log(level_mass / ((filled[end] - filled[begin]) * kept))
            begin = end
        result[i - FIRST_CANDIDATE] = (reference - cross) / total - np.log(total)
    return result


def _weight_mse(weight: Tensor, values: tuple[float, ...], axis: int | None, bits: int) -> Tensor:
    return weight_mse(weight, axis, bits)


SENSITIVITY = "sensitivity"  # in place of a kind of statistics

# The table ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A number that a calibrator takes, in [low, high]; one up to `unlikely` is a mistake about its unit."""

    name: str
    low: float
    high: float
    default: float
    help: str
    unlikely: float = -math.inf
    unit: str = ""

    def require_meant(self, value: float) -> None:
        """InputError, without the name, where what a user asks for is not what is meant."""
        if value <= self.unlikely:
            raise InputError(f"{value:g} given, expected {self.unit}")


@dataclass(frozen=True)
class Calibrator:
    """One row of the table.

    Attributes:
        name: as options, search spaces and files have it.
        help: half a sentence for the command line.
        statistic: what it needs to have seen of an activation tensor: a key of `statistics.STATISTICS`, or
            `SENSITIVITY`, whose loss curves say themselves where they are least: of activations, weights, and of
            tensors that share a scale.
        activation: (what was seen of each tensor, parameter values, bits) -> (tensors,) amax.
        weight: ((rows, columns) weight, parameter values, axis, bits) -> amax, as `weight_max`; None: not for weights.
        parameters: the numbers behind its name in the text form, `percentile 99.9`.
    """

    name: str
    help: str
    statistic: str
    activation: Callable[[Sequence[Any], tuple[float, ...], int], Amax] | None = None
    weight: Callable[[Tensor, tuple[float, ...], int | None, int], Tensor] | None = None
    parameters: tuple[Parameter, ...] = ()

    @property
    def by_curves(self) -> bool:
        """Scales come from `sensitivity.Curve`."""
        return self.statistic == SENSITIVITY

    @property
    def of_weights(self) -> bool:
        """It can calibrate weights."""
        return self.weight is not None or self.by_curves

    @property
    def usage(self) -> str:
        """E.g. `percentile P (0 to 100)`."""
        words = (f"{p.name[0].upper()} ({p.low:g} to {p.high:g})" for p in self.parameters)
        return " ".join((self.name, *words))


PERCENTILE = Parameter(
    "percentile", 0, 100, 99.99, "share of values, in percent, that are not clipped",
    unlikely=1, unit="a number in percent, such as 99.99: more than 1 (no fraction), up to 100",
)  # fmt: skip
CALIBRATORS: dict[str, Calibrator] = {
    row.name: row
    for row in (
        Calibrator(
            "max",
            "largest value",
            "range",
            lambda s, _, bits: max_amax(s),
            lambda w, _, axis, bits: weight_max(w, axis),
        ),
        Calibrator(
            "percentile",
            "clips the largest values",
            "histogram",
            lambda s, values, bits: percentile_amax(s, values)[0],
            parameters=(PERCENTILE,),
        ),
        Calibrator("mse", "least squared error", "histogram", lambda s, _, bits: mse_amax(s, bits), _weight_mse),
        Calibrator("entropy", "least KL divergence", "histogram", lambda s, _, bits: entropy_amax(s, bits)),
        Calibrator("fisher", "least predicted KL of the model's output", SENSITIVITY),
    )
}


def weight_calibrators() -> tuple[str, ...]:
    """Names of the calibrators that can calibrate weights."""
    return tuple(name for name, row in CALIBRATORS.items() if row.of_weights)


@dataclass(frozen=True)
class Calibration:
    """A calibrator with the values of its parameters: `percentile 99.9`."""

    name: str
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require_choice("calibrator", self.name, CALIBRATORS)
        wanted = self.row.parameters
        if len(self.values) != len(wanted):
            takes = " and ".join(p.name for p in wanted) or "no number"
            raise InputError(f"calibrator {self.name}: takes {takes}, got {list(self.values)}")
        for parameter, value in zip(wanted, self.values, strict=True):
            if not is_number(value, parameter.low, parameter.high):
                limits = f"[{parameter.low:g}, {parameter.high:g}]"
                raise InputError(f"{parameter.name}: expected a number in {limits}, got {value!r}")
        object.__setattr__(self, "values", tuple(map(float, self.values)))

    @staticmethod
    def parse(text: Any, what: str = "calibrator") -> Calibration:
        """The inverse of `str`. InputError, with `what` it is for, where the text is not a calibrator."""
        if isinstance(text, Calibration):
            return text
        name, *words = text.split(" ") if isinstance(text, str) else ("",)
        try:
            return Calibration(name, tuple(map(float, words)))
        except ValueError:
            known = ", ".join(c.usage for c in CALIBRATORS.values())
            raise InputError(f"{what}: {text!r} is not one of {known}") from None

    @property
    def row(self) -> Calibrator:
        return CALIBRATORS[self.name]

    def require_meant(self) -> None:
        """InputError where a user asks for numbers that are not meant, as `Parameter.require_meant`."""
        for parameter, value in zip(self.row.parameters, self.values, strict=True):
            try:
                parameter.require_meant(value)
            except InputError as error:
                raise InputError(f"{parameter.name}: {error}") from None

    def __str__(self) -> str:
        """Exact, for files: `percentile 99.9`."""
        return " ".join((self.name, *(repr(value).removesuffix(".0") for value in self.values)))

    @property
    def short(self) -> str:
        """For tables: ten digits at most."""
        return " ".join((self.name, *(f"{value:.10g}" for value in self.values)))
