"""QAT in a search: which training runs there are, which go on, which stop, and which epoch is best. No Ray.

    starts × rows of a QatSpace ──► training runs ──► an epoch's selection accuracy ──► go on or stop (ASHA)

A search that was killed reads the epochs from its log in the order in which they came, which makes the same decisions
again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitq_ray.qat.recipe import QatConfig, recipe_of
from vitq_ray.search.space import QatSpace

MICRO_BATCH = 32


@dataclass(frozen=True)
class TrainingRun:
    """One run of QAT: which start, and what it is trained with."""

    name: str
    start: str
    config: QatConfig


@dataclass
class Asha:
    """Asynchronous successive halving, the stopping variant (Li et al. 2020, arXiv 1810.05934). Pure.

    A run that reaches the milestone grace · reduction^k goes on if its value is among the best 1/reduction of all that
    have reached it so far. Milestones below `epochs` only: a run that gets there is finished.
    """

    epochs: int
    grace: int
    reduction: int
    _rungs: dict[int, list[float]] = field(default_factory=dict)

    def stops(self, epoch: int, value: float) -> bool:
        """Take in a run's value after an epoch (from 1 on); whether it stops there."""
        if epoch not in self._milestones():
            return False
        rung = self._rungs.setdefault(epoch, [])
        rung.append(value)
        keep = math.ceil(len(rung) / self.reduction)
        return value < sorted(rung, reverse=True)[keep - 1]

    def _milestones(self) -> set[int]:
        milestones, epoch = set(), self.grace
        while epoch < self.epochs:
            milestones.add(epoch)
            epoch *= self.reduction
        return milestones


def training_runs(space: QatSpace, starts: Sequence[str], seed: int) -> list[TrainingRun]:
    """The runs of a space, starts in turn; names `q00`, `q01`, …"""
    rows = space.sample(seed)
    width = len(str(len(rows) - 1))
    return [
        TrainingRun(f"q{i:0{max(2, width)}d}", starts[i % len(starts)], config_of(row, space.epochs, seed))
        for i, row in enumerate(rows)
    ]


def config_of(row: Mapping[str, Any], epochs: int, seed: int) -> QatConfig:
    """A row of a QatSpace as a configuration; what it leaves out is as published."""
    batch = row.get("global_batch", QatConfig.global_batch)
    micro = MICRO_BATCH if isinstance(batch, int) and batch % MICRO_BATCH == 0 else batch
    return recipe_of({**row, "global_batch": batch, "micro_batch": micro, "epochs": epochs, "seed": seed})


@dataclass(frozen=True)
class Epoch:
    """What a run reports: selection counts after an epoch; epoch 0 is its start."""

    name: str
    epoch: int
    images: int
    top1_correct: int
    loss: float | None

    @property
    def top1(self) -> float:
        return self.top1_correct / self.images


class QatContest:
    """All training runs of a search: which go on, which stop, and which epoch of which run is best."""

    def __init__(self, runs: Sequence[TrainingRun], space: QatSpace, append: Callable[..., None]) -> None:
        self.runs = {run.name: run for run in runs}
        self._asha = Asha(space.epochs, space.grace_epochs, space.reduction)
        self._epochs = space.epochs
        self._append = append
        self.history: dict[str, list[Epoch]] = {run.name: [] for run in runs}
        self.stopped: set[str] = set()
        self.failed: dict[str, str] = {}

    def replay(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take in the epochs of a log, in its order."""
        for event in events:
            if event["event"] == "qat_epoch" and event["name"] in self.runs:
                self._take(Epoch(**{f.name: event[f.name] for f in dataclasses.fields(Epoch)}))
            elif event["event"] == "qat_failed":
                self.failed[event["name"]] = event["reason"]

    def take(self, epoch: Epoch) -> bool:
        """Take in an epoch as it is reported; whether the run is to stop."""
        if epoch.epoch >= len(self.history[epoch.name]):  # else known: reported again after a restart
            self._append("qat_epoch", **dataclasses.asdict(epoch))
            self._take(epoch)
        return epoch.name in self.stopped

    def fail(self, name: str, reason: str) -> None:
        """A run whose loss is no longer a number goes no further; its earlier epochs count."""
        self._append("qat_failed", name=name, reason=reason)
        self.failed[name] = reason

    def _take(self, epoch: Epoch) -> None:
        self.history[epoch.name].append(epoch)
        if epoch.epoch and self._asha.stops(epoch.epoch, epoch.top1):
            self.stopped.add(epoch.name)

    def status(self, name: str) -> str | None:
        """How a run ended; None where it goes on."""
        if name in self.failed:
            return "failed"
        return "stopped" if name in self.stopped else None if name in self.unfinished() else "finished"

    def unfinished(self) -> list[str]:
        """Runs that have neither stopped nor failed nor come to their last epoch."""
        done = self.stopped | set(self.failed)
        return [n for n, h in self.history.items() if n not in done and len(h) <= self._epochs]

    def best(self) -> Epoch:
        """The epoch with the most correct selection images; on equal counts the earlier epoch, then the earlier run."""
        epochs = [epoch for history in self.history.values() for epoch in history]
        return max(epochs, key=lambda e: (e.top1_correct, -e.epoch))
