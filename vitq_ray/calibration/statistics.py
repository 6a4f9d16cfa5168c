"""Look once, decide many times: calibration statistics, and the scales that any setting makes of them.

    batches -> float model, every activation tensor observed -> CalibrationStatistics     (seconds to minutes)
    CalibrationStatistics × QuantSetting -> amax of every site -> applied to the model    (milliseconds)

Statistics are histograms per tensor and per segment of batches. A segment ends at each batch count for which amax
is wanted (a snapshot); what was seen after n batches is the sum of the segments up to n. Sums are exact, so
statistics collected by several workers, whole batches each, merge to what one worker would have collected.
"""

from __future__ import annotations

import bisect
import io
import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError, QuantSetting, parse_calibrator
from vitq_ray.calibration.calibrators import Amax, entropy_amax, max_amax, mse_amax, noise_to_signal, percentile_amax
from vitq_ray.calibration.histogram import Histogram, StatisticsError
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.sites import FAMILY_TENSORS, MODES, SITES, WEIGHT, site_key
from vitq_ray.quant.vit import apply_amax, observing, quant_blocks, site_amax, tensor_keys, weight_scales

_FORMAT = 1


@dataclass(frozen=True)
class CalibrationStatistics:
    """Histograms of every activation tensor of the float model.

    Attributes:
        keys: full names of the tensors (see `vit.tensor_keys`).
        snapshots: numbers of batches at which amax can be asked for, ascending.
        segments: [snapshot][tensor] histograms of the batches between the previous snapshot and this one.
        batches: [snapshot] number of batches counted in each segment; a worker's share has fewer than all.
    """

    keys: tuple[str, ...]
    snapshots: tuple[int, ...]
    segments: tuple[tuple[Histogram, ...], ...]
    batches: tuple[int, ...]

    def __post_init__(self) -> None:
        check_snapshots(self.snapshots)
        assert [len(row) for row in self.segments] == [len(self.keys)] * len(self.snapshots)

    def after(self, num_batches: int) -> tuple[Histogram, ...]:
        """Histograms of the first `num_batches` batches, one per key; it must be one of the snapshots."""
        if num_batches not in self.snapshots:
            known = ", ".join(map(str, self.snapshots))
            raise InputError(f"number of calibration batches: {num_batches} was not collected, only {known}")
        end = self.snapshots.index(num_batches) + 1
        if sum(self.batches[:end]) != num_batches:
            raise StatisticsError(f"{sum(self.batches[:end])} of the first {num_batches} batches were counted")
        rows = self.segments[:end]
        return tuple(reduce(Histogram.merge, column) for column in zip(*rows, strict=True))

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """Statistics of both sets of batches. Same model, same snapshots and same bin widths are required."""
        if (self.keys, self.snapshots) != (other.keys, other.snapshots):
            raise StatisticsError("statistics of different tensors or snapshots cannot be merged")
        rows = zip(self.segments, other.segments, strict=True)
        return CalibrationStatistics(
            self.keys,
            self.snapshots,
            tuple(tuple(a.merge(b) for a, b in zip(mine, theirs, strict=True)) for mine, theirs in rows),
            tuple(a + b for a, b in zip(self.batches, other.batches, strict=True)),
        )

    def widths(self) -> dict[str, float]:
        """Bin width of every tensor: what other workers need before they can observe."""
        return {key: h.width for key, h in zip(self.keys, self.segments[0], strict=True)}

    def to_bytes(self) -> bytes:
        """An `.npz` with the counts of all histograms end to end; no pickle inside."""
        flat = list(itertools.chain.from_iterable(self.segments))
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            format=np.array(_FORMAT),
            keys=np.array(self.keys),
            snapshots=np.array(self.snapshots, np.int64),
            batches=np.array(self.batches, np.int64),
            widths=np.array([h.width for h in self.segments[0]], np.float64),
            max=np.array([h.max for h in flat], np.float64),
            bins=np.array([len(h.counts) for h in flat], np.int64),
            counts=np.concatenate([h.counts for h in flat]),
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> CalibrationStatistics:
        """The inverse of `to_bytes`. InputError where the bytes are not that."""
        try:
            return CalibrationStatistics._parse(data)
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"statistics: not a readable statistics file: {error}") from None

    @staticmethod
    def _parse(data: bytes) -> CalibrationStatistics:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if int(arrays["format"]) != _FORMAT:
                raise InputError(f"statistics: format {arrays['format']} found, {_FORMAT} expected")
            keys = tuple(map(str, arrays["keys"]))
            widths, maxima = arrays["widths"], arrays["max"]
            parts = np.split(arrays["counts"], np.cumsum(arrays["bins"])[:-1])
            snapshots, batches = (tuple(map(int, arrays[name])) for name in ("snapshots", "batches"))
        histograms = [
            Histogram(float(widths[i % len(keys)]), counts, float(maxima[i])) for i, counts in enumerate(parts)
        ]
        rows = tuple(tuple(histograms[i : i + len(keys)]) for i in range(0, len(histograms), len(keys)))
        return CalibrationStatistics(keys, snapshots, rows, batches)


def check_snapshots(snapshots: Sequence[int]) -> None:
    """Raise InputError unless the batch counts are positive and strictly ascending."""
    if not snapshots or snapshots[0] < 1 or list(snapshots) != sorted(set(snapshots)):
        raise InputError(f"snapshots: expected ascending batch counts from 1 on, got {list(snapshots)}")


def collect_statistics(
    model: nn.Module,
    batches: Iterable[tuple[int, Tensor]],
    snapshots: Sequence[int],
    widths: Mapping[str, float] | None = None,
    on_batch: Callable[[int, Tensor], None] = lambda index, logits: None,
) -> CalibrationStatistics:
    """Run the float model over calibration batches and count every activation tensor.

    Args:
        model: from `quantize_vit`; its quantizers are off meanwhile and dropout is inactive.
        batches: (batch index, images (B, 3, S, S) as the model takes them). Indices say which segment a batch
            belongs to; they may come in any order once `widths` are given, else index 0 must be the first.
        snapshots: batch counts at which amax will be wanted; the last one is the number of batches.
        widths: bin widths from the statistics of batch 0, for workers that do not see that batch.
        on_batch: sees the index of every batch and the float model's logits, for progress and sanity checks.

    Raises:
        StatisticsError: naming the site that has non-finite values, or zeros only in the first batch.
    """
    check_snapshots(snapshots)
    keys = tensor_keys(model)
    known = dict(widths or {})
    table: dict[tuple[int, str], Histogram] = {}
    seen: list[int] = []
    with _eval_mode(model), torch.inference_mode():
        for index, images in batches:
            segment = _segment_of(index, snapshots)
            with observing(model, {key: _observer(key, segment, table, known) for key in keys}):
                logits = model(images)
            seen.append(segment)
            on_batch(index, logits)
    if not known:
        raise InputError("calibration: no images, at least one batch is needed")
    rows = ((table.get((s, key)) or Histogram.empty(known[key]) for key in keys) for s in range(len(snapshots)))
    counted = tuple(seen.count(segment) for segment in range(len(snapshots)))
    return CalibrationStatistics(keys, tuple(snapshots), tuple(tuple(row) for row in rows), counted)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


def _segment_of(index: int, snapshots: Sequence[int]) -> int:
    if index >= snapshots[-1]:
        raise ValueError(f"batch {index} is past the last snapshot, {snapshots[-1]} batches")
    return bisect.bisect_right(snapshots, index)


def _observer(
    key: str, segment: int, table: dict[tuple[int, str], Histogram], widths: dict[str, float]
) -> Callable[[Tensor], None]:
    def observe(x: Tensor) -> None:
        try:
            seen = Histogram.observe(x, widths.get(key))
        except StatisticsError as error:
            raise StatisticsError(f"{key}: {error}") from None
        widths[key] = seen.width
        earlier = table.get((segment, key))
        table[segment, key] = seen if earlier is None else earlier.merge(seen)

    return observe


# (histograms, percentile, bits) -> amax of each
CALIBRATORS: dict[str, Callable[[Sequence[Histogram], float | None, int], Amax]] = {
    "max": lambda histograms, percentile, bits: max_amax(histograms),
    "percentile": lambda histograms, percentile, bits: percentile_amax(histograms, [_given(percentile)])[0],
    "mse": lambda histograms, percentile, bits: mse_amax(histograms, bits),
    "entropy": lambda histograms, percentile, bits: entropy_amax(histograms, bits),
}


def _given(percentile: float | None) -> float:
    assert percentile is not None  # QuantSetting has checked it
    return percentile


class Scales:
    """The amax of every site for any setting, from statistics and weights; what settings share is computed once."""

    def __init__(self, model: nn.Module, statistics: CalibrationStatistics) -> None:
        self._model = model
        self._statistics = statistics
        self._depth = len(quant_blocks(model))
        self._histograms = cache(statistics.after)
        self._calibrated = cache(self._calibrate)
        self._weights = cache(self._weigh)

    def of(self, setting: QuantSetting) -> dict[str, Tensor]:
        """{site name: amax} of every site: () for tensors, (rows, 1) for weights in modes that have them so."""
        bits = setting.weight_bits if setting.weights != "max" else 8  # max|w| knows no bits
        weights = self._weights(setting.mode, setting.weights, bits)
        return site_amax(self._tensors(setting), weights, MODES[setting.mode], self._depth)

    def _tensors(self, setting: QuantSetting) -> dict[str, Tensor]:
        """{tensor name: amax, shape (), float32}."""
        n, bits = setting.num_batches, setting.act_bits
        amax = dict(self._calibrated(setting.calibrator, setting.percentile, n, bits))
        for family, text in setting.family_calibrators.items():
            own = self._calibrated(*parse_calibrator(text, family), n, bits)
            names = [site_key(i, tensor) for i in range(self._depth) for tensor in FAMILY_TENSORS[family]]
            amax |= {name: own[name] for name in names}
        return amax

    def _calibrate(self, calibrator: str, percentile: float | None, num_batches: int, bits: int) -> dict[str, Tensor]:
        values = CALIBRATORS[calibrator](self._histograms(num_batches), percentile, bits)
        return dict(zip(self._statistics.keys, torch.from_numpy(values).float().unbind(), strict=True))

    def _weigh(self, mode: str, calibrator: str, bits: int) -> dict[str, Tensor]:
        return weight_scales(self._model, MODES[mode], calibrator, bits)


def setting_amax(model: nn.Module, statistics: CalibrationStatistics, setting: QuantSetting) -> dict[str, Tensor]:
    """{site name: amax} of every site, for one setting; as `Scales.of`."""
    return Scales(model, statistics).of(setting)


def apply_setting(model: nn.Module, statistics: CalibrationStatistics, setting: QuantSetting) -> dict[str, Tensor]:
    """Quantize the model with one setting; returns the amax of every site."""
    amax = setting_amax(model, statistics, setting)
    apply_amax(model, amax, setting.mode, setting.weight_bits, setting.act_bits)
    return amax


def predicted_noise(
    model: nn.Module, statistics: CalibrationStatistics, setting: QuantSetting, amax: Mapping[str, Tensor]
) -> float:
    """Sum over the quantized sites of noise over signal power: small for settings that promise to do well.

    A forecast from histograms and weights, without an image: it puts candidates in order, it decides nothing.
    `amax` is what `setting_amax` gives.
    """
    mode = MODES[setting.mode]
    histograms = dict(zip(statistics.keys, statistics.after(setting.num_batches), strict=True))
    total = 0.0
    for index, block in enumerate(quant_blocks(model)):
        sites = [site for site in SITES if mode.quantizes(site) and site.family != WEIGHT]
        seen = [histograms[site_key(index, site.tensor)] for site in sites]
        scales = np.array([float(amax[site_key(index, site.name)]) for site in sites])
        total += float(noise_to_signal(seen, scales, setting.act_bits).sum())
        for name, weight in block.weights().items():
            scale = amax[site_key(index, name)].to(weight.device)
            error = fake_quantize(weight.detach(), scale, setting.weight_bits, mode.weight_axis) - weight.detach()
            total += float(error.square().sum() / weight.detach().square().sum())
    return total


def degenerate_sites(amax: Mapping[str, Tensor]) -> list[str]:
    """Sites with an amax of 0 (in any channel): they quantize to zeros."""
    return [key for key, value in amax.items() if bool((value == 0).any())]
