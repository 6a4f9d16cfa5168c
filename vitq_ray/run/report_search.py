"""A search as its folder tells it, finished or killed half way, for reports.

run.json, trials.jsonl ──► SearchRun: candidates with settings, results and decisions     (always)
result.json            ──► how each candidate ended, seconds of the stages                (where it has come to that)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitq_ray.base.formats import require_format
from vitq_ray.calibration.setting import Setting, read_setting
from vitq_ray.measure.metrics import Column, unpack_text
from vitq_ray.measure.racing import OBJECTIVES, TOP1, Objective
from vitq_ray.run.folder import RunFolder
from vitq_ray.run.results import SEARCH

RACING, WAITING = "racing", "waiting"  # of candidates of a run that is not finished
# Of a run that is not finished, "tied" is who has stopped early.
OUTCOME_ORDER = ("best", "finished", RACING, "tied", "behind", "beaten", WAITING)
_KNOWN_SINCE = 2  # format of the log in which candidates say theirs


@dataclass(frozen=True)
class RaceEntry:
    """A candidate, and what became of it.

    Attributes:
        outcome: best, tied, behind or beaten; of a run that is not finished the verdict, or racing, or waiting.
        forecast: what the planner forecast, less is better.
        results: {metric: (n,)} of the images that count, in the order of the race; of `same_as` where that is set.
        seconds: spent evaluating it.
    """

    name: str
    setting: Setting
    outcome: str
    same_as: str | None
    forecast: float
    results: Mapping[str, Column]
    decision: Mapping[str, Any] | None
    seconds: float

    @property
    def images(self) -> int:
        return max((len(values) for values in self.results.values()), default=0)

    def mean(self, metric: str) -> float | None:
        """Over the images that count; None where it is not known."""
        return float(self.results[metric].mean(dtype=float)) if self.images and metric in self.results else None


@dataclass(frozen=True)
class SearchRun:
    """All that a report of a search draws.

    Attributes:
        run: run.json.
        result: result.json; None of a run that has not come to it.
        entries: candidates, the best outcome first, then by what the race is about.
        leader: the winner, or who leads; None before any image was evaluated.
        images: of the race.
        float_results: {metric: (n,)} of the float model on them.
        float_ids: which images of val they are.
        epochs: of trainings, events of the log.
        began, ended: time of the first and the last event, in seconds since 1970.
    """

    path: Path
    run: Mapping[str, Any]
    result: Mapping[str, Any] | None
    entries: tuple[RaceEntry, ...]
    leader: RaceEntry | None
    images: int
    float_results: Mapping[str, Column]
    float_ids: tuple[int, ...]
    epochs: tuple[Mapping[str, Any], ...]
    began: float
    ended: float

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.run["options"].get("objective", TOP1)]

    @property
    def won_by_race(self) -> bool:
        """The outcome is a candidate as it raced; else parts of it were left in float behind the race."""
        winner = (self.result or {}).get("winner", {}).get("name")
        return winner is None or any(entry.name == winner for entry in self.entries)

    @property
    def winner_label(self) -> str:
        """Of the setting that is reported; of a run that is not finished, of who leads."""
        if self.result is not None:
            size = self.run["options"]["calib_batchsz"]
            return read_setting(self.result["winner"]["setting"], self.result["format"], size).label
        return self.leader.setting.label if self.leader else ""

    @property
    def measured(self) -> tuple[RaceEntry, ...]:
        """Candidates with plans of their own of which images were evaluated."""
        return tuple(entry for entry in self.entries if entry.same_as is None and entry.images)

    @property
    def forecasts(self) -> str:
        """What is forecast: `predicted_kl` or `predicted_noise`."""
        rows = (self.result or {}).get("candidates", {}).values()
        return "predicted_kl" if any("predicted_kl" in row for row in rows) else "predicted_noise"


def read_search(path: Path) -> SearchRun:
    """The search of a folder. InputError where run.json, trials.jsonl or result.json is damaged, or too new."""
    folder = RunFolder.find(path, SEARCH)
    run, events = folder.read_run(), folder.log.events(whole=False)
    result = folder.read_result() if folder.finished else None
    floats = next((e for e in reversed(events) if e["event"] == "float"), None)
    float_ids = tuple(floats["sample_ids"]) if floats else ()
    objective = OBJECTIVES[run["options"].get("objective", TOP1)]
    entries = _entries(events, run, result, str(folder.log.path))
    ordered = sorted(entries, key=lambda entry: _rank(entry, objective))
    leader = ordered[0] if ordered and ordered[0].images else None
    return SearchRun(
        path=path,
        run=run,
        result=result,
        entries=tuple(ordered),
        leader=leader,
        images=len(float_ids),
        float_results=unpack_text(floats, len(float_ids)) if floats else {},
        float_ids=float_ids,
        epochs=tuple(e for e in events if e["event"] in ("qat_epoch", "qat_failed")),
        began=min((e["time"] for e in events if "time" in e), default=0.0),
        ended=max((e["time"] for e in events if "time" in e), default=0.0),
    )


def _rank(entry: RaceEntry, objective: Objective) -> tuple[int, float]:
    mean = entry.mean(objective.metric)
    return OUTCOME_ORDER.index(entry.outcome), float("inf") if mean is None else -objective.sign * mean


def _entries(
    events: Iterable[Mapping[str, Any]], run: Mapping[str, Any], result: Mapping[str, Any] | None, log: str
) -> list[RaceEntry]:
    candidates: dict[str, Mapping[str, Any]] = {}
    chunks: dict[str, list[Mapping[str, Any]]] = {}
    decisions: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event["event"] == "candidate":
            candidates[event["name"]] = event
        elif event["event"] == "chunk":
            chunks.setdefault(event["name"], []).append(event)
        elif event["event"] == "decision":
            decisions[event["name"]] = event
    size = run["options"]["calib_batchsz"]
    entries = []
    for name, event in candidates.items():
        own = event["same_as"] or name
        parts, decision = chunks.get(own, []), decisions.get(own)
        entries.append(
            RaceEntry(
                name,
                read_setting(event["setting"], require_format("log", log, event), size),
                _outcome(name, result, decision, bool(parts)),
                event["same_as"],
                event["predicted_noise"],
                _joined(parts, None if decision is None else decision["images"]),
                decision,
                0.0 if event["same_as"] else sum(part.get("seconds", 0.0) for part in parts),
            )
        )
    return entries


def _outcome(name: str, result: Mapping[str, Any] | None, decision: Mapping[str, Any] | None, has_results: bool) -> str:
    if result is not None and name in result["candidates"]:
        return str(result["candidates"][name]["outcome"])
    if decision is not None:
        return str(decision["verdict"])
    return RACING if has_results else WAITING


def _joined(chunks: Iterable[Mapping[str, Any]], images: int | None) -> dict[str, Column]:
    """Results of chunks after each other, up to the decision; metrics that every chunk has."""
    parts: list[Mapping[str, Column]] = []
    seen = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk["start"]):
        found = unpack_text(chunk, chunk["images"])
        skip = seen - chunk["start"]  # a chunk may have come twice, after the loss of a worker
        if 0 <= skip < chunk["images"]:
            parts.append({metric: values[skip:] for metric, values in found.items()})
            seen = chunk["start"] + chunk["images"]
    names = [name for name in (parts[0] if parts else {}) if all(name in part for part in parts)]
    return {name: np.concatenate([part[name] for part in parts])[:images] for name in names}
