"""A training run with its final judgement, and the records of it: what one process does, or each of several ranks.

    run_task: state (if there) -> train_qat -> judge on all of val -> judgement.json

steps.jsonl and epochs.jsonl have a line for every step and epoch; their first line says their format. No Ray.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from vitq_ray.base.files import append_whole
from vitq_ray.base.formats import require_format, stamp
from vitq_ray.base.records import Schema, read_sealed, require_whole, write_sealed
from vitq_ray.data.samples import Ids
from vitq_ray.engines.execute import Split, default_engine, evaluation_batch, executed
from vitq_ray.measure.evaluation import Counts, Evaluation
from vitq_ray.models.checkpoint import CalibratedModel
from vitq_ray.qat.loop import OnEpoch, OnStep, identity_of, train_qat
from vitq_ray.qat.ranks import QatData, Ranks, Reader, sharded_variants
from vitq_ray.qat.recipe import QatConfig
from vitq_ray.qat.state import (
    EpochReport,
    QatOutcome,
    StepReport,
    epoch_of,
    epoch_row,
    load_state,
    read_outcome,
)

JUDGEMENT = "judgement.json"
_COUNTS: Schema = {"images": int, "top1_correct": int}
_MODELS: Schema = {name: dict.fromkeys(("selection", "report", "val"), _COUNTS) for name in ("float", "ptq", "qat")}
Judgement = dict[str, dict[str, Counts]]


@dataclass(frozen=True)
class QatTask:
    """A training run and its final judgement, as a value that can be sent to workers.

    `report_ids` are the images of val that the outcome is reported on. `teacher` may be None without distillation.
    """

    config: QatConfig
    start: CalibratedModel
    teacher: nn.Module | None
    data: QatData
    report_ids: Ids
    folder: Path
    checkpoint_steps: int | None = None


def run_task(
    task: QatTask,
    read: Reader,
    ranks: Ranks,
    on_step: OnStep,
    on_epoch: OnEpoch,
) -> QatOutcome:
    """Train, judge, and leave the judgement in `judgement.json`: what each rank does, or the only process.

    A run that has come to its judgement is not judged again.
    """
    if ranks.agree(is_judged(task)):
        return read_outcome(task.folder)
    outcome = train_qat(
        task.config,
        task.start,
        task.teacher,
        task.data,
        task.folder,
        read,
        ranks,
        task.checkpoint_steps,
        on_step,
        on_epoch,
    )
    judgement = judge(task, outcome, read, ranks)
    if ranks.is_first:
        rows = {name: {part: c.to_dict() for part, c in parts.items()} for name, parts in judgement.items()}
        write_sealed(task.folder / JUDGEMENT, {**stamp("judgement"), "models": rows})
    return outcome


def is_judged(task: QatTask) -> bool:
    """The folder holds this run, with its judgement. InputError where it holds another run."""
    identity = identity_of(task.config, task.start, task.teacher, task.data)
    return load_state(task.folder, identity) is not None and (task.folder / JUDGEMENT).exists()


def judge(task: QatTask, outcome: QatOutcome, read: Reader, ranks: Ranks) -> Judgement:
    """{float, ptq, qat: {selection, report, val: counts}}, from one pass over all of val in map order.

    `float` is the teacher, or where there is none the start with its quantizers off.
    """
    data, model = task.data, task.start.loaded.model.to(ranks.device)
    teacher = task.start.without_quantizers() if task.teacher is None else task.teacher.to(ranks.device)
    trained = copy.deepcopy(model)
    trained.load_state_dict(outcome.best_state)
    ids, engine = np.arange(len(data.val)), default_engine(ranks.device)
    with executed(model, engine) as ptq, executed(trained, engine) as qat:
        variants = {"float": Split(teacher, evaluation_batch(model, ranks.device)), "ptq": ptq, "qat": qat}
        results = sharded_variants(variants, data.val, ids, data.transform, read, ranks)
    return {name: _parts(task, evaluation) for name, evaluation in results.items()}


def _parts(task: QatTask, evaluation: Evaluation) -> dict[str, Counts]:
    parts = {
        "selection": evaluation.subset(task.data.selection_ids),
        "report": evaluation.subset(task.report_ids),
        "val": evaluation,
    }
    return {name: Counts.of(part) for name, part in parts.items()}


def read_judgement(folder: Path) -> Judgement:
    """What `run_task` left in its folder."""
    path = folder / JUDGEMENT
    values = read_sealed(path, "judgement", {})
    values = {"models": values} if values["format"] == 1 else values
    require_whole(path, "judgement", values, {"models": _MODELS})
    rows = {name: values["models"][name] for name in _MODELS}
    return {name: {part: Counts.from_dict(c) for part, c in parts.items()} for name, parts in rows.items()}


class Meter(Protocol):
    """What also wants to see every step and epoch, such as the metrics of a dashboard."""

    def step(self, report: StepReport) -> None: ...

    def epoch(self, report: EpochReport) -> None: ...


class Recorder:
    """Appends every step to steps.jsonl and every epoch to epochs.jsonl, and shows them to a meter."""

    def __init__(self, folder: Path, meter: Meter | None = None) -> None:
        self._folder = folder
        self._meter = meter

    def step(self, report: StepReport) -> None:
        self._append("steps.jsonl", vars(report))
        if self._meter is not None:
            self._meter.step(report)

    def epoch(self, report: EpochReport) -> None:
        self._append("epochs.jsonl", epoch_row(report))
        if self._meter is not None:
            self._meter.epoch(report)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self._folder / name
        rows = [row] if path.exists() and path.stat().st_size else [stamp("steps"), row]
        append_whole(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows).encode(), sync=False)


class Follower:
    """Hands on what is appended to steps.jsonl and epochs.jsonl, from where they end now."""

    def __init__(
        self, folder: Path, on_step: Callable[[StepReport], None], on_epoch: Callable[[EpochReport], object]
    ) -> None:
        self._sinks: dict[Path, Callable[[dict[str, Any]], object]] = {
            folder / "steps.jsonl": lambda row: on_step(StepReport(**row)),
            folder / "epochs.jsonl": lambda row: on_epoch(epoch_of(row)),
        }
        self._read = {path: path.stat().st_size if path.exists() else 0 for path in self._sinks}

    def look(self) -> None:
        for path, sink in self._sinks.items():
            if path.exists():
                with open(path, "rb") as stream:
                    stream.seek(self._read[path])
                    lines = stream.read()
                whole = lines[: lines.rfind(b"\n") + 1]  # the rest is still being written
                self._read[path] += len(whole)
                for row in map(json.loads, whole.splitlines()):
                    if "format" in row:  # the first line
                        require_format("steps", str(path), row)
                    else:
                        sink(row)
