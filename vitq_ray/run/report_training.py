"""A training as its folder tells it, finished or killed half way, for reports; also one run of a search that trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitq_ray.run.folder import RunFolder
from vitq_ray.run.report_parts import json_lines
from vitq_ray.run.results import TRAINING


@dataclass(frozen=True)
class TrainingCurve:
    """One run.

    Attributes:
        epochs: (epoch, loss or None, images right, images) of the selection images; epoch 0 is the start.
        steps: (epochs passed, loss) of every step, where they were kept.
        ended: `stopped` by ASHA, `failed`, or nothing.
    """

    name: str
    label: str
    epochs: tuple[tuple[int, float | None, int, int], ...]
    steps: tuple[tuple[float, float], ...] = ()
    ended: str = ""


@dataclass(frozen=True)
class TrainingRun:
    """All that a report of a training draws: run.json, result.json (None where it has not come to that), its curve."""

    path: Path
    run: Mapping[str, Any]
    result: Mapping[str, Any] | None
    curve: TrainingCurve


def read_training(path: Path) -> TrainingRun:
    """The training of a folder. InputError where its files are damaged, or of a newer version."""
    folder = RunFolder.find(path, TRAINING)
    run, result = folder.read_run(), folder.read_result() if folder.finished else None
    epochs = {row["epoch"]: _epoch(row) for row in json_lines(path / "epochs.jsonl")}
    steps = _steps(json_lines(path / "steps.jsonl"), run["config"]["epochs"])
    label = f"lr {run['config']['lr']:g}, batch {run['config']['global_batch']}"
    return TrainingRun(path, run, result, TrainingCurve("training", label, tuple(epochs.values()), steps))


def _epoch(row: Mapping[str, Any]) -> tuple[int, float | None, int, int]:
    counts = row["selection"]
    return row["epoch"], row["loss"], counts["top1_correct"], counts["images"]


def _steps(rows: Iterable[Mapping[str, Any]], epochs: int) -> tuple[tuple[float, float], ...]:
    """A step that was done again after a kill counts once."""
    found = {row["step"]: (row["step"] / row["total_steps"] * epochs, row["loss"]) for row in rows}
    return tuple(found[step] for step in sorted(found))


def curves_of_search(events: Iterable[Mapping[str, Any]], result: Mapping[str, Any] | None) -> list[TrainingCurve]:
    """Of the training runs of a search, from its log."""
    epochs: dict[str, dict[int, tuple[int, float | None, int, int]]] = {}
    failed = set()
    for event in events:
        if event["event"] == "qat_failed":
            failed.add(event["name"])
        else:
            row = (event["epoch"], event["loss"], event["top1_correct"], event["images"])
            epochs.setdefault(event["name"], {})[event["epoch"]] = row
    trained = (result or {}).get("qat", {})
    stopped, runs = set(trained.get("stopped", ())), trained.get("runs", {})
    curves = []
    for name, rows in sorted(epochs.items()):
        config = runs.get(name, {}).get("config")
        label = f"{name}, lr {config['lr']:g}, batch {config['global_batch']}" if config else name
        ended = "failed" if name in failed else "stopped" if name in stopped else ""
        curves.append(TrainingCurve(name, label, tuple(rows.values()), (), ended))
    return curves
