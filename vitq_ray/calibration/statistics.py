"""Look once, decide many times: what the float model's activations look like, from one pass over calibration images.

    batches -> float model, every activation tensor observed -> CalibrationStatistics     (seconds to minutes)

What is kept of a tensor is declared by who needs it: a calibrator's row, the noise forecast. `STATISTICS` is the table
of what can be kept; the pass collects the union of what was asked for.

Statistics are values per tensor and per segment of batches. A segment ends at each batch count for which amax is wanted
(a snapshot); what was seen after n batches is the sum of the segments up to n. Sums are exact, so statistics collected
by several workers, whole batches each, merge to what one worker would have collected.
"""

from __future__ import annotations

import bisect
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line
from vitq_ray.base.formats import require_format, stamp
from vitq_ray.base.records import own_error
from vitq_ray.calibration.histogram import Histogram, Later, Range, StatisticsError
from vitq_ray.quant.vit import observing, tensor_keys

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Statistic:
    """One row of the table of what can be kept of a tensor. Its values have an exact `merge`.

    Attributes:
        observe: (one batch of a tensor, bin width or None for the first batch) -> value.
        empty: bin width -> the value of no batch.
        width_of: bin width that later batches must share; 0 where there is none.
        later: as `observe`, for a tensor on an accelerator, without waiting for it; None where there is no such way.
        pack, unpack: values, in order -> arrays, and back; `unpack` gets the width of each value.
    """

    observe: Callable[[Tensor, float | None], Any]
    empty: Callable[[float], Any]
    width_of: Callable[[Any], float]
    pack: Callable[[Sequence[Any]], Arrays]
    unpack: Callable[[Mapping[str, npt.NDArray[Any]], Sequence[float]], list[Any]]
    later: Callable[[Tensor, float | None], Later[Any]] | None = None


def _pack_ranges(values: Sequence[Range]) -> Arrays:
    return {"low": np.array([v.low for v in values]), "high": np.array([v.high for v in values])}


def _unpack_ranges(arrays: Mapping[str, npt.NDArray[Any]], widths: Sequence[float]) -> list[Range]:
    return [Range(float(low), float(high)) for low, high in zip(arrays["low"], arrays["high"], strict=True)]


def _pack_histograms(values: Sequence[Histogram]) -> Arrays:
    """The counts of all histograms end to end."""
    arrays = {
        "max": np.array([h.max for h in values], np.float64),
        "bins": np.array([len(h.counts) for h in values], np.int64),
        "counts": np.concatenate([h.counts for h in values]),
    }
    signed = [(h.negative, h.range) for h in values if h.negative is not None and h.range is not None]
    if len(signed) == len(values):
        arrays |= {"negative": np.concatenate([negative for negative, _ in signed])}
        arrays |= _pack_ranges([seen for _, seen in signed])
    return arrays


def _unpack_histograms(arrays: Mapping[str, npt.NDArray[Any]], widths: Sequence[float]) -> list[Histogram]:
    ends = np.cumsum(arrays["bins"])[:-1]
    parts = np.split(arrays["counts"], ends)
    rows = zip(widths, parts, map(float, arrays["max"]), strict=True)
    if "negative" not in arrays:  # format 1
        return [Histogram(*row) for row in rows]
    more = zip(np.split(arrays["negative"], ends), _unpack_ranges(arrays, widths), strict=True)
    return [Histogram(*row, *signs) for row, signs in zip(rows, more, strict=True)]


HISTOGRAM, RANGE = "histogram", "range"
STATISTICS: dict[str, Statistic] = {
    HISTOGRAM: Statistic(
        Histogram.observe,
        Histogram.empty,
        lambda h: h.width,
        _pack_histograms,
        _unpack_histograms,
        Histogram.observe_later,
    ),
    RANGE: Statistic(
        lambda x, width: Range.observe(x),
        lambda width: Range.empty(),
        lambda r: 0.0,
        _pack_ranges,
        _unpack_ranges,
        Range.observe_later,
    ),
}


@dataclass(frozen=True)
class CalibrationStatistics:
    """What was seen of every activation tensor of the float model.

    Attributes:
        keys: full names of the tensors (see `vit.tensor_keys`).
        snapshots: numbers of batches at which amax can be asked for, ascending.
        kinds: {key of `STATISTICS`: [snapshot][tensor] values of the batches since the previous snapshot}.
        batches: [snapshot] number of batches counted in each segment; a worker's share has fewer than all.
    """

    keys: tuple[str, ...]
    snapshots: tuple[int, ...]
    kinds: Mapping[str, tuple[tuple[Any, ...], ...]]
    batches: tuple[int, ...]

    def __post_init__(self) -> None:
        check_snapshots(self.snapshots)
        for rows in self.kinds.values():
            if [len(row) for row in rows] != [len(self.keys)] * len(self.snapshots):
                raise StatisticsError("statistics: not one value for every tensor and snapshot")

    def after(self, num_batches: int, kind: str = HISTOGRAM) -> tuple[Any, ...]:
        """What the first `num_batches` batches, one of the snapshots, showed of each tensor: one value per key.

        A histogram knows its range: where histograms were kept, they stand for ranges.
        """
        if num_batches not in self.snapshots:
            known = ", ".join(map(str, self.snapshots))
            raise InputError(f"number of calibration batches: {num_batches} was not collected, only {known}")
        end = self.snapshots.index(num_batches) + 1
        if sum(self.batches[:end]) != num_batches:
            raise StatisticsError(f"{sum(self.batches[:end])} of the first {num_batches} batches were counted")
        found = kind if kind in self.kinds or kind != RANGE else HISTOGRAM
        if found not in self.kinds:
            raise StatisticsError(f"statistics: no {kind} was collected, only {', '.join(self.kinds)}")
        return tuple(reduce(_merge, column) for column in zip(*self.kinds[found][:end], strict=True))

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """Statistics of both sets of batches. Same model, same kinds and snapshots and same bin widths are required."""
        if (self.keys, self.snapshots, set(self.kinds)) != (other.keys, other.snapshots, set(other.kinds)):
            raise StatisticsError("statistics of different tensors or snapshots cannot be merged")
        merged = {
            kind: tuple(tuple(map(_merge, mine, others)) for mine, others in zip(rows, other.kinds[kind], strict=True))
            for kind, rows in self.kinds.items()
        }
        batches = tuple(a + b for a, b in zip(self.batches, other.batches, strict=True))
        return CalibrationStatistics(self.keys, self.snapshots, merged, batches)

    def widths(self) -> dict[str, float]:
        """Bin width of every tensor: what other workers need before they can observe."""
        first = {kind: rows[0] for kind, rows in self.kinds.items()}
        of_kind = [[STATISTICS[kind].width_of(value) for value in row] for kind, row in first.items()]
        return {key: max(widths) for key, *widths in zip(self.keys, *of_kind, strict=True)}

    def to_bytes(self, of: Mapping[str, str] | None = None) -> bytes:
        """An `.npz`, no pickle inside: for each kind the values of all tensors, segment after segment.

        `of` says what they are statistics of, e.g. fingerprints of the model and of the images.
        """
        arrays: dict[str, Any] = {name: np.array(value) for name, value in stamp("statistics").items()}
        for kind, rows in self.kinds.items():
            packed = STATISTICS[kind].pack([value for row in rows for value in row])
            arrays |= {f"{kind}/{name}": array for name, array in packed.items()}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            kinds=np.array(list(self.kinds)),
            keys=np.array(self.keys),
            snapshots=np.array(self.snapshots, np.int64),
            batches=np.array(self.batches, np.int64),
            widths=np.array(list(self.widths().values()), np.float64),
            of=np.array(json.dumps(dict(of or {}), sort_keys=True)),
            **arrays,
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(
        data: bytes, where: str = "statistics", of: Mapping[str, str] | None = None
    ) -> CalibrationStatistics:
        """The inverse of `to_bytes`.

        Raises:
            InputError: with `where` they come from, where the bytes are not that, or, where `of` is given, where they
                are statistics of something else.
        """
        try:
            if not zipfile.is_zipfile(io.BytesIO(data)):
                raise ValueError("no archive of arrays")
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            found = {"format": int(arrays["format"]), "vitq_ray": str(arrays.get("vitq_ray", ""))}
            number = require_format("statistics", where, found)
            there = json.loads(str(arrays["of"])) if number > 2 else {}
            for name, wanted in (of or {}).items():
                if there.get(name) != wanted:
                    raise own_error(where, "statistics", f"are those of other {name} than this run's")
            return CalibrationStatistics._of_arrays(arrays, number)
        except InputError:
            raise
        except Exception as error:  # damaged bytes make zipfile, zlib and NumPy raise nearly anything
            raise own_error(where, "statistics", f"truncated or damaged ({one_line(error)[:200]})") from None

    @staticmethod
    def _of_arrays(arrays: Mapping[str, npt.NDArray[Any]], format_number: int) -> CalibrationStatistics:
        keys = tuple(map(str, arrays["keys"]))
        snapshots, batches = (tuple(map(int, arrays[name])) for name in ("snapshots", "batches"))
        widths = list(map(float, arrays["widths"])) * len(snapshots)
        names = [HISTOGRAM] if format_number == 1 else [str(kind) for kind in arrays["kinds"]]
        kinds = {}
        for kind in names:
            prefix = "" if format_number == 1 else f"{kind}/"
            own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            values = STATISTICS[kind].unpack(own, widths)
            kinds[kind] = tuple(tuple(values[i : i + len(keys)]) for i in range(0, len(values), len(keys)))
        return CalibrationStatistics(keys, snapshots, kinds, batches)


def _merge(a: Any, b: Any) -> Any:
    return a.merge(b)


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
    kinds: Iterable[str] = (HISTOGRAM,),
) -> CalibrationStatistics:
    """Run the float model over calibration batches and observe every activation tensor.

    Args:
        model: from `quantize_vit`; its quantizers are off meanwhile and dropout is inactive.
        batches: (batch index, images (B, 3, S, S) as the model takes them). Indices say which segment a batch
            belongs to; they may come in any order once `widths` are given, else index 0 must be the first.
        snapshots: batch counts at which amax will be wanted; the last one is the number of batches.
        widths: bin widths from the statistics of batch 0, for workers that do not see that batch.
        on_batch: sees the index of every batch and the float model's logits, for progress and sanity checks.
        kinds: what to keep, keys of `STATISTICS`; what settings need is `scales.kinds_needed`.

    Raises:
        StatisticsError: naming the site that has non-finite values.
    """
    check_snapshots(snapshots)
    collector = _Collector(tensor_keys(model), snapshots, tuple(dict.fromkeys(kinds)), dict(widths or {}))
    with _eval_mode(model), torch.inference_mode():
        for index, images in batches:
            with observing(model, collector.observers(index)):
                logits = model(images)
            if outgrown := collector.settle():
                with observing(model, collector.observers_of(outgrown)):
                    model(images)
            on_batch(index, logits)
    return collector.statistics()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """A StatisticsError names the tensor."""
    try:
        yield
    except StatisticsError as error:
        raise StatisticsError(f"{key}: {error}") from None


def _waits(x: Tensor) -> bool:
    """Whether to look at a value of the tensor is to wait for a device."""
    return x.device.type != "cpu"


class _Collector:
    """What one pass has seen so far."""

    def __init__(
        self, keys: tuple[str, ...], snapshots: Sequence[int], kinds: tuple[str, ...], widths: dict[str, float]
    ) -> None:
        self._keys, self._snapshots, self._kinds, self._widths = keys, tuple(snapshots), kinds, widths
        self._values: dict[tuple[str, int, str], Any] = {}  # (kind, segment, tensor)
        self._seen = [0] * len(self._snapshots)
        self._waiting: list[tuple[str, int, str, Later[Any]]] = []  # (kind, segment, tensor, numbers on their way)

    def observers(self, index: int) -> dict[str, Callable[[Tensor], None]]:
        """{tensor: what is called with it} for batch `index`."""
        if index >= self._snapshots[-1]:
            raise ValueError(f"batch {index} is past the last snapshot, {self._snapshots[-1]} batches")
        segment = bisect.bisect_right(self._snapshots, index)
        self._seen[segment] += 1
        return {key: self._observer(key, segment) for key in self._keys}

    def _observer(self, key: str, segment: int) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            width = self._widths.get(key)
            for kind in self._kinds:
                later = STATISTICS[kind].later
                with _naming(key):
                    if later is not None and _waits(x):
                        self._waiting.append((kind, segment, key, later(x, width)))
                    else:
                        self._take(kind, segment, key, STATISTICS[kind].observe(x, width))

        return observe

    def settle(self) -> list[tuple[str, int, str]]:
        """Take over what accelerators counted, all of it in one transfer. Returns (kind, segment, tensor) of what has
        to be observed once more, by waiting for it."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        sizes = [len(numbers) for *_, (numbers, _) in waiting]
        fetched = torch.cat([numbers for *_, (numbers, _) in waiting]).cpu().numpy()
        outgrown = []
        for (kind, segment, key, (_, value)), numbers in zip(
            waiting, np.split(fetched, np.cumsum(sizes)[:-1]), strict=True
        ):
            with _naming(key):
                found = value(numbers)
            if found is None:
                outgrown.append((kind, segment, key))
            else:
                self._take(kind, segment, key, found)
        return outgrown

    def observers_of(self, wanted: Sequence[tuple[str, int, str]]) -> dict[str, Callable[[Tensor], None]]:
        """{tensor: what is called with it} that observes these, and nothing else."""

        def observe(key: str, x: Tensor) -> None:
            for kind, segment, name in wanted:
                if name == key:
                    with _naming(key):
                        self._take(kind, segment, key, STATISTICS[kind].observe(x, self._widths.get(key)))

        return {key: partial(observe, key) for key in self._keys}

    def _take(self, kind: str, segment: int, key: str, value: Any) -> None:
        self._widths[key] = max(self._widths.get(key, 0.0), STATISTICS[kind].width_of(value))
        earlier = self._values.get((kind, segment, key))
        self._values[kind, segment, key] = value if earlier is None else earlier.merge(value)

    def statistics(self) -> CalibrationStatistics:
        if not self._widths:
            raise InputError("calibration: no images, at least one batch is needed")
        kinds = {
            kind: tuple(tuple(self._value(kind, s, key) for key in self._keys) for s in range(len(self._snapshots)))
            for kind in self._kinds
        }
        return CalibrationStatistics(self._keys, self._snapshots, kinds, tuple(self._seen))

    def _value(self, kind: str, segment: int, key: str) -> Any:
        found = self._values.get((kind, segment, key))
        return STATISTICS[kind].empty(self._widths[key]) if found is None else found
