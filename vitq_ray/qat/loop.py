"""The training loop of QAT: plain PyTorch, the same for one process and for many. No Ray.

    ranks -> micro-batch -> student (quantizers on, dropout), teacher (float, eval) -> Σ image losses / global batch

Every random choice is a function of (seed, epoch, step, place in the global batch), so nothing random is part of the
training state: order of images, augmentation per image, and the dropout masks of a micro-batch, whichever rank it
falls to. Gradients are summed over micro-batches and ranks, so the number of workers changes the sum's rounding only.
Starting again in the same folder goes on where the state was written.

Legend: B images of a micro-batch, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.records import checked
from vitq_ray.data.loader import Batch
from vitq_ray.data.transforms import TrainTransform, Transform
from vitq_ray.engines.execute import default_engine, executed
from vitq_ray.measure.evaluation import Counts, NonFiniteLogitsError
from vitq_ray.models.checkpoint import CalibratedModel
from vitq_ray.models.weights import weights_fingerprint
from vitq_ray.qat.loss import image_losses
from vitq_ray.qat.ranks import (
    QatData,
    Ranks,
    Reader,
    micro_batches,
    rank_ids,
    sharded_evaluation,
    steps_per_epoch,
    thread_reader,
)
from vitq_ray.qat.recipe import QatConfig
from vitq_ray.qat.state import (
    STATE,
    EpochReport,
    Progress,
    QatOutcome,
    StepReport,
    best_path,
    load_state,
    load_weights,
    read_outcome,
    save_state,
    save_tensors,
)
from vitq_ray.qat.student import add_dropout, make_optimizer, seed_of, set_lr
from vitq_ray.qat.teacher import Teacher, make_teacher
from vitq_ray.quant.vit import learn_amax

_AMAX_FLOOR = 1e-3  # learned amax stays above this fraction of what calibration found


OnStep = Callable[[StepReport], None]
OnEpoch = Callable[[EpochReport], bool | None]


class DivergedError(RuntimeError):
    """The loss, its gradient or what the model puts out is no longer a number; the message is one line for the user."""


@dataclass
class _Run:
    """What the loop works with."""

    config: QatConfig
    student: nn.Module
    wrapped: nn.Module  # the student, or DDP around it
    optimizer: Any
    learned: list[tuple[nn.Parameter, float]]  # with the smallest value each may take
    generator: torch.Generator
    teacher: Teacher | None  # made once it is known that there is something to train
    autocast: Callable[[], AbstractContextManager[Any]]
    data: QatData
    read: Reader
    ranks: Ranks


def train_qat(
    config: QatConfig,
    start: CalibratedModel,
    teacher: nn.Module | None,
    data: QatData,
    folder: Path,
    read: Reader | None = None,
    ranks: Ranks | None = None,
    checkpoint_steps: int | None = None,
    on_step: OnStep = lambda report: None,
    on_epoch: OnEpoch = lambda report: None,
) -> QatOutcome:
    """Train a calibrated model, with the state kept in `folder`; goes on from the state that is there.

    Args:
        start: from `load_calibrated`; left as it is.
        teacher: a float model; needed where the configuration distils.
        folder: what the state is written to; a state of other options, weights or images is refused.
        read: how images are read; default: threads of this process.
        ranks: this process among several that call this with the same arguments; default: alone.
        checkpoint_steps: also write the state every so many steps, not only after every epoch.
        on_step: called on every rank after every step.
        on_epoch: called on every rank after every epoch, with epoch 0 first; if rank 0's returns False, training ends.

    Raises:
        DivergedError: naming step and learning rate, once the loss is not finite; the last state stays.
    """
    ranks = ranks or Ranks()
    identity = identity_of(config, start, teacher, data)
    run = _prepare(config, start, teacher, data, folder, read or thread_reader(), ranks)
    progress = _restore(run, folder, identity)
    if not progress.over(config.epochs):  # its table of logits costs a pass over the training images
        run.teacher = make_teacher(config, teacher, run.autocast, data, folder, run.read, ranks)

    def save() -> None:
        if run.ranks.is_first:
            save_state(folder, identity, progress, run.student, run.optimizer)

    if not progress.history:
        _finish_epoch(run, folder, progress, None, save, on_epoch)
    while not progress.over(config.epochs):
        _train_epoch(run, progress, checkpoint_steps, save, on_step)
        loss = progress.loss_sum / max(1, progress.images)
        progress.epoch, progress.step, progress.loss_sum, progress.images = progress.epoch + 1, 0, 0.0, 0
        _finish_epoch(run, folder, progress, loss, save, on_epoch)
    ranks.barrier()  # the state is there for every rank
    return read_outcome(folder)


def identity_of(config: QatConfig, start: CalibratedModel, teacher: nn.Module | None, data: QatData) -> dict[str, Any]:
    """Everything that decides what a run computes, as JSON: what a resumed run must share with its beginning."""
    ids = {"training images": data.train_ids, "selection images": data.selection_ids}
    return {
        **config.to_dict(),
        "starting checkpoint": start.sidecar.checkpoint_fingerprint,
        "teacher": None if teacher is None else weights_fingerprint(teacher.state_dict()),
        "train data": data.train.fingerprint,
        "val data": data.val.fingerprint,
        **{name: hashlib.sha256(np.asarray(i, np.int64).tobytes()).hexdigest() for name, i in ids.items()},
    }


def _prepare(
    config: QatConfig,
    start: CalibratedModel,
    teacher: nn.Module | None,
    data: QatData,
    folder: Path,
    read: Reader,
    ranks: Ranks,
) -> _Run:
    micro_batches(config, ranks)
    steps_per_epoch(len(data.train_ids), config)
    if config.distillation is not None and teacher is None:
        raise InputError("distillation: needs a teacher, there is none")
    folder.mkdir(parents=True, exist_ok=True)
    student = copy.deepcopy(start.loaded.model).to(ranks.device).requires_grad_(True)
    learned = learn_amax(student, start.plan) if config.learn_amax else []
    generator = torch.Generator(ranks.device)
    add_dropout(student, config.dropout, generator)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.bf16)

    return _Run(
        config=config,
        student=student,
        wrapped=student if ranks.world == 1 else _distributed(student),
        optimizer=make_optimizer(config, student, learned),
        learned=[(p, p.min().item() * _AMAX_FLOOR) for p, _ in learned],
        generator=generator,
        teacher=None,
        autocast=autocast,
        data=data,
        read=read,
        ranks=ranks,
    )


def _distributed(student: nn.Module) -> nn.Module:
    # Buffers are scales, the same everywhere and never changed.
    return nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)


def _restore(run: _Run, folder: Path, identity: Mapping[str, Any]) -> Progress:
    state = load_state(folder, identity)
    if state is None:
        return Progress()
    path = folder / STATE
    load_weights(run.student, state.model, path, "training state")
    checked(path, "training state", lambda: run.optimizer.load_state_dict(state.optimizer))
    return state.progress


def _train_epoch(
    run: _Run, progress: Progress, checkpoint_steps: int | None, save: Callable[[], None], on_step: OnStep
) -> None:
    """From the step where the progress stands to the end of the epoch."""
    config, data, ranks = run.config, run.data, run.ranks
    steps = steps_per_epoch(len(data.train_ids), config)
    ids = rank_ids(config, progress.epoch, progress.step, data.train_ids, ranks)
    if len(ids) == 0:
        return
    with contextlib.closing(
        _closable(run.read(data.train, ids, _transform(run, progress.epoch), config.micro_batch))
    ) as (batches):
        while progress.step < steps:
            start = time.perf_counter()
            report = _step(run, progress, batches, steps, start)
            on_step(report)
            if checkpoint_steps and report.step % checkpoint_steps == 0 and progress.step < steps:
                save()


def _closable(batches: Iterator[Batch]) -> Any:
    return batches if hasattr(batches, "close") else (batch for batch in batches)


def _transform(run: _Run, epoch: int) -> Transform:
    if run.config.augment == "none":
        return run.data.transform
    return TrainTransform(run.data.transform, run.config.augment, run.config.seed, epoch)


def _step(run: _Run, progress: Progress, batches: Iterator[Batch], steps: int, start: float) -> StepReport:
    """One optimizer step on one global batch; moves the progress on."""
    config = run.config
    done, total = progress.epoch * steps + progress.step, config.epochs * steps
    lr = config.lr_at(done, total)
    run.student.train()
    run.optimizer.zero_grad(set_to_none=True)
    loss_sum, images = (float(v) for v in run.ranks.sum(_backward(run, progress, batches)))
    loss = loss_sum / max(1.0, images)
    norm = float(nn.utils.clip_grad_norm_(run.student.parameters(), config.max_grad_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise DivergedError(
            f"the {what} is not finite at step {done + 1} (epoch {progress.epoch + 1}) with learning rate {lr:g}; "
            "the last good state is kept; try a smaller learning rate"
        )
    set_lr(run.optimizer, lr)
    run.optimizer.step()
    with torch.no_grad():
        for amax, floor in run.learned:
            amax.clamp_min_(floor)
    progress.step += 1
    progress.loss_sum += loss_sum
    progress.images += int(images)
    speed = images / (time.perf_counter() - start)
    return StepReport(progress.epoch + 1, done + 1, total, loss, lr, norm, int(images), speed)


def _backward(run: _Run, progress: Progress, batches: Iterator[Batch]) -> Tensor:
    """Gradients of this rank's micro-batches, DDP's mean over ranks included; (loss sum, images) of this rank."""
    config, ranks = run.config, run.ranks
    mine = micro_batches(config, ranks)
    totals = torch.zeros(2, dtype=torch.float64)
    for i in mine:
        batch = next(batches)
        offset = i * config.micro_batch
        run.generator.manual_seed(seed_of(config.seed, progress.epoch, progress.step, offset))
        last = i == mine[-1]
        with contextlib.nullcontext() if last or ranks.world == 1 else cast(Any, run.wrapped).no_sync():
            losses = _losses(run, batch)
            # DDP averages over ranks; what is wanted is the sum of all images' gradients over the global batch size.
            (losses.sum() * (ranks.world / config.global_batch)).backward()
        totals += torch.tensor([losses.detach().double().sum().item(), len(batch.labels)], dtype=torch.float64)
    return totals


def _losses(run: _Run, batch: Batch) -> Tensor:
    """(B,) losses of one micro-batch."""
    if len(batch.labels) == 0:
        raise InputError(f"{run.data.train.source}: all {run.config.micro_batch} images of a micro-batch are broken")
    transform = run.data.transform
    images = batch.images.to(run.ranks.device)
    images = images if images.is_floating_point() else transform.normalize(images)
    labels = batch.labels.to(run.ranks.device)
    targets = run.teacher(batch, images) if run.teacher is not None else None
    with run.autocast():
        logits = run.wrapped(images)
    return image_losses(logits, labels, targets, run.config.distillation)


def _selection_counts(run: _Run, epoch: int) -> Counts:
    data = run.data
    try:
        with executed(run.student, default_engine(run.ranks.device)) as model:
            evaluation = sharded_evaluation(model, data.val, data.selection_ids, data.transform, run.read, run.ranks)
    except NonFiniteLogitsError as error:
        if epoch == 0:  # nothing was trained yet: it is the start that is broken
            raise
        raise DivergedError(f"{error}, after epoch {epoch} with learning rate {run.config.lr:g}") from None
    return Counts.of(evaluation)


def _finish_epoch(
    run: _Run, folder: Path, progress: Progress, loss: float | None, save: Callable[[], None], on_epoch: OnEpoch
) -> None:
    """Evaluate on the selection images, keep the weights if they are the best so far, write the state."""
    data, ranks = run.data, run.ranks
    counts = _selection_counts(run, progress.epoch)
    best = not progress.history or counts.top1_correct > progress.best.selection.top1_correct
    steps = steps_per_epoch(len(data.train_ids), run.config)
    report = EpochReport(progress.epoch, progress.epoch * steps, loss, counts, best)
    progress.history.append(report)
    if best and ranks.is_first:
        save_tensors(best_path(folder, report.epoch), run.student.state_dict())
    save()  # before anyone is told: what is reported is on disk
    progress.stopped = ranks.agree(on_epoch(report) is False)
    if progress.stopped:
        save()
