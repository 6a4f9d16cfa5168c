"""Where training stands, as values and as files: what a step and an epoch report, and what a run goes on from.

`state.pt` is written by rank 0 and read by all; `best-<epoch>.pt` holds the weights that did best on the selection
images. Nothing random is in the state: every random choice is a function of (seed, epoch, step, place).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import atomic_file
from vitq_ray.base.formats import require_format, stamp
from vitq_ray.base.records import Schema, checked, own_error, require_whole
from vitq_ray.measure.evaluation import Counts

State = dict[str, Tensor]
STATE = "state.pt"
BEST = "best weights"  # the kind of best-<epoch>.pt


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

    def over(self, epochs: int) -> bool:
        """Nothing is left to train of a run of so many epochs."""
        return self.stopped or self.epoch >= epochs


def best_path(folder: Path, epoch: int) -> Path:
    return folder / f"best-{epoch}.pt"


def save_state(folder: Path, identity: Mapping[str, Any], progress: Progress, model: nn.Module, optimizer: Any) -> None:
    """Write `state.pt` atomically, then remove best weights that it no longer speaks of."""
    state = {
        **stamp("training state"),
        "identity": json.dumps(identity),
        "progress": _progress_to_json(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    save_tensors(folder / STATE, state)
    for old in folder.glob("best-*.pt"):
        if old != best_path(folder, progress.best.epoch):
            old.unlink(missing_ok=True)


def save_tensors(path: Path, value: Any) -> None:
    with atomic_file(path) as stream:
        torch.save(value, stream)


def load_tensors(path: Path, kind: str) -> dict[str, Any]:
    """What `save_tensors` wrote of a file of this kind, a key of `REMEDIES`. InputError where it is not whole."""
    values = checked(path, kind, lambda: _load_whole(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise own_error(path, kind, f"expected a dictionary, found {type(values).__name__}")
    return values


def _load_whole(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:  # PyTorch does not look at the checksums
            raise ValueError(f"the checksum of {member} does not fit")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(module: nn.Module, values: Any, path: Path, kind: str) -> None:
    """Let a module have the weights that a file of ours holds. InputError where they are of another model."""
    checked(path, kind, lambda: module.load_state_dict(values))


def _progress_to_json(progress: Progress) -> str:
    return json.dumps({**vars(progress), "history": [epoch_row(report) for report in progress.history]})


def progress_of(text: str) -> Progress:
    """The inverse; ValueError, KeyError or TypeError where the text is not that."""
    values = json.loads(text)
    progress = Progress(**{**values, "history": [epoch_of(row) for row in values["history"]]})
    if progress.history and not any(report.best for report in progress.history):
        raise ValueError("no epoch is the best")
    return progress


def epoch_row(report: EpochReport) -> dict[str, Any]:
    """As a JSON object, the inverse of `epoch_of`."""
    return {**vars(report), "selection": report.selection.to_dict()}


def epoch_of(row: Mapping[str, Any]) -> EpochReport:
    return EpochReport(**{**row, "selection": Counts.from_dict(row["selection"])})


_STATE: Schema = {"identity": str, "progress": str, "model": dict, "optimizer": dict}


@dataclass(frozen=True)
class TrainingState:
    """What state.pt holds."""

    identity: Mapping[str, Any]
    progress: Progress
    model: State
    optimizer: dict[str, Any]


def _read_state(path: Path) -> TrainingState:
    """InputError where the file is not whole, or a newer version wrote it."""
    kind = "training state"
    values = load_tensors(path, kind)
    require_format(kind, str(path), values)
    require_whole(path, kind, values, _STATE)
    identity = checked(path, kind, lambda: dict(json.loads(values["identity"])))
    progress = checked(path, kind, lambda: progress_of(values["progress"]))
    return TrainingState(identity, progress, values["model"], values["optimizer"])


def load_state(folder: Path, identity: Mapping[str, Any]) -> TrainingState | None:
    """The state in a folder, or None. InputError naming the difference if it is that of another run."""
    path = folder / STATE
    if not path.exists():
        return None
    state = _read_state(path)
    require_same(state.identity, json.loads(json.dumps(identity)), str(folder))
    return state


def require_same(stored: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """InputError naming the first difference between what a run was started with and what it is to go on with."""
    for key in dict.fromkeys((*stored, *given)):
        if stored.get(key) != given.get(key):
            raise InputError(f"{where}: was started with {key} {stored.get(key)!r}, now it is {given.get(key)!r}")


def read_outcome(folder: Path) -> QatOutcome:
    """What the training whose state lies in a folder has led to so far."""
    state = _read_state(folder / STATE)
    if not state.progress.history:
        raise own_error(folder / STATE, "training state", "no epoch is done")
    best = state.progress.best.epoch
    weights = load_tensors(best_path(folder, best), BEST)
    shapes = {name: tensor.shape for name, tensor in state.model.items()}
    if shapes != {name: getattr(tensor, "shape", None) for name, tensor in weights.items()}:
        raise own_error(best_path(folder, best), BEST, f"are not weights of the model of {STATE}")
    return QatOutcome(tuple(state.progress.history), best, weights)
