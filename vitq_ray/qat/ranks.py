"""The processes that train together, and who reads which images.

    (seed, epoch) -> permutation of the training images -> global batch of a step -> slice of a rank -> micro-batches

The order is a function of seed and epoch alone; every rank takes its slice of each global batch, so the number of
ranks changes no batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import Ids, SampleIndex
from vitq_ray.data.transforms import EvalTransform, Transform
from vitq_ray.measure.evaluation import Evaluation, evaluate_variants
from vitq_ray.measure.metrics import FLOAT, LABELS, METRICS
from vitq_ray.qat.recipe import QatConfig

EVAL_BATCH = 64  # images of an evaluation micro-batch, whatever the number of workers


@dataclass(frozen=True)
class QatData:
    """Images to train on and to select by. `train_ids` and `selection_ids` are sample ids of the two splits."""

    train: SampleIndex
    train_ids: Ids
    val: SampleIndex
    selection_ids: Ids
    transform: EvalTransform


class Reader(Protocol):
    """Decodes the images of `ids` in order, `batch_size` at a time; a broken image leaves its batch smaller."""

    def __call__(self, index: SampleIndex, ids: Ids, transform: Transform, batch_size: int) -> Iterator[Batch]: ...


def thread_reader(
    num_threads: int = 2, on_bad_image: str = "error", bad_images: list[tuple[str, str]] | None = None
) -> Reader:
    """Reads in this process."""

    def read(index: SampleIndex, ids: Ids, transform: Transform, batch_size: int) -> Iterator[Batch]:
        return iter_batches(index, ids, transform, batch_size, num_threads, on_bad_image, bad_images, move_up=False)

    return read


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; with one, nothing is sent anywhere."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on every rank, on the CPU."""
        if self.world == 1:
            return values.cpu()
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values.cpu()

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def agree(self, first_says: bool) -> bool:
        """What rank 0 says."""
        return bool(self.sum(torch.tensor([int(first_says and self.is_first)])).item())


# Order of images -----------------------------------------------------------------------------------------------------


def steps_per_epoch(num_images: int, config: QatConfig) -> int:
    """Full global batches only: every step has the same number of images. The others have their turn another epoch."""
    steps = num_images // config.global_batch
    if steps == 0:
        raise InputError(
            f"global batch size: {config.global_batch} is more than the {num_images} training images; "
            "choose a smaller batch"
        )
    return steps


def epoch_order(config: QatConfig, epoch: int, ids: Ids) -> Ids:
    """The training images in the order of an epoch (from 0 on): a function of seed and epoch alone."""
    return np.random.default_rng([config.seed, epoch]).permutation(np.asarray(ids, np.int64))


def rank_ids(config: QatConfig, epoch: int, first_step: int, ids: Ids, ranks: Ranks) -> Ids:
    """What one rank trains on from `first_step` of an epoch to its end: its slice of every global batch."""
    steps = steps_per_epoch(len(ids), config)
    order = epoch_order(config, epoch, ids)[: steps * config.global_batch]
    mine = micro_batches(config, ranks)
    return order.reshape(steps, -1, config.micro_batch)[first_step:, mine.start : mine.stop].reshape(-1)


def micro_batches(config: QatConfig, ranks: Ranks) -> range:
    """Which micro-batches of a step fall to this rank: no rank has more than one more than another."""
    count = config.global_batch // config.micro_batch
    if count < ranks.world:
        raise InputError(
            f"global batch size: {config.global_batch} is {count} micro-batches of {config.micro_batch}, too few for "
            f"{ranks.world} workers"
        )
    return range(count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world)


# Evaluation ----------------------------------------------------------------------------------------------------------


def sharded_evaluation(
    model: nn.Module, index: SampleIndex, ids: Ids, transform: EvalTransform, read: Reader, ranks: Ranks
) -> Evaluation:
    """As `sharded_variants`, of one model."""
    return sharded_variants({"model": model}, index, ids, transform, read, ranks)["model"]


def sharded_variants(
    variants: Mapping[str, nn.Module],
    index: SampleIndex,
    ids: Ids,
    transform: EvalTransform,
    read: Reader,
    ranks: Ranks,
) -> dict[str, Evaluation]:
    """Classify images with all ranks: micro-batch i goes to rank i mod world, so the counts are those of one rank.

    The models are in the states to be evaluated in; every image is read once for all of them. Every rank returns the
    results of all images that could be read, in the order of `ids`, which must be distinct.
    """
    ids = np.asarray(ids, np.int64)
    starts = range(ranks.rank * EVAL_BATCH, len(ids), EVAL_BATCH * ranks.world)
    mine = [ids[start : start + EVAL_BATCH] for start in starts]
    for model in variants.values():
        model.eval()
    # One stream of ids; only the last micro-batch of all can be smaller, and its rank sees it last.
    batches = read(index, np.concatenate(mine), transform, EVAL_BATCH) if mine else iter(())
    parts = evaluate_variants(variants, batches, lambda images: transform.normalize(images.to(ranks.device)))

    def measured(name: str) -> list[str]:  # the same on every rank, also on one that has no images
        against = {LABELS, FLOAT} if FLOAT in variants and name != FLOAT else {LABELS}
        return [metric for metric, row in METRICS.items() if row.against in against]

    return {name: _gather(part, measured(name), index, ids, ranks) for name, part in parts.items()}


def _gather(part: Evaluation, names: Sequence[str], index: SampleIndex, ids: Ids, ranks: Ranks) -> Evaluation:
    """The results of all ranks, of these metrics, from those of this one."""
    place = {int(sample_id): i for i, sample_id in enumerate(ids)}
    columns = [place[int(i)] for i in part.sample_ids]
    # Each image is another rank's zero: the sums are exact, those of bool and float32 alike.
    table = torch.zeros(1 + len(names), len(ids), dtype=torch.float64)
    table[0, columns] = 1
    for row, name in enumerate(names, start=1):
        table[row, columns] = torch.from_numpy(part.results[name].astype(np.float64))
    seen, *values = ranks.sum(table).numpy()
    found = seen.astype(bool)
    if not found.any():
        raise InputError(f"{index.source}: none of the {len(ids)} images could be read")
    kept = ids[found]
    columns_of = zip(names, values, strict=True)
    results = {name: column[found].astype(METRICS[name].dtype) for name, column in columns_of}
    return Evaluation(kept, index.labels[kept].astype(np.int64), results)
