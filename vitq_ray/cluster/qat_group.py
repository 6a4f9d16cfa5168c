"""QAT with several workers on Ray Train.

One worker runs `qat.task.run_task` in the calling process: Ray Train's start would cost it 15 to 23 seconds. Several
run the same function as ranks of a TorchTrainer, with gradients averaged by DDP (gloo on CPUs, nccl on GPUs) and
images decoded by Ray Data.

    driver: plan resources -> TorchTrainer.fit in a thread; follow steps.jsonl and epochs.jsonl meanwhile
    rank:   state.pt (if there) -> train_qat -> judge on all of val; rank 0 writes every file

All ranks see the run folder. A worker that dies takes its group with it; Ray Train starts a new one, which goes on
from `state.pt`. An error of the input, or a loss that is no number, would come back: it is left in `failure.json`, for
the new group to stop at and for the driver to raise.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from vitq_ray.base.config import InputError
from vitq_ray.base.device import exact_float32
from vitq_ray.base.files import one_line, write_json
from vitq_ray.cluster.metrics import Metrics
from vitq_ray.cluster.stream import share, stream_batches
from vitq_ray.cluster.workers import PROCESS_BYTES, require_memory
from vitq_ray.data.loader import Batch
from vitq_ray.data.samples import Ids, SampleIndex
from vitq_ray.data.transforms import Transform
from vitq_ray.qat.loop import DivergedError
from vitq_ray.qat.ranks import Ranks, Reader
from vitq_ray.qat.state import EpochReport, QatOutcome, StepReport, read_outcome
from vitq_ray.qat.task import Follower, QatTask, Recorder, run_task
from vitq_ray.run.folder import TRAIN_FOLDER, record_bad_images

MAX_FAILURES = 3
_MOST_STARTS = 18  # of groups in one training, 30 s each (start.py): nine minutes for nodes to come
_COPIES = 5  # of the student's weights: weights, gradients, DDP's buckets, up to two of the optimizer
_SECONDS_BETWEEN_LOOKS = 0.2


class QatMetrics:
    """Ray's metrics of a training run."""

    def __init__(self, run: str) -> None:
        self._metrics = Metrics(run)

    def step(self, report: StepReport) -> None:
        for name in ("epoch", "step", "loss", "images_per_second"):
            self._metrics.set(f"vitq_qat_{name}", float(getattr(report, name)))

    def epoch(self, report: EpochReport) -> None:
        self._metrics.set("vitq_qat_selection_top1", report.selection.top1)


# Workers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainWorkers:
    """How many ranks, on what, and how often the group may be started again.

    Attributes:
        least: with fewer than `count`, but at least so many, training goes on, too; None: with all of them only.
    """

    count: int
    use_gpu: bool = False
    max_failures: int = MAX_FAILURES
    least: int | None = None

    @property
    def needed(self) -> int:
        """So many must fit into the cluster."""
        return self.count if self.least is None else self.least


@dataclass(frozen=True)
class RankResources:
    """What each rank gets: CPUs as Ray counts them (a fraction where ranks outnumber CPUs), and threads."""

    cpus: float
    threads: int
    warning: str | None = None


def rank_resources(workers: TrainWorkers, nodes: list[dict[str, float]], bytes_per_worker: int) -> RankResources:
    """Fit the ranks into the nodes' resources. InputError where GPUs or memory are missing; CPUs are shared out."""
    gpus = sum(math.floor(node.get("GPU", 0)) for node in nodes)
    count = workers.needed
    if workers.use_gpu and gpus < count:
        raise InputError(f"workers: {count} workers need a GPU each, the cluster has {gpus}")
    require_memory(count, bytes_per_worker, nodes)
    cpus = [node.get("CPU", 0) for node in nodes]
    total = sum(math.floor(c) for c in cpus)
    if total >= count:
        return RankResources(1.0, max(1, total // workers.count))
    for parts in range(2, 1000):
        if sum(math.floor(c * parts) for c in cpus) >= count:
            share_of_cpu = math.floor(10_000 / parts) / 10_000  # Ray counts in ten-thousandths
            warning = f"{count} workers share {total} CPUs, one thread each: they will be slower than {total}"
            return RankResources(share_of_cpu, 1, warning)
    raise InputError(f"workers: {count} workers on {total} CPUs; choose fewer")


def worker_bytes(task: QatTask) -> int:
    """Rough memory of one rank, without activations."""
    student = sum(p.numel() * p.element_size() for p in task.start.loaded.model.parameters())
    teacher = 0 if task.teacher is None else sum(p.numel() * p.element_size() for p in task.teacher.parameters())
    return PROCESS_BYTES + _COPIES * student + teacher


def ray_reader(
    train: tuple[str, ray.ObjectRef[SampleIndex]],
    val: tuple[str, ray.ObjectRef[SampleIndex]],
    on_bad_image: str,
    bad_images: list[tuple[str, str]],
    max_tasks: int,
) -> Reader:
    """Reads with Ray Data. Its tasks reserve no CPU, for the ranks that wait for them may hold all of them."""
    shared = dict((train, val))

    def read(index: SampleIndex, ids: Ids, transform: Transform, batch_size: int) -> Iterator[Batch]:
        return stream_batches(
            index,
            ids,
            transform,
            batch_size,
            on_bad_image,
            bad_images,
            shared=shared[index.source],
            num_cpus=0,
            move_up=False,
            max_tasks=max_tasks,
        )

    return read


@dataclass(frozen=True)
class _Shared:
    """What every rank is started with."""

    task: ray.ObjectRef[QatTask]
    train: tuple[str, ray.ObjectRef[SampleIndex]]
    val: tuple[str, ray.ObjectRef[SampleIndex]]
    on_bad_image: str
    folder: Path
    run: str
    threads: int


def run_on_workers(
    task: QatTask,
    workers: TrainWorkers,
    on_bad_image: str,
    on_step: Callable[[StepReport], None],
    on_epoch: Callable[[EpochReport], object],
    resources: RankResources,
) -> QatOutcome:
    """`run_task` on several workers; the callbacks are called here, a moment later. Needs a running Ray.

    Raises:
        InputError: what a worker found wrong with the input.
        DivergedError: a loss that is not finite.
        RuntimeError: where training failed more often than allowed.
    """
    folder = task.folder.absolute()  # a worker has a working directory of its own
    task = replace(task, folder=folder)
    (folder / "failure.json").unlink(missing_ok=True)
    shared = _Shared(
        task=ray.put(task),
        train=(task.data.train.source, share(task.data.train)),
        val=(task.data.val.source, share(task.data.val)),
        on_bad_image=on_bad_image,
        folder=folder,
        run=folder.name,
        threads=resources.threads,
    )
    trainer = TorchTrainer(
        _rank_main,
        train_loop_config={"shared": shared},
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.least is None else (workers.least, workers.count),  # type: ignore[arg-type]
            use_gpu=workers.use_gpu,
            resources_per_worker=_per_worker(workers, resources),
        ),
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        run_config=RunConfig(
            name=f"{folder.name}-{uuid.uuid4().hex[:6]}",  # a name used before would resume that run
            storage_path=str(folder / TRAIN_FOLDER),
            failure_config=FailureConfig(
                max_failures=workers.max_failures,
                controller_failure_limit=_MOST_STARTS,  # type: ignore[call-arg]  # of Train V2
            ),
        ),
    )
    try:
        error = _fit(trainer, Follower(folder, on_step, on_epoch))
    finally:
        shutil.rmtree(folder / TRAIN_FOLDER, ignore_errors=True)
    _raise_failure(folder, error)
    return read_outcome(folder)


def _per_worker(workers: TrainWorkers, resources: RankResources) -> dict[str, float]:
    return {"CPU": resources.cpus, "GPU": 1.0} if workers.use_gpu else {"CPU": resources.cpus}


def _fit(trainer: TorchTrainer, follower: Follower) -> BaseException | None:
    """`fit` in a thread, so that Ctrl-C stays ours and progress can be shown; the exception it ended with."""
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_SECONDS_BETWEEN_LOOKS)
        follower.look()
    follower.look()
    return errors[0] if errors else None


def _raise_failure(folder: Path, error: BaseException | None) -> None:
    failure = folder / "failure.json"
    if failure.exists():
        values = json.loads(failure.read_text())
        raise (DivergedError if values["diverged"] else InputError)(values["message"])
    if error is not None:
        raise RuntimeError(f"training failed; the last state is kept in {folder}: {one_line(error)[:500]}") from None


def _rank_main(config: dict[str, Any]) -> None:
    """What a Ray Train worker runs."""
    shared: _Shared = config["shared"]
    failure = shared.folder / "failure.json"
    if failure.exists():  # an earlier group met it, and this one would again
        return
    torch.set_num_threads(shared.threads)
    context = ray.train.get_context()
    exact_float32()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    task: QatTask = ray.get(shared.task)
    bad_images: list[tuple[str, str]] = []
    read = ray_reader(shared.train, shared.val, shared.on_bad_image, bad_images, shared.threads)
    recorder = Recorder(shared.folder, QatMetrics(shared.run)) if ranks.is_first else None

    def on_epoch(report: EpochReport) -> None:
        if recorder is not None:
            recorder.epoch(report)
        record_bad_images(shared.folder, bad_images)
        ray.train.report({**vars(report), "selection": report.selection.top1})  # a barrier, and the Train page

    try:
        run_task(task, read, ranks, recorder.step if recorder else _ignore, on_epoch)
    except (InputError, DivergedError) as error:
        write_json(failure, {"message": one_line(error), "diverged": isinstance(error, DivergedError)})
        raise
    record_bad_images(shared.folder, bad_images)


def _ignore(report: StepReport) -> None:
    pass
