"""Passes over images in this process or on Ray workers, whose results are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.cpus import available_cpus
from vitq_ray.base.files import atomic_file
from vitq_ray.calibration.sensitivity import PARTS, Spread, here, moment_bytes
from vitq_ray.cluster.start import cluster
from vitq_ray.cluster.workers import SharedPool, WorkerPool, collect_with, evaluate_on, torch_threads
from vitq_ray.commands.options import CalibrateOptions, EvaluateOptions, WorkerOptions
from vitq_ray.commands.screen import Screen
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import SampleIndex
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, evaluation_batch, executed, find_engine
from vitq_ray.measure.calibration import Collect, ToInput, collect_here
from vitq_ray.measure.evaluation import Evaluation, evaluate


@dataclass(frozen=True)
class Workers:
    """How many workers, with how many threads each, on GPUs or not; None: this process."""

    count: int | None
    threads: int = 1
    gpus: float = 0.0

    @property
    def torch_threads(self) -> int:
        """Threads that PyTorch and the engines have where the model runs."""
        return torch.get_num_threads() if self.count is None else self.threads

    def pool(
        self,
        model: nn.Module,
        transform: EvalTransform,
        engine: Engine | None = None,
        float_model: nn.Module | None = None,
        more_bytes: int = 0,
    ) -> WorkerPool:
        """The workers, with the models as they are now. Ray is running."""
        assert self.count is not None
        return WorkerPool(model, transform, self.count, self.threads, self.gpus, engine, float_model, more_bytes)


IN_THIS_PROCESS = Workers(None)


def engine_for(name: str, model: nn.Module, img_size: int, device: torch.device, workers: Workers) -> Engine:
    """As `find_engine`, measured with the threads that each worker has."""
    with torch_threads(workers.torch_threads):
        return find_engine(name, model, img_size, device)


def workers_of(options: WorkerOptions, use_gpu: bool) -> Workers:
    return Workers(options.num_workers, options.threads_per_worker, 1.0 if use_gpu else 0.0)


def ray_for(options: WorkerOptions) -> AbstractContextManager[Any]:
    """Ray, where there are workers."""
    return nullcontext() if options.num_workers is None else cluster(options.ray_address, dashboard=False)


@dataclass(frozen=True)
class Looking:
    """How a model is looked at: `collect` its statistics, and `spread` the parts of the images that gradients are
    taken of."""

    collect: Collect
    spread: Spread


@contextmanager
def looking(workers: Workers, transform: EvalTransform, gradients: bool) -> Iterator[Looking]:
    """In this process, or on workers, which stay for all passes over one model. Gradients are taken there, too, unless
    this process has more CPUs than the workers that have a part of the images."""
    if workers.count is None:
        yield Looking(collect_here, here)
        return
    spread = gradients and (workers.gpus > 0 or min(workers.count, PARTS) * workers.threads >= available_cpus())

    def open_pool(model: nn.Module) -> WorkerPool:
        return workers.pool(model, transform, more_bytes=2 * moment_bytes(model) if spread else 0)

    with SharedPool(open_pool) as shared:
        yield Looking(collect_with(shared.of, workers.threads), shared.spread if spread else here)


OnBatch = Callable[[Batch, Tensor], None]  # (batch, its logits)


def ignore(batch: Batch, logits: Tensor) -> None:
    """For who wants no logits."""


def evaluation_pass(
    model: nn.Module,
    batches: Iterable[Batch],
    to_input: ToInput,
    transform: EvalTransform,
    workers: Workers,
    engine: Engine | None = None,
    on_batch: OnBatch = ignore,
    float_model: nn.Module | None = None,
) -> Evaluation:
    """Classify every image, a quantized model by an engine; the same counts, however many workers there are.

    `float_model` is what the model is compared with, where it is.
    """
    if workers.count is None:
        with nullcontext(model) if engine is None else executed(model, engine) as run:
            return evaluate(run, batches, to_input, on_batch, float_model)
    with workers.pool(model, transform, engine, float_model) as pool:
        return evaluate_on(pool, batches, on_batch)


@dataclass(frozen=True)
class ValImages:
    """What is evaluated, and how it is prepared.

    Attributes:
        ids: which images of `index`, in order.
        to_input: uint8 (B, S, S, 3) -> what the model takes, on its device.
        bad_images: (address, reason) of every broken image met, appended to.
    """

    index: SampleIndex
    ids: range
    transform: EvalTransform
    device: torch.device
    to_input: ToInput
    bad_images: list[tuple[str, str]]


def evaluate_val(
    model: nn.Module,
    images: ValImages,
    options: CalibrateOptions | EvaluateOptions,
    screen: Screen,
    engine: Engine | None = None,
    on_batch: OnBatch = ignore,
    float_model: nn.Module | None = None,
) -> Evaluation:
    """Classify images of val, here or on workers, with progress shown; compared with `float_model` where there is one.

    Raises InputError where none can be read.
    """
    workers = workers_of(options, options.use_gpu)
    # As many images for every thread: an engine's threads take images of their own.
    many = evaluation_batch(model, images.device) * workers.torch_threads
    size, transform = options.batch_size or min(many, 100), images.transform
    batches = iter_batches(
        images.index, images.ids, transform, size, options.decode_threads, options.on_bad_image, images.bad_images
    )
    shown = screen.track(batches, -(-len(images.ids) // size), "evaluate")
    evaluation = evaluation_pass(model, shown, images.to_input, transform, workers, engine, on_batch, float_model)
    if evaluation.images == 0:
        raise InputError(f"{options.data_path}: no readable image in val")
    return evaluation


class KeptLogits:
    """Collects logits to be saved."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        self._parts.append((logits.float().cpu(), batch.labels, batch.sample_ids))

    def logits(self) -> Tensor:
        """(N, classes)"""
        return torch.cat([logits for logits, _, _ in self._parts])

    def save(self, path: Path) -> None:
        """Arrays `logits` (N, classes), `labels` and `sample_id`."""
        logits, labels, ids = (torch.cat(column).numpy() for column in zip(*self._parts, strict=True))
        with atomic_file(path) as stream:
            np.savez(stream, logits=logits, labels=labels, sample_id=ids)
