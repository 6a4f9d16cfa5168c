"""Whole batches on several workers: calibration statistics and evaluation that do not depend on how many there are.

    batches, in order ──► the worker that is free ──► its statistics or results ──► merged, or put in order

A batch is computed whole, by one worker, with a fixed number of threads, and what comes back is integers, or sums that
are merged in order. So two workers, or eight, give bit for bit what one gives. Workers hold no state but the model: one
that dies is started again, and its batch is computed again.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.device import device_for
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.data.loader import Batch
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, Execution
from vitq_ray.measure.calibration import Collect, Numbered, OnLogits, ToInput, collect_here
from vitq_ray.measure.evaluation import Evaluation, evaluate

T = TypeVar("T")
PROCESS_BYTES = 500_000_000  # a worker process with PyTorch and Ray, before it holds a model
_log = logging.getLogger("vitq_ray")
_QUEUED = 2  # batches handed to a worker at a time: one to compute, one to go on with


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with `count` threads for as long as the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class BatchWorker:
    """One process with a model of its own."""

    def __init__(
        self,
        model: nn.Module,
        transform: EvalTransform,
        threads: int,
        use_gpu: bool,
        engine: Engine | None,
        float_model: nn.Module | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self._device = device_for(use_gpu)
        # A copy: what comes from the object store is read-only memory.
        self._model = copy.deepcopy(model).to(self._device).eval()
        self._run = self._model if engine is None else Execution(self._model, engine)
        self._float = None if float_model is None else copy.deepcopy(float_model).to(self._device).eval()
        self._transform = transform

    def _input(self, images: Tensor) -> Tensor:
        return self._transform.normalize(images.clone().to(self._device))

    def observe(
        self, index: int, batch: Batch, snapshots: Sequence[int], widths: dict[str, float], kinds: tuple[str, ...]
    ) -> tuple[CalibrationStatistics, Tensor]:
        """Statistics of one calibration batch, and the float model's logits (B, classes)."""
        logits: list[Tensor] = []
        inputs = [(index, self._input(batch.images))]
        keep = lambda _, y: logits.append(y.cpu())  # noqa: E731
        statistics = collect_statistics(self._model, inputs, snapshots, widths, keep, kinds)
        return statistics, logits[0]

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments)"""
        return function(self._model, *map(_writable, arguments))

    def classify(self, batch: Batch) -> tuple[Evaluation, Tensor]:
        """What every image of a batch came to, and the logits (B, classes)."""
        logits: list[Tensor] = []
        ours = Batch(batch.images, batch.labels.clone(), batch.sample_ids.clone())
        evaluation = evaluate(self._run, [ours], self._input, lambda _, y: logits.append(y.cpu()), self._float)
        return evaluation, logits[0]


def _writable(value: Any) -> Any:
    """A copy of a tensor: what comes from the object store is read-only memory."""
    return value.clone() if isinstance(value, Tensor) else value


class WorkerPool:
    """Several `BatchWorker`s; needs a running Ray. Close it, or the workers keep their CPUs."""

    def __init__(
        self,
        model: nn.Module,
        transform: EvalTransform,
        count: int,
        threads: int = 1,
        num_gpus: float = 0.0,
        engine: Engine | None = None,
        float_model: nn.Module | None = None,
        more_bytes: int = 0,
    ) -> None:
        """`engine` runs a quantized model; None runs the model as it is. `float_model` is what it is compared with;
        `more_bytes` of memory a worker needs beside models.

        Raises InputError where the cluster cannot hold `count` workers at once.
        """
        cpus = ray.cluster_resources().get("CPU", 0.0)
        share = min(float(threads), cpus / count)
        _require_gpus(count * num_gpus)
        models = [model] if float_model is None else [model, float_model]
        model_bytes = sum(p.numel() * p.element_size() for m in models for p in m.parameters())
        require_memory(count, PROCESS_BYTES + model_bytes + more_bytes, ray_nodes())
        if count * threads > cpus:
            _log.warning("%d workers of %d threads share %g CPUs, and are no faster than fewer", count, threads, cpus)
        actor = ray.remote(
            num_cpus=round(share / 2, 3),  # half: Ray Data's readers need CPUs, too
            num_gpus=num_gpus,
            max_restarts=3,
            max_task_retries=3,
        )(BatchWorker)
        shared = [ray.put(copy.deepcopy(m).cpu()) for m in models]
        self._workers: list[Any] = [
            actor.remote(shared[0], transform, threads, num_gpus > 0, engine, *shared[1:]) for _ in range(count)
        ]

    def map(self, method: str, items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of `method(*item)` in the order of the items; no more than two items a worker are under way."""
        waiting: deque[ray.ObjectRef[Any]] = deque()
        load = dict.fromkeys(range(len(self._workers)), 0)
        owner: dict[ray.ObjectRef[Any], int] = {}
        try:
            for item in items:
                if len(owner) >= _QUEUED * len(self._workers):
                    _release(owner, load)
                i = min(load, key=lambda k: load[k])
                ref = getattr(self._workers[i], method).remote(*item)
                owner[ref], load[i] = i, load[i] + 1
                waiting.append(ref)
                while waiting and waiting[0] not in owner:
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _release(owner: dict[ray.ObjectRef[Any], int], load: dict[int, int]) -> None:
    """Wait until a batch is done; its worker is free for another."""
    done, _ = ray.wait(list(owner), num_returns=1)
    for ref in done:
        load[owner.pop(ref)] -= 1


def _require_gpus(needed: float) -> None:
    have = ray.cluster_resources().get("GPU", 0.0)
    if needed > have:
        raise InputError(f"workers: {needed:g} GPUs needed, the cluster has {have:g}")


def ray_nodes() -> list[dict[str, float]]:
    """Resources of every living node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def require_memory(count: int, bytes_each: int, nodes: list[dict[str, float]]) -> None:
    """InputError where the nodes cannot hold so many workers of so many bytes."""
    fit = sum(int(node.get("memory", 0) // bytes_each) for node in nodes)
    if fit < count:
        raise InputError(
            f"workers: {count} workers of about {bytes_each / 1e9:.1f} GB each do not fit into memory; {fit} would"
        )


def _cause(error: ray.exceptions.RayTaskError) -> Exception:
    """What went wrong on the worker, without Ray's account of the way it came here."""
    cause = error.cause
    return cause if isinstance(cause, InputError) else error


def collect_on(
    pool: WorkerPool,
    batches: Iterable[tuple[int, Batch]],
    snapshots: Sequence[int],
    first: CalibrationStatistics,
    on_batch: Callable[[int, Tensor], None] = lambda index, logits: None,
) -> CalibrationStatistics:
    """Statistics of all batches, from those of batch 0 (`first`) and the others, which `batches` has.

    `on_batch` sees the index of every batch and the float model's logits, as in `statistics.collect_statistics`.
    """
    widths = ray.put(first.widths())
    indices: list[int] = []

    def items() -> Iterator[tuple[Any, ...]]:
        for index, batch in batches:
            indices.append(index)
            yield index, batch, tuple(snapshots), widths, tuple(first.kinds)

    statistics = first
    for i, (part, logits) in enumerate(pool.map("observe", items())):
        statistics = statistics.merge(part)
        on_batch(indices[i], logits)
    return statistics


def collect_with(pool_of: Callable[[nn.Module], WorkerPool], threads: int = 1) -> Collect:
    """How a `calibration_pass` collects on workers: batch 0 here, since it sets the bin widths, the others there.

    `pool_of` is asked once batch 0 is done, and its owner closes the pool; `threads` is what a worker computes with.
    """

    def collect(
        model: nn.Module,
        batches: Numbered,
        snapshots: Sequence[int],
        to_input: ToInput,
        on_logits: OnLogits,
        kinds: Iterable[str],
    ) -> CalibrationStatistics:
        with torch_threads(threads):
            first = collect_here(model, itertools.islice(batches, 1), snapshots, to_input, on_logits, kinds)
        return collect_on(pool_of(model), batches, snapshots, first, on_logits)

    return collect


class SharedPool:
    """One pool for several passes over one model, opened for the first. Close it."""

    def __init__(self, open_pool: Callable[[nn.Module], WorkerPool]) -> None:
        self._open = open_pool
        self._pool: WorkerPool | None = None

    def of(self, model: nn.Module) -> WorkerPool:
        """The workers; `model` is the same each time."""
        if self._pool is None:
            self._pool = self._open(model)
        return self._pool

    def spread(self, function: Callable[..., Any], model: nn.Module, items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """function(model, *item) of every item, on the workers; the results in order."""
        return self.of(model).map("apply", ((function, *item) for item in items))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def __enter__(self) -> SharedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluate_on(
    pool: WorkerPool,
    batches: Iterable[Batch],
    on_batch: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
) -> Evaluation:
    """As `evaluation.evaluate`, batch for batch, on the workers of a pool."""
    kept: deque[Batch] = deque()

    def items() -> Iterator[tuple[Batch]]:
        for batch in batches:
            kept.append(batch)
            yield (batch,)

    parts = []
    for part, logits in pool.map("classify", items()):
        parts.append(part)
        on_batch(kept.popleft(), logits)
    return Evaluation.concatenate(parts)
