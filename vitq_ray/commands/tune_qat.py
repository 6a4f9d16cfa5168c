"""QAT in a search: where the best setting misses the target, training runs from the best and tied settings.

best and tied settings ──► starts (checkpoints) ──► training runs under Ray Tune, thinned out by ASHA
best epoch by the selection images ──► report images ──► best/<name>_qat.pth
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitq_ray.cluster.qat_trials import run_training
from vitq_ray.commands.countdown import Clock, Every, Pace, duration
from vitq_ray.commands.inputs import checkpoint_name, training_ids
from vitq_ray.commands.outlets import OutletMeter
from vitq_ray.commands.screen import Screen, accuracy
from vitq_ray.commands.tune_job import TuneJob, sidecar_of_search
from vitq_ray.engines.execute import executed
from vitq_ray.measure.evaluation import Evaluation, evaluate, in_points
from vitq_ray.models.checkpoint import load_calibrated, save_calibrated
from vitq_ray.models.weights import weights_fingerprint
from vitq_ray.qat.ranks import QatData, steps_per_epoch
from vitq_ray.qat.state import EpochReport, StepReport, read_outcome
from vitq_ray.qat.task import Meter
from vitq_ray.qat.teacher import TEACHER_LOGITS
from vitq_ray.quant.vit import apply_plan, float_copy, scales_of
from vitq_ray.run.folder import RunFolder, read_bad_images
from vitq_ray.run.outlets import Outlets
from vitq_ray.run.site_table import write_scales
from vitq_ray.search.asha import Epoch, QatContest, TrainingRun, training_runs
from vitq_ray.search.contest import Contest
from vitq_ray.search.optuna_journal import JournalFile
from vitq_ray.search.space import QatSpace


@dataclass(frozen=True)
class Trained:
    """The best epoch of all training runs, on the report images.

    Attributes:
        path: of its checkpoint.
        summary: what result.json says of the training.
    """

    epoch: Epoch
    run: TrainingRun
    report: Evaluation
    path: Path
    summary: dict[str, Any]


def misses_target(job: TuneJob, contest: Contest, baseline: Evaluation, screen: Screen) -> bool:
    """Whether the winner's drop below the float model, on the selection images, is more than the target."""
    winner = contest.race.leader()
    assert winner is not None
    drop = in_points(baseline.top1 - float(contest.race.results(winner)["correct"].mean()))
    met = drop <= job.options.target_drop
    verdict = "met, no QAT" if met else "missed: QAT"
    screen.say(f"the best setting is {drop:.2f} points below float, target {job.options.target_drop:g}: {verdict}")
    return not met


def escalate(
    job: TuneJob,
    space: QatSpace,
    folder: RunFolder,
    contest: Contest,
    journal: JournalFile,
    outlets: Outlets,
    screen: Screen,
) -> Trained:
    """QAT from the best and tied settings; the best epoch by the selection images, reported on the report images."""
    home = folder.path / "qat"
    starts = save_starts(job, home / "starts", contest, space.starts)
    training = QatContest(training_runs(space, list(starts), job.options.seed), space, folder.append)
    training.replay(folder.events())
    data = QatData(
        job.calib, training_ids(job.calib, job.val, screen), job.val, np.sort(job.splits.selection), job.transform
    )
    teacher = float_copy(job.model).cpu().eval()
    show, progress = epoch_listener(training, screen), TrainingsProgress(training, len(data.train_ids), screen)

    def on_epoch(epoch: Epoch) -> None:
        show(epoch)
        journal.refresh()
        if (status := training.status(epoch.name)) is not None:
            outlets.end(epoch.name, status)

    def meter_of(name: str) -> Meter:
        run = training.runs[name]
        outlets.params({"start": run.start, **run.config.to_dict()}, name)
        return MeterOfRun(OutletMeter(outlets, name), partial(progress.step, name))

    with job.watch.stage("qat"):
        run_training(training, starts, teacher, data, home, job.resources, job.options.on_bad_image, on_epoch, meter_of)
    for name in training.failed:
        outlets.end(name, "failed")
    for name in training.runs:
        job.bad_images.extend(read_bad_images(home / name))
        (home / name / TEACHER_LOGITS).unlink(missing_ok=True)
    return report_trained(job, folder, training, starts, screen)


def save_starts(job: TuneJob, home: Path, contest: Contest, count: int) -> dict[str, str]:
    """{candidate: path of its checkpoint} of the best and tied settings, best first.

    One that an earlier start of this run wrote is kept: the states of its trainings name it by its fingerprint.
    """
    outcome = contest.outcome()
    names = [n for n in contest.race.names if outcome[n] in ("best", "tied")]
    names.sort(key=lambda n: (outcome[n] != "best", -contest.race.objective.sign * contest.race.mean(n)))
    paths = {}
    for name in names[:count]:
        chosen, path = contest.candidates[name], home / f"{name}_calib.pth"
        if not (path.exists() and load_calibrated(str(path)).plan.key == chosen.plan.key):
            apply_plan(job.model, chosen.plan)
            sidecar = sidecar_of_search(job, chosen.setting, chosen.plan, {})
            path = save_calibrated(home, name, job.model, chosen.plan, sidecar)
        paths[name] = str(path.absolute())
    return paths


def epoch_listener(training: QatContest, screen: Screen) -> Callable[[Epoch], None]:
    """Says a line for every epoch of every run."""

    def show(epoch: Epoch) -> None:
        loss = "start" if epoch.loss is None else f"loss {epoch.loss:.4f}"
        stop = ", stopped" if epoch.name in training.stopped else ""
        screen.say(
            f"{epoch.name} lr {training.runs[epoch.name].config.lr:g}, epoch {epoch.epoch}: {loss}, "
            f"selection {accuracy(epoch.top1_correct, epoch.images)}{stop}"
        )

    return show


@dataclass(frozen=True)
class MeterOfRun:
    """Outlets, and the progress of all runs."""

    outlet: Meter
    on_step: Callable[[StepReport], None]

    def step(self, report: StepReport) -> None:
        self.outlet.step(report)
        self.on_step(report)

    def epoch(self, report: EpochReport) -> None:
        self.outlet.epoch(report)


class TrainingsProgress:
    """How far all runs are, a line every 30 seconds; runs that stop early take less than it says."""

    def __init__(self, training: QatContest, images: int, screen: Screen, clock: Clock = time.monotonic) -> None:
        self._training = training
        self._say = screen.say
        self._pace, self._every = Pace(clock), Every(clock=clock)
        runs = training.runs.values()
        self._totals = {run.name: run.config.epochs * steps_per_epoch(images, run.config) for run in runs}
        self._images = {run.name: run.config.global_batch for run in runs}
        self._steps = {
            name: self._totals[name] * max(0, len(epochs) - 1) // training.runs[name].config.epochs
            for name, epochs in training.history.items()
        }
        self._seen = 0

    def step(self, name: str, report: StepReport) -> None:
        self._steps[name] = max(report.step, self._steps[name])
        self._seen += report.images
        self._pace.at(self._seen)
        if self._every.due:
            self._say(self.text)

    @property
    def text(self) -> str:
        unfinished = self._training.unfinished()
        images = sum((self._totals[name] - self._steps[name]) * self._images[name] for name in unfinished)
        left = self._pace.seconds_for(images)
        known = "" if left is None else f", at most {duration(left)} left"
        return f"training: {len(self._totals) - len(unfinished)} of {len(self._totals)} runs done{known}"


def report_trained(
    job: TuneJob, folder: RunFolder, training: QatContest, starts: Mapping[str, str], screen: Screen
) -> Trained:
    """The best epoch of all runs, evaluated and saved."""
    run = training.runs[training.best().name]
    outcome = read_outcome(folder.path / "qat" / run.name)
    known = outcome.epochs[outcome.best_epoch].selection  # the state may be an epoch ahead of the log
    best = Epoch(run.name, outcome.best_epoch, known.images, known.top1_correct, training.best().loss)
    start = load_calibrated(starts[run.start])
    model = start.loaded.model.to(job.device)
    model.load_state_dict(outcome.best_state)
    size, ids = job.batch_size, job.splits.report
    with job.watch.stage("report"), executed(model, job.engine) as run_model:
        batches = screen.track(job.stream(job.val, ids, size), -(-len(ids) // size), "report")
        evaluation = evaluate(run_model, batches, job.to_input)
    recipe = {"config": run.config.to_dict(), "best_epoch": best.epoch, "run": run.name}
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("._amax")}
    sidecar = replace(
        start.sidecar,
        weights_fingerprint=weights_fingerprint(weights),
        calibration={**start.sidecar.calibration, "qat": recipe},
        accuracy={"qat": evaluation.summary()},
    )
    plan = start.plan.after_training(scales_of(model))
    path = save_calibrated(folder.best, checkpoint_name(job.options), model, plan, sidecar, suffix="qat")
    write_scales(folder.path, start.plan, plan)
    summary = {
        **evaluation.summary(),
        **recipe,
        "start": start.sidecar.setting.to_dict(),
        "selection": {"images": best.images, "top1_correct": best.top1_correct, "top1": best.top1},
        "runs": {n: {"config": r.config.to_dict(), "start": r.start} for n, r in training.runs.items()},
        "stopped": sorted(training.stopped),
        "failed": training.failed,
        "epochs": {name: [asdict(epoch) for epoch in epochs] for name, epochs in training.history.items()},
    }
    return Trained(best, run, evaluation, path, summary)
