"""The calibration pass: one look of the float model at exactly n full batches of images.

    batches ──► full ones, numbered ──► collect: here, or on workers ──► statistics
                                            └─► logits ──► how well the float model does on these images

Who collects is a callable, so that this needs no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.statistics import HISTOGRAM, CalibrationStatistics, collect_statistics
from vitq_ray.data.loader import Batch
from vitq_ray.measure.evaluation import Evaluation

Numbered = Iterator[tuple[int, Batch]]
ToInput = Callable[[Tensor], Tensor]  # uint8 (B, S, S, 3) -> what the model takes, on its device
OnLogits = Callable[[int, Tensor], None]  # (number of the batch, logits (B, classes)), in the order of the batches
# (model, numbered batches, snapshots, to_input, on_logits, kinds of statistics) -> statistics of all batches
Collect = Callable[[nn.Module, Numbered, Sequence[int], ToInput, OnLogits, Iterable[str]], CalibrationStatistics]


@dataclass(frozen=True)
class CalibrationPass:
    """What a pass has seen; `evaluation` is the float model on the calibration images, in the order of the batches."""

    statistics: CalibrationStatistics
    evaluation: Evaluation

    @property
    def sample_ids(self) -> npt.NDArray[np.int64]:
        """The images that were used, (n · batch size,)."""
        return self.evaluation.sample_ids


def collect_here(
    model: nn.Module,
    batches: Numbered,
    snapshots: Sequence[int],
    to_input: ToInput,
    on_logits: OnLogits,
    kinds: Iterable[str] = (HISTOGRAM,),
) -> CalibrationStatistics:
    """Statistics collected in this process."""
    inputs = ((index, to_input(batch.images)) for index, batch in batches)
    return collect_statistics(model, inputs, snapshots, on_batch=on_logits, kinds=kinds)


def first_images(batches: Iterable[Batch], to_input: ToInput, count: int) -> Tensor:
    """Up to `count` images as the model takes them, (B, 3, S, S); InputError where there is none."""
    parts: list[Tensor] = []
    for batch in batches:
        if len(batch.labels):
            parts.append(to_input(batch.images))
        if sum(map(len, parts)) >= count:
            break
    if not parts:
        raise InputError("calibration: no readable image")
    return torch.cat(parts)[:count]


def calibration_pass(
    model: nn.Module,
    batches: Iterable[Batch],
    batch_size: int,
    snapshots: Sequence[int],
    to_input: ToInput,
    collect: Collect = collect_here,
    on_batch: Callable[[], None] = lambda: None,
    kinds: Iterable[str] = (HISTOGRAM,),
    bad_images: Sequence[tuple[str, str]] = (),
) -> CalibrationPass:
    """Calibration statistics of exactly `snapshots[-1]` batches of `batch_size` images.

    Args:
        model: from `quantize_vit`; its quantizers are off meanwhile.
        batches: more than are needed do no harm; a smaller one, as the last may be, is passed over.
        snapshots: batch counts at which scales will be wanted, ascending.
        collect: where the statistics are collected.
        on_batch: called after every batch.
        kinds: what is collected, as in `collect_statistics`.
        bad_images: the list that the reader of `batches` adds broken images to, for the message.

    Raises:
        InputError: where fewer full batches can be read.
    """
    wanted = snapshots[-1]
    seen: list[tuple[Tensor, Tensor]] = []  # labels and sample ids of every batch
    judged: list[Evaluation] = []

    def full() -> Numbered:
        whole = (batch for batch in batches if len(batch.labels) == batch_size)
        for index, batch in enumerate(itertools.islice(whole, wanted)):
            seen.append((batch.labels, batch.sample_ids))
            yield index, batch

    def judge(index: int, logits: Tensor) -> None:
        judged.append(Evaluation.of_logits(logits, *seen[index]))
        on_batch()

    numbered = full()
    first = next(numbered, None)
    if first is not None:
        statistics = collect(model, itertools.chain([first], numbered), snapshots, to_input, judge, kinds)
    if first is None or len(seen) < wanted:
        broken = f"; {len(dict(bad_images))} broken ones were skipped" if bad_images else ""
        raise InputError(
            f"calibration: {wanted} batches of {batch_size} asked for, the readable images make {len(seen)}{broken}"
        )
    return CalibrationPass(statistics, Evaluation.concatenate(judged))
