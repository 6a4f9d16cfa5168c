"""The training loop of QAT: plain PyTorch, the same for one process and for many. No Ray.

    (seed, epoch) -> permutation of the training images -> global batch of a step -> slice of a rank -> micro-batches
    micro-batch -> student (quantizers on, dropout), teacher (float, eval) -> Σ image losses / global batch

Every random choice is a function of (seed, epoch, step, place in the global batch), so nothing random is part of the
training state: order of images, augmentation per image, and the dropout masks of a micro-batch, whichever rank it
falls to. Gradients are summed over micro-batches and ranks, so the number of workers changes the sum's rounding only.

The state lies in the run folder, one file replaced at a time: `state.pt`, written by rank 0 and read by all, and
`best-<epoch>.pt`, the weights that did best on the selection images. Starting again in the same folder goes on where
the state was written.

Legend: B images of a micro-batch, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitq_ray.base.config import Config, InputError, require_choice, require_int
from vitq_ray.base.files import atomic_file
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import Ids, SampleIndex
from vitq_ray.data.transforms import AUGMENTATIONS, EvalTransform, TrainTransform, Transform
from vitq_ray.measure.evaluation import Counts, Evaluation, evaluate_variants
from vitq_ray.measure.metrics import METRICS
from vitq_ray.models.checkpoint import CalibratedModel
from vitq_ray.models.weights import weights_fingerprint
from vitq_ray.qat.distill import Distillation, image_losses
from vitq_ray.quant.fake_quant import integer_range
from vitq_ray.quant.vit import frozen_weights, learn_amax, quant_blocks

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine")
EVAL_BATCH = 64  # images of an evaluation micro-batch: that of evaluate.py, whatever the number of workers
TEACHER_LOGITS = "teacher_logits.npy"  # of a run folder; as large as the training split, gone when a run is finished
_AMAX_FLOOR = 1e-3  # learned amax stays above this fraction of what calibration found
_FORMAT = 1

State = dict[str, Tensor]


# Settings and values ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QatConfig(Config):
    """Everything that decides what a training run computes; the defaults are the published recipe.

    `global_batch` images make a step, in micro-batches of `micro_batch` images, which ranks share out. `distillation`
    None trains with cross entropy alone. `lr` is the learning rate of the first step.
    """

    epochs: int = 5
    lr: float = 1e-4
    global_batch: int = 128
    micro_batch: int = 32
    optimizer: str = "sgd"
    schedule: str = "constant"
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    augment: str = "toolkit"
    distillation: Distillation | None = field(default_factory=Distillation)
    learn_amax: bool = False
    bf16: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        require_int("number of epochs", self.epochs, 1)
        require_int("global batch size", self.global_batch, 1)
        require_int("images per micro-batch", self.micro_batch, 1)
        require_int("seed", self.seed, 0)
        require_choice("optimizer", self.optimizer, OPTIMIZERS)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("augmentation", self.augment, AUGMENTATIONS)
        if self.global_batch % self.micro_batch:
            raise InputError(f"global batch size: {self.global_batch} is not a multiple of {self.micro_batch}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"learning rate: expected a number > 0, got {self.lr!r}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected a number in [0, 1), got {self.dropout!r}")
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0 and self.max_grad_norm > 0):
            raise InputError(
                f"momentum {self.momentum!r}, weight decay {self.weight_decay!r}, max grad norm "
                f"{self.max_grad_norm!r}: expected [0, 1), >= 0 and > 0"
            )

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 … total - 1; cosine falls to (almost) 0."""
        return self.lr if self.schedule == "constant" else self.lr * (1 + math.cos(math.pi * step / total)) / 2


@dataclass(frozen=True)
class QatData:
    """Images to train on and to select by. `train_ids` and `selection_ids` are sample ids of the two splits."""

    train: SampleIndex
    train_ids: Ids
    val: SampleIndex
    selection_ids: Ids
    transform: EvalTransform


@dataclass(frozen=True)
class StepReport:
    """One step, the same on all ranks: `loss` is the mean over the images of the global batch, `step` counts from 1
    over all epochs, `images` are those trained on, `images_per_second` is that of this step, waiting included."""

    epoch: int
    step: int
    total_steps: int
    loss: float
    lr: float
    grad_norm: float
    images: int
    images_per_second: float


@dataclass(frozen=True)
class EpochReport:
    """One epoch, from 1 on; epoch 0 is the model training started from, and has no loss."""

    epoch: int
    step: int
    loss: float | None
    selection: Counts
    best: bool


@dataclass(frozen=True)
class QatOutcome:
    """What training led to. `epochs` begins with epoch 0; `best_state` is the state dict of the best epoch's student.

    Best is the first epoch with the most correct selection images, so the start itself where none beats it.
    """

    epochs: tuple[EpochReport, ...]
    best_epoch: int
    best_state: State


OnStep = Callable[[StepReport], None]
OnEpoch = Callable[[EpochReport], bool | None]


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


# Ranks --------------------------------------------------------------------------------------------------------------


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


# Order of images ----------------------------------------------------------------------------------------------------


def steps_per_epoch(num_images: int, config: QatConfig) -> int:
    """Full global batches only: every step has the same number of images. The others have their turn another epoch."""
    steps = num_images // config.global_batch
    if steps == 0:
        raise InputError(
            f"global batch size: {config.global_batch} is more than the {num_images} training images; "
            "choose a smaller --batch-size or --global-batch-size"
        )
    return steps


def epoch_order(config: QatConfig, epoch: int, ids: Ids) -> Ids:
    """The training images in the order of an epoch (from 0 on): a function of seed and epoch alone."""
    return np.random.default_rng([config.seed, epoch]).permutation(np.asarray(ids, np.int64))


def rank_ids(config: QatConfig, epoch: int, first_step: int, ids: Ids, ranks: Ranks) -> Ids:
    """What one rank trains on from `first_step` of an epoch to its end: its slice of every global batch."""
    steps = steps_per_epoch(len(ids), config)
    order = epoch_order(config, epoch, ids)[: steps * config.global_batch]
    share = config.global_batch // ranks.world
    return order.reshape(steps, ranks.world, share)[first_step:, ranks.rank].reshape(-1)


def _micro_batches(config: QatConfig, ranks: Ranks) -> int:
    """Micro-batches of a step that fall to each rank."""
    per_rank, rest = divmod(config.global_batch, config.micro_batch * ranks.world)
    if rest:
        raise InputError(
            f"global batch size: {config.global_batch} cannot be shared by {ranks.world} workers in micro-batches "
            f"of {config.micro_batch}"
        )
    return per_rank


# Student ------------------------------------------------------------------------------------------------------------


class SeededDropout(nn.Module):
    """Dropout with a random generator of its own, which is seeded for every micro-batch."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p, self._generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self._generator)
        return x * keep.div_(1 - self.p)


def add_dropout(model: nn.Module, p: float, generator: torch.Generator) -> None:
    """Dropout after the position embedding, GELU and fc2; attention has none."""
    model.pos_drop = SeededDropout(p, generator)
    for block in quant_blocks(model):
        for name in ("drop1", "drop2"):
            setattr(block.mlp, name, SeededDropout(p, generator))
        block.attn.attn_drop = nn.Dropout(0.0)
        block.attn.proj_drop = nn.Dropout(0.0)


def _seed_of(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_optimizer(config: QatConfig, model: nn.Module, learned: Sequence[tuple[nn.Parameter, int]]) -> Any:
    """SGD or AdamW; every group knows its `factor` of the learning rate.

    LSQ learns the step s = amax / qmax, here amax is learned: its SGD update is qmax² times, AdamW's qmax times what
    the same rate gives s, so that s moves as in LSQ.
    """
    scales = {id(parameter) for parameter, _ in learned}
    groups = [{"params": [p for p in model.parameters() if id(p) not in scales], "factor": 1.0}]
    for bits in sorted({bits for _, bits in learned}):
        factor = integer_range(bits)[1] ** (2 if config.optimizer == "sgd" else 1)
        params = [p for p, b in learned if b == bits]
        groups.append({"params": params, "factor": float(factor), "weight_decay": 0.0})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


# State --------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where training stands: `epoch` and `step` (within the epoch) are the next to do, both from 0 on."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0  # of the running epoch, over its images
    images: int = 0
    history: list[EpochReport] = field(default_factory=list)
    stopped: bool = False

    @property
    def best(self) -> EpochReport:
        return [report for report in self.history if report.best][-1]


def best_path(folder: Path, epoch: int) -> Path:
    return folder / f"best-{epoch}.pt"


def save_state(folder: Path, identity: Mapping[str, Any], progress: Progress, model: nn.Module, optimizer: Any) -> None:
    """Write `state.pt` atomically, then remove best weights that it no longer speaks of."""
    state = {
        "format": _FORMAT,
        "identity": json.dumps(identity),
        "progress": _progress_to_json(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    _save(folder / "state.pt", state)
    for old in folder.glob("best-*.pt"):
        if old != best_path(folder, progress.best.epoch):
            old.unlink(missing_ok=True)


def _save(path: Path, value: Any) -> None:
    with atomic_file(path) as stream:
        torch.save(value, stream)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _progress_to_json(progress: Progress) -> str:
    return json.dumps({**vars(progress), "history": [epoch_row(report) for report in progress.history]})


def _progress_from_json(text: str) -> Progress:
    values = json.loads(text)
    return Progress(**{**values, "history": [epoch_of(row) for row in values["history"]]})


def epoch_row(report: EpochReport) -> dict[str, Any]:
    """As a JSON object, the inverse of `epoch_of`."""
    return {**vars(report), "selection": report.selection.to_dict()}


def epoch_of(row: Mapping[str, Any]) -> EpochReport:
    return EpochReport(**{**row, "selection": Counts.from_dict(row["selection"])})


def load_state(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in a folder, or None. InputError naming the difference if it is that of another run."""
    path = folder / "state.pt"
    if not path.exists():
        return None
    state = _load(path)
    if state["format"] != _FORMAT:
        raise InputError(f"{path}: format {state['format']} found, {_FORMAT} expected")
    require_same(json.loads(state["identity"]), json.loads(json.dumps(identity)), str(folder))
    return state


def require_same(stored: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """InputError naming the first difference between what a run was started with and what it is to go on with."""
    for key in dict.fromkeys((*stored, *given)):
        if stored.get(key) != given.get(key):
            raise InputError(f"{where}: was started with {key} {stored.get(key)!r}, now it is {given.get(key)!r}")


# Evaluation ---------------------------------------------------------------------------------------------------------


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
    return {name: _gather(part, index, ids, ranks) for name, part in parts.items()}


def _gather(part: Evaluation, index: SampleIndex, ids: Ids, ranks: Ranks) -> Evaluation:
    """The results of all ranks, from those of this one."""
    place = {int(sample_id): i for i, sample_id in enumerate(ids)}
    columns = [place[int(i)] for i in part.sample_ids]
    # Each image is another rank's zero: the sums are exact, those of bool and float32 alike.
    table = torch.zeros(1 + len(METRICS), len(ids), dtype=torch.float64)
    table[0, columns] = 1
    for row, name in enumerate(METRICS, start=1):
        table[row, columns] = torch.from_numpy(part.results[name].astype(np.float64))
    seen, *values = ranks.sum(table).numpy()
    found = seen.astype(bool)
    if not found.any():
        raise InputError(f"{index.source}: none of the {len(ids)} images could be read")
    kept = ids[found]
    metrics = zip(METRICS.items(), values, strict=True)
    results = {name: column[found].astype(metric.dtype) for (name, metric), column in metrics}
    return Evaluation(kept, index.labels[kept].astype(np.int64), results)


# Teacher ------------------------------------------------------------------------------------------------------------

Teacher = Callable[[Batch, Tensor], Tensor]  # (batch, its images as the model takes them) -> logits (B, K)


def running_teacher(model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> Teacher:
    """The teacher's forward pass, in eval mode, for every batch."""
    model.eval()

    def logits(batch: Batch, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            return cast(Tensor, model(images))

    return logits


def stored_teacher(table: npt.NDArray[np.float32], device: torch.device) -> Teacher:
    """Logits computed before, one row per sample id."""

    def logits(batch: Batch, images: Tensor) -> Tensor:
        return torch.from_numpy(table[batch.sample_ids.numpy()]).to(device)

    return logits


def teacher_table(
    path: Path, teacher: Teacher, data: QatData, num_classes: int, read: Reader, ranks: Ranks
) -> npt.NDArray[np.float32]:
    """The teacher's logits of every training image, computed once by all ranks, in a file that they share.

    (images of the split, classes) float32, mapped; 4 GB for every million images of 1000 classes. The file appears
    under its name once complete, so a later start only opens it.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        if ranks.is_first:
            shape = (len(data.train), num_classes)
            np.lib.format.open_memmap(partial, "w+", np.float32, shape).flush()
        ranks.barrier()
        rows = np.load(partial, mmap_mode="r+")
        ids = np.asarray(data.train_ids, np.int64)
        chunks = [ids[i : i + EVAL_BATCH] for i in range(0, len(ids), EVAL_BATCH)][ranks.rank :: ranks.world]
        for batch in read(data.train, np.concatenate(chunks), data.transform, EVAL_BATCH) if chunks else ():
            if len(batch.labels):
                logits = teacher(batch, data.transform.normalize(batch.images.to(ranks.device)))
                rows[batch.sample_ids.numpy()] = logits.float().cpu().numpy()
        rows.flush()
        ranks.barrier()
        if ranks.is_first:
            os.replace(partial, path)
        ranks.barrier()
    table: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
    return table


# Training -----------------------------------------------------------------------------------------------------------


class DivergedError(InputError):
    """The loss or its gradient is no longer a number."""


@dataclass
class _Run:
    """What the loop works with."""

    config: QatConfig
    student: nn.Module
    wrapped: nn.Module  # the student, or DDP around it
    optimizer: Any
    learned: list[tuple[nn.Parameter, float]]  # with the smallest value each may take
    generator: torch.Generator
    teacher: Teacher | None
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

    def save() -> None:
        if run.ranks.is_first:
            save_state(folder, identity, progress, run.student, run.optimizer)

    if not progress.history:
        _finish_epoch(run, folder, progress, None, save, on_epoch)
    while progress.epoch < config.epochs and not progress.stopped:
        _train_epoch(run, progress, checkpoint_steps, save, on_step)
        loss = progress.loss_sum / max(1, progress.images)
        progress.epoch, progress.step, progress.loss_sum, progress.images = progress.epoch + 1, 0, 0.0, 0
        _finish_epoch(run, folder, progress, loss, save, on_epoch)
    ranks.barrier()  # the state is there for every rank
    return read_outcome(folder)


def read_outcome(folder: Path) -> QatOutcome:
    """What the training whose state lies in a folder has led to so far."""
    progress = _progress_from_json(_load(folder / "state.pt")["progress"])
    best = progress.best.epoch
    return QatOutcome(tuple(progress.history), best, _load(best_path(folder, best)))


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
    _micro_batches(config, ranks)
    steps_per_epoch(len(data.train_ids), config)
    if config.distillation is not None and teacher is None:
        raise InputError("distillation: needs a teacher, there is none")
    folder.mkdir(parents=True, exist_ok=True)
    student = copy.deepcopy(start.loaded.model).to(ranks.device).requires_grad_(True)
    learned = learn_amax(student, start.sidecar.setting.mode) if config.learn_amax else []
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
        teacher=_make_teacher(config, teacher, autocast, data, folder, read, ranks),
        autocast=autocast,
        data=data,
        read=read,
        ranks=ranks,
    )


def _distributed(student: nn.Module) -> nn.Module:
    # Buffers are scales, the same everywhere and never changed.
    return nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)


def _make_teacher(
    config: QatConfig,
    model: nn.Module | None,
    autocast: Callable[[], AbstractContextManager[Any]],
    data: QatData,
    folder: Path,
    read: Reader,
    ranks: Ranks,
) -> Teacher | None:
    if config.distillation is None or model is None:
        return None
    teacher = running_teacher(model.to(ranks.device).requires_grad_(False), autocast)
    if config.augment != "none":
        return teacher
    classes = int(getattr(model, "num_classes", 0)) or data.train.num_classes_seen
    table = teacher_table(folder / TEACHER_LOGITS, teacher, data, classes, read, ranks)
    return stored_teacher(table, ranks.device)


def _restore(run: _Run, folder: Path, identity: Mapping[str, Any]) -> Progress:
    state = load_state(folder, identity)
    if state is None:
        return Progress()
    run.student.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    return _progress_from_json(state["progress"])


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
            "the last good state is kept; try a smaller --qat-lr"
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
    count = _micro_batches(config, ranks)
    totals = torch.zeros(2, dtype=torch.float64)
    for i in range(count):
        batch = next(batches)
        offset = (ranks.rank * count + i) * config.micro_batch
        run.generator.manual_seed(_seed_of(config.seed, progress.epoch, progress.step, offset))
        last = i == count - 1
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


def _finish_epoch(
    run: _Run, folder: Path, progress: Progress, loss: float | None, save: Callable[[], None], on_epoch: OnEpoch
) -> None:
    """Evaluate on the selection images, keep the weights if they are the best so far, write the state."""
    data, ranks = run.data, run.ranks
    with frozen_weights(run.student):
        evaluation = sharded_evaluation(run.student, data.val, data.selection_ids, data.transform, run.read, ranks)
    counts = Counts.of(evaluation)
    best = not progress.history or counts.top1_correct > progress.best.selection.top1_correct
    steps = steps_per_epoch(len(data.train_ids), run.config)
    report = EpochReport(progress.epoch, progress.epoch * steps, loss, counts, best)
    progress.history.append(report)
    if best and ranks.is_first:
        _save(best_path(folder, report.epoch), run.student.state_dict())
    save()  # before anyone is told: what is reported is on disk
    progress.stopped = ranks.agree(on_epoch(report) is False)
    if progress.stopped:
        save()
