"""What commands tell the outlets of `run.outlets`: options, candidates of a race, steps of a training, the outcome."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitq_ray.base.config import InputError
from vitq_ray.commands.options import OutletOptions
from vitq_ray.commands.screen import Screen
from vitq_ray.measure.evaluation import Counts
from vitq_ray.measure.racing import Decision, Race
from vitq_ray.qat.state import EpochReport, StepReport
from vitq_ray.run.folder import RunFolder
from vitq_ray.run.outlets import About, Outlets
from vitq_ray.search.contest import Candidate, Listeners


def outlets_of(options: OutletOptions, screen: Screen) -> Outlets:
    """Those that were asked for. InputError where one lacks its package."""
    try:
        return Outlets.to(options.log_to or (), screen.warn)
    except InputError as error:
        raise InputError(f"{options.name_of('log_to')}: {error}") from None


@contextmanager
def begun(outlets: Outlets, options: OutletOptions, script: str, folder: RunFolder | Path) -> Iterator[Outlets]:
    """The outlets of a run, which were told its options, and are told how it ends. InputError where one cannot be
    opened."""
    is_run = isinstance(folder, RunFolder)
    path = folder.path if isinstance(folder, RunFolder) else folder
    identity = folder.read_run().get("id") if isinstance(folder, RunFolder) else None
    resumed = is_run and getattr(options, "resume", None) is not None
    about = About(identity or uuid.uuid4().hex, path.absolute().name, script, path, resumed)
    try:
        outlets.begin(about)
    except InputError as error:
        raise InputError(f"{options.name_of('log_to')}: {error}") from None
    with outlets:
        outlets.params({name: value for name, value in options.to_dict().items() if name != "log_to"})
        yield outlets


def numbers(counts: Counts, prefix: str = "") -> dict[str, float]:
    """The means of some results, by name."""
    return {prefix + name: value for name, value in counts.means.items()}


def racing(race: Race, outlets: Outlets) -> Listeners:
    """Tells of every candidate: its setting, its means by images seen, how it ended."""

    def on_candidate(candidate: Candidate) -> None:
        outlets.params({"label": candidate.setting.label, **flat(candidate.setting.to_dict())}, candidate.name)

    def on_chunk(name: str, images: int) -> None:
        counts = Counts.summed(race.results(name))
        outlets.metrics("images", counts.images, numbers(counts), name)

    def on_decision(decision: Decision) -> None:
        outlets.end(decision.name, decision.verdict.value)
        decided = sum(race.decision(name) is not None for name in race.names)
        values = {"images_evaluated": float(race.images_evaluated)}
        if (leader := race.leader()) is not None:
            values |= numbers(Counts.summed(race.results(leader)), "best_")
        outlets.metrics("candidates_decided", decided, values)

    return Listeners(on_candidate=on_candidate, on_chunk=on_chunk, on_decision=on_decision) if outlets else Listeners()


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as texts."""
    return {name: "; ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}


class OutletMeter:
    """Tells of a training: every step and epoch, by steps."""

    def __init__(self, outlets: Outlets, part: str = "") -> None:
        self._outlets = outlets
        self._part = part

    def step(self, report: StepReport) -> None:
        values = {name: getattr(report, name) for name in ("loss", "lr", "grad_norm", "images_per_second")}
        self._outlets.metrics("step", report.step, values, self._part)

    def epoch(self, report: EpochReport) -> None:
        loss = {} if report.loss is None else {"epoch_loss": report.loss}
        self._outlets.metrics("step", report.step, {"selection_top1": report.selection.top1, **loss}, self._part)
