"""QAT in a search: training runs from the best and tied settings, as Ray Tune trials, thinned out by ASHA.

    settings that calibration left ──► starts (calibrated checkpoints)
    starts × rows of a QatSpace    ──► training runs ──► an epoch's selection accuracy ──► go on or stop
    every run keeps its state in a folder of its own; trials.jsonl has every epoch

A search that was killed reads the epochs from the log in the order in which they came, which makes the same decisions
again; runs that were neither stopped nor finished go on from their state.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from torch import nn

from vitq_ray.base.config import InputError
from vitq_ray.base.device import device_for
from vitq_ray.cluster.trials import Resources, fit, require_room
from vitq_ray.measure.evaluation import NonFiniteLogitsError
from vitq_ray.models.checkpoint import load_calibrated
from vitq_ray.qat.loop import DivergedError, train_qat
from vitq_ray.qat.ranks import QatData, Ranks, thread_reader
from vitq_ray.qat.state import EpochReport, read_outcome
from vitq_ray.qat.task import Follower, Meter, Recorder
from vitq_ray.run.folder import TUNE_FOLDER, record_bad_images
from vitq_ray.search.asha import Epoch, QatContest, TrainingRun

_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class _Shared:
    """What every training run reads."""

    runs: Mapping[str, TrainingRun]
    starts: Mapping[str, str]  # {start: path of its checkpoint}
    teacher: ray.ObjectRef[nn.Module]
    data: ray.ObjectRef[QatData]
    folder: Path
    threads: int
    on_bad_image: str
    use_gpu: bool


def _train(config: dict[str, Any], shared: _Shared) -> None:
    """What a Tune worker runs: one training run, from its start or from where its folder has it."""
    torch.set_num_threads(shared.threads)
    run = shared.runs[config["run"]]

    def on_epoch(report: EpochReport) -> None:
        counts = report.selection
        epoch = Epoch(run.name, report.epoch, counts.images, counts.top1_correct, report.loss)
        tune.report(dataclasses.asdict(epoch))

    folder = shared.folder / run.name
    if (folder / "state.pt").exists():  # what an earlier process may have trained, but not reported
        for known in read_outcome(folder).epochs:
            on_epoch(known)
    bad_images: list[tuple[str, str]] = []
    try:
        _train_run(run, shared, bad_images, on_epoch)
    except (DivergedError, NonFiniteLogitsError) as error:  # it would come to the same point every time
        record_bad_images(folder, bad_images)
        tune.report({"name": run.name, "failure": str(error)})


def _train_run(
    run: TrainingRun, shared: _Shared, bad_images: list[tuple[str, str]], on_epoch: Callable[[EpochReport], None]
) -> None:
    device = device_for(shared.use_gpu)
    folder = shared.folder / run.name
    recorder = Recorder(folder)

    def after_epoch(report: EpochReport) -> None:
        record_bad_images(folder, bad_images)
        recorder.epoch(report)
        on_epoch(report)

    train_qat(
        run.config,
        load_calibrated(shared.starts[run.start]),
        copy.deepcopy(ray.get(shared.teacher)),
        ray.get(shared.data),
        folder,
        thread_reader(max(2, shared.threads), shared.on_bad_image, bad_images),
        Ranks(device=device),
        on_step=recorder.step,
        on_epoch=after_epoch,
    )


class _Scheduler(FIFOScheduler):
    """Lets the contest see every epoch; says CONTINUE or STOP."""

    def __init__(self, contest: QatContest, on_epoch: Callable[[Epoch], None]) -> None:
        super().__init__()
        self._contest = contest
        self._on_epoch = on_epoch
        self.error: Exception | None = None  # of the contest, such as a full disk: Tune would wrap it

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its parts for its own restore, which is not used here

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        try:
            return self._take(result)
        except Exception as error:
            self.error = error
            raise

    def _take(self, result: dict[str, Any]) -> str:
        if result.get("failure"):
            self._contest.fail(result["name"], result["failure"])
            return str(TrialScheduler.STOP)
        epoch = Epoch(**{f.name: result[f.name] for f in dataclasses.fields(Epoch)})
        stop = self._contest.take(epoch)
        self._on_epoch(epoch)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE


class _Looks(tune.Callback):
    """Now and then, and after all: what trials have recorded since."""

    def __init__(self, followers: Sequence[Follower]) -> None:
        self._followers = followers
        self._next = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"_followers": (), "_next": 0.0}  # as above

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() >= self._next:
            self.look()
            self._next = time.monotonic() + _SECONDS_BETWEEN_LOOKS

    def look(self) -> None:
        for follower in self._followers:
            follower.look()


def run_training(
    contest: QatContest,
    starts: Mapping[str, str],
    teacher: nn.Module,
    data: QatData,
    folder: Path,
    resources: Resources,
    on_bad_image: str = "error",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    meter_of: Callable[[str], Meter] | None = None,
    max_failures: int = 3,
) -> None:
    """Train every unfinished run of the contest. States are kept in `folder/<run>`, which all nodes must see.

    `meter_of` a run sees its steps and epochs here, a moment later.

    Raises InputError where no node can hold a run, or where a run met bad input; OSError such as of a full disk;
    RuntimeError where a run failed for good.
    """
    names = contest.unfinished()
    if not names:
        return
    require_room(resources)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    shared = _Shared(
        runs=contest.runs,
        starts=starts,
        teacher=ray.put(copy.deepcopy(teacher).cpu()),
        data=ray.put(data),
        folder=folder.absolute(),
        threads=resources.threads,
        on_bad_image=on_bad_image,
        use_gpu=resources.gpus > 0,
    )
    meters = {} if meter_of is None else {name: meter_of(name) for name in names}
    looks = _Looks([Follower(folder / name, meter.step, meter.epoch) for name, meter in meters.items()])
    need = {"cpu": resources.threads, "gpu": resources.gpus}
    scheduler = _Scheduler(contest, on_epoch)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_train, shared=shared), need),
        param_space={"run": tune.grid_search(names)},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=resources.in_flight,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str((folder / TUNE_FOLDER).absolute()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[looks],
        ),
    )
    outcome = fit(tuner, folder / TUNE_FOLDER, lambda: scheduler.error)
    looks.look()
    if outcome.num_errors:
        raise _cause(outcome.errors[0], len(outcome))


def _cause(error: BaseException, count: int) -> Exception:
    inner = getattr(error, "cause", None)
    if isinstance(inner, InputError | OSError):
        return inner
    return RuntimeError(f"of {count} training runs, one failed: {error}")


def _trial_name(trial: Any) -> str:
    return str(trial.config["run"])
