"""Train a calibrated model with its quantizers on, taught by the float model; keep the best epoch.

checkpoint (calibrated here if it is a float one) ──► student ──► training, the best epoch by the selection images
float model ──► teacher, with distillation                    ──► float, PTQ and QAT on both halves of val
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitq_ray.base.config import InputError
from vitq_ray.cluster.address import require_cluster
from vitq_ray.cluster.qat_group import QatMetrics, TrainWorkers, rank_resources, run_on_workers, worker_bytes
from vitq_ray.cluster.start import cluster
from vitq_ray.cluster.workers import ray_nodes
from vitq_ray.commands import combinations
from vitq_ray.commands.calibrate import apply, calibration_of, collect
from vitq_ray.commands.calibrate import prepare as prepare_calibration
from vitq_ray.commands.inputs import (
    checkpoint_name,
    device_of,
    eval_transform,
    images_calibrated_on,
    load_float,
    open_images,
    paths_of,
    require_as_calibrated,
    require_batch_fits,
    require_labels,
    setting_by_hand,
    training_ids,
    with_sample,
)
from vitq_ray.commands.options import TrainOptions
from vitq_ray.commands.outlets import OutletMeter, begun, numbers, outlets_of
from vitq_ray.commands.outputs import require_apart
from vitq_ray.commands.passes import IN_THIS_PROCESS
from vitq_ray.commands.report import report_at_end
from vitq_ray.commands.resume import stored_run, with_stored
from vitq_ray.commands.runs import search_of
from vitq_ray.commands.screen import (
    SILENT,
    Screen,
    dashboard_hint,
    result_table,
    seconds_line,
    warn_of_bad_images,
    warn_of_left_out,
)
from vitq_ray.commands.training_progress import TrainingProgress
from vitq_ray.data.samples import SampleIndex
from vitq_ray.data.splits import Splits, make_splits
from vitq_ray.engines.execute import default_engine
from vitq_ray.measure.evaluation import Counts
from vitq_ray.models.checkpoint import CalibratedModel, Sidecar, load_calibrated, open_checkpoint, save_calibrated
from vitq_ray.models.load import LoadedModel
from vitq_ray.models.weights import weights_fingerprint
from vitq_ray.qat.ranks import QatData, Ranks, Reader, steps_per_epoch, thread_reader
from vitq_ray.qat.recipe import QatConfig, recipe_of
from vitq_ray.qat.state import STATE, EpochReport, QatOutcome, StepReport, epoch_row
from vitq_ray.qat.task import Judgement, Meter, QatTask, Recorder, is_judged, read_judgement, run_task
from vitq_ray.qat.teacher import TEACHER_LOGITS
from vitq_ray.quant.vit import scales_of
from vitq_ray.run.folder import RunFolder, read_bad_images, record_bad_images
from vitq_ray.run.outlets import Outlets
from vitq_ray.run.results import TRAINING, Stopwatch, left_out_rows, result_of, versions
from vitq_ray.run.site_table import write_scales

# What may differ between a run and its continuation: it does not change what is computed. Images and checkpoints may
# have moved: their fingerprints are compared.
FREE_OPTIONS = frozenset(
    {
        "data_path",
        "pretrained_dir",
        "teacher",
        "resume",
        "output",
        "ray_address",
        "dashboard",
        "log_to",
        "max_failures",
        "decode_threads",
        "checkpoint_steps",
    }
)


@dataclass(frozen=True)
class TrainResult:
    """What `train` came to.

    Attributes:
        folder: of the run.
        checkpoint: path of `<name>_qat.pth`; its sidecar is beside it.
        best_epoch: 0 where no epoch did better on the selection images than the start.
        counts: {float, ptq, qat: {selection, report, val: counts}}.
        result: what `result.json` holds.
    """

    folder: Path
    checkpoint: Path
    best_epoch: int
    counts: Judgement
    result: dict[str, Any]

    @staticmethod
    def of(folder: Path, checkpoint: Path, result: dict[str, Any]) -> TrainResult:
        """From what a run has written."""
        counts = {name: {part: Counts.from_dict(row) for part, row in result[name].items()} for name in MODELS}
        return TrainResult(folder, checkpoint, result["best_epoch"], counts, result)


MODELS = ("float", "ptq", "qat")


@dataclass(frozen=True)
class TrainJob:
    """What a run works with, made by `prepare`. `options` are complete: sample, teacher and split seed decided."""

    options: TrainOptions
    folder: RunFolder
    task: QatTask
    workers: TrainWorkers
    device: torch.device
    split_source: str


def train(options: TrainOptions, screen: Screen = SILENT) -> TrainResult:
    """Train, or go on with a run; a finished one is only read.

    Raises InputError for what is wrong with options, checkpoint or images; DivergedError where the loss is no longer a
    number.
    """
    watch = Stopwatch()
    require_cluster(options.ray_address)
    options = complete(options, screen)
    device, config = device_of(options), config_of(options)
    outlets = outlets_of(options, screen)
    with run_folder(options) as folder:
        job = prepare(options, folder, device, config, watch, screen)
        begin(job, screen)
        return train_in_folder(job, watch, outlets, screen)


def train_in_folder(job: TrainJob, watch: Stopwatch, outlets: Outlets, screen: Screen) -> TrainResult:
    """All of a training, in its folder."""
    options, path = job.options, job.folder.path
    if options.resume is not None and job.folder.finished and is_judged(job.task):
        screen.say(f"{path}: this training is finished; its outcome is in {path / 'result.json'}")
        return TrainResult.of(path, path / f"{checkpoint_name(options)}_qat.pth", job.folder.read_result())
    job.folder.take()  # also of a run that was finished, but is not judged
    with begun(outlets, options, TRAINING, job.folder):
        try:
            with ray_if_needed(options) as url:
                screen.say(f"run folder {path}" + dashboard_hint(url))
                with watch.stage("train"):
                    outcome = run(job, OutletMeter(outlets), screen)
        except KeyboardInterrupt:
            if job.folder.has_work:
                screen.interrupted(path)
            raise
        return finish(job, outcome, watch, outlets, screen)


def finish(job: TrainJob, outcome: QatOutcome, watch: Stopwatch, outlets: Outlets, screen: Screen) -> TrainResult:
    """What training has come to, written and shown."""
    path = job.folder.path
    judgement = read_judgement(path)
    checkpoint, sidecar = save(job, outcome, judgement)
    (path / TEACHER_LOGITS).unlink(missing_ok=True)
    result = trained_result(job, outcome, judgement, sidecar, watch)
    job.folder.write_result(result)
    for name, parts in judgement.items():
        outlets.metrics("step", outcome.epochs[-1].step, numbers(parts["report"], f"report_{name}_"))
    report(job, outcome, judgement, checkpoint, watch, screen)
    report_at_end(path, TRAINING, screen)
    return TrainResult.of(path, checkpoint, result)


def begin(job: TrainJob, screen: Screen) -> None:
    """Write run.json, or see that a resumed run goes on as what it was begun as."""
    if job.options.resume is None:
        job.folder.write_run(describe(job))
        return
    require_same_start(job)
    # The halves of val are compared themselves; earlier versions wrote the seed that was given, not that of the search.
    free = {*FREE_OPTIONS, "split_seed"}
    if (difference := job.folder.require_same(describe(job), free)) is not None:
        screen.warn(f"{job.folder.path}: the run was begun with other versions: {difference}")


def require_same_start(job: TrainJob) -> None:
    """Raise InputError where a checkpoint was given that is not the one that the run was begun with.

    What was trained is compared with start and teacher by `qat.loop`; this is for a run that was not trained yet.
    """
    folder, now = job.folder, job.task.start.sidecar.checkpoint_fingerprint
    stored = folder.read_run()["start"].get("checkpoint_fingerprint")
    if "pretrained_dir" in job.options.given and stored and stored != now:
        what = f"{job.options.name_of('pretrained_dir')}: {job.options.pretrained_dir}"
        raise InputError(f"{folder.path}: this is another training: {what} has other weights or scales than its start")
    if "teacher" in job.options.given and not (folder.path / STATE).exists():
        (folder.path / TEACHER_LOGITS).unlink(missing_ok=True)  # of whichever teacher that was


# Options ------------------------------------------------------------------------------------------------------------


def complete(options: TrainOptions, screen: Screen) -> TrainOptions:
    """The options with those of a resumed run, the sample and whether there is a teacher filled in, and checked."""
    if options.resume is not None:
        options = with_stored(options, stored_run(options.resume, TRAINING)["options"], FREE_OPTIONS)
    of_sample = options.pretrained_dir is None and options.data_path is None
    options = with_sample(options, screen)
    if options.distill is None:
        options = replace(options, distill=of_sample or options.teacher is not None)
    combinations.require_used(options, combinations.TRAIN)
    require_apart(options)
    if {"batch_size", "global_batch_size"} <= options.given:
        one, other = (f"{options.name_of(n)} {getattr(options, n)}" for n in ("batch_size", "global_batch_size"))
        screen.warn(f"{one} does nothing: {other} says how many images a step has")
    return options


def run_folder(options: TrainOptions) -> RunFolder:
    if options.resume is not None:
        return RunFolder.resume(Path(options.resume), TRAINING)
    output = Path(options.output) if options.output else None
    return RunFolder.create(output, TRAINING, options.name_of("output"))


def config_of(options: TrainOptions) -> QatConfig:
    """The options as a training configuration; batch sizes are shared out to the workers here."""
    parts = options.workers[1] * options.accumulate
    global_batch = options.global_batch_size or options.batch_size * parts
    if global_batch % parts:
        raise InputError(
            f"{options.name_of('global_batch_size')}: {global_batch} is not a multiple of {options.workers[1]} "
            f"workers x {options.accumulate} forward passes"
        )
    values = {"global_batch": global_batch, "micro_batch": global_batch // parts, "seed": options.seed}
    return recipe_of({**options.recipe_values(), **values}, bool(options.distill))


# What a run works with ----------------------------------------------------------------------------------------------


def prepare(
    options: TrainOptions, folder: RunFolder, device: torch.device, config: QatConfig, watch: Stopwatch, screen: Screen
) -> TrainJob:
    """Check every option and open every file; calibrate if the checkpoint is a float one."""
    start = load_start(options, folder.path, watch, screen)
    require_batch_fits(options, start.loaded.geometry, config.micro_batch, sees_attention=True)
    with watch.stage("load"):
        classes = start.loaded.geometry.num_classes
        train_images, val = (open_images(options, split, classes) for split in ("train", "val"))
        require_labels_of([train_images, val])
        warn_of_left_out(screen, {"train": train_images, "val": val})
        halves = halves_of_val(options, start.sidecar, train_images, val)
        transform = eval_transform(start.loaded, start.sidecar.crop_pct)
        train_ids = training_ids(train_images, val, screen)
        data = QatData(train_images, train_ids, val, halves.splits.selection, transform)
        teacher = load_teacher(options, start)
        task = QatTask(config, start, teacher, data, halves.splits.report, folder.path, options.checkpoint_steps)
        steps_per_epoch(len(data.train_ids), config)
    least, count = options.workers
    workers = TrainWorkers(count, options.use_gpu, options.max_failures, None if least == count else least)
    return TrainJob(replace(options, split_seed=halves.split_seed), folder, task, workers, device, halves.source)


def require_labels_of(splits: Sequence[SampleIndex]) -> None:
    for index in splits:
        require_labels(index, "which training needs")


def load_start(options: TrainOptions, folder: Path, watch: Stopwatch, screen: Screen) -> CalibratedModel:
    """The calibrated model to start from: the checkpoint, or what a resumed run has, or calibrated now."""
    own = folder / "start" / f"{checkpoint_name(options)}_calib.pth"
    if options.resume is not None and own.exists():
        return load_calibrated(str(own))
    with watch.stage("load"):
        # Of a run that goes on, nobody says again what was given by hand.
        setting = setting_by_hand(options) if options.resume is None else options.setting
        path = paths_of(options)[0]
        start = open_checkpoint(path, options.model_type, options.img_size, options.heads, setting)
    if isinstance(start, LoadedModel):
        calibrate_start(options, start, own.parent, watch, screen)
        return load_calibrated(str(own))
    require_as_calibrated(options, start.sidecar)
    if options.workers[1] > 1 and "decode_threads" in options.given:
        raise combinations.idle_error(options, "decode_threads", "several workers ({num_workers}) read with Ray Data")
    return start


def calibrate_start(options: TrainOptions, loaded: LoadedModel, folder: Path, watch: Stopwatch, screen: Screen) -> None:
    """Calibrate a float checkpoint on images of train, as `calib` does, and write it into `folder`."""
    with watch.stage("load"):
        job = prepare_calibration(options, "train", "shuffled", loaded)
        require_labels_of([job.images, job.val])
    with watch.stage("calibrate"):
        _, look, images = collect(job, options, IN_THIS_PROCESS, screen, unseen=True)
        plan = apply(job, look, images, options.seed, screen)
    record_bad_images(folder.parent, job.bad_images)
    calibration = calibration_of(job, options)
    sidecar = Sidecar.of(
        job.loaded,
        job.setting,
        plan,
        job.val.fingerprint,
        options.seed,
        options.crop_pct,
        calibration,
        accuracy={},
        versions=versions(),
    )
    save_calibrated(folder, checkpoint_name(options), job.model, plan, sidecar)


@dataclass(frozen=True)
class Halves:
    """How val is divided, the seed it was divided by, and where that comes from."""

    splits: Splits
    split_seed: int
    source: str


def halves_of_val(options: TrainOptions, sidecar: Sidecar, train_images: SampleIndex, val: SampleIndex) -> Halves:
    """The halves that the checkpoint was selected by, else those of the split seed.

    One rule wherever the checkpoint lies: half of val has been selected by, and must not be reported on. So a split
    seed that was given and is another is an error.
    """
    searched = splits_of_search_run(paths_of(options)[0], val.fingerprint)
    stored = searched.split_seed if searched else _split_seed_of(sidecar, val)
    if stored is not None and "split_seed" in options.given and options.split_seed != stored:
        raise InputError(
            f"{options.name_of('split_seed')}: {options.split_seed} given, but {options.pretrained_dir} was selected "
            f"with {stored}; another one would report on images it was selected by"
        )
    if searched:
        return searched
    seed = options.split_seed if stored is None else stored
    return Halves(make_splits("train", train_images, val, seed), seed, f"split seed {seed}")


def _split_seed_of(sidecar: Sidecar, val: SampleIndex) -> int | None:
    return sidecar.calibration.get("split_seed") if val.fingerprint == sidecar.data_fingerprint else None


def splits_of_search_run(checkpoint: str, fingerprint: str) -> Halves | None:
    """The splits of the search whose `best/` this checkpoint lies in, if it was on this val."""
    description = search_of(checkpoint)
    if description is None or description["data_fingerprint"] != fingerprint:
        return None
    return Halves(Splits.from_dict(description["splits"]), description["options"]["split_seed"], "search")


def load_teacher(options: TrainOptions, start: CalibratedModel) -> nn.Module | None:
    """The float model to learn from: `teacher`, or the start with its quantizers off."""
    if not options.distill:
        return None
    if options.teacher is None:
        if corrections := start.sidecar.setting.corrections:
            raise InputError(
                f"{options.pretrained_dir}: its weights have corrections ({', '.join(map(str, corrections))}), so that "
                f"without quantizers it is not the float model; expected that one as {options.name_of('teacher')}"
            )
        return start.without_quantizers()
    return load_float(options, "teacher", start.loaded, "the student")


# Running ------------------------------------------------------------------------------------------------------------


def describe(job: TrainJob) -> dict[str, Any]:
    """run.json: everything that decides the outcome."""
    task, data = job.task, job.task.data
    return {
        "options": job.options.to_dict(),
        "config": task.config.to_dict(),
        "splits": {
            "from": job.split_source,
            "selection": data.selection_ids.tolist(),
            "report": task.report_ids.tolist(),
        },
        "start": task.start.sidecar.to_dict(),
        "train_fingerprint": data.train.fingerprint,
        "data_fingerprint": data.val.fingerprint,
    }


def needs_ray(options: TrainOptions) -> bool:
    """One worker trains in this process; Ray then only serves dashboard and metrics."""
    return options.workers[1] > 1 or options.dashboard or options.ray_address is not None


@contextmanager
def ray_if_needed(options: TrainOptions) -> Iterator[str | None]:
    """Ray, for as long as the context lasts; the dashboard's address."""
    if not needs_ray(options):
        yield None
        return
    with cluster(options.ray_address, dashboard=options.dashboard) as ray_cluster:
        yield ray_cluster.dashboard_url


def run(job: TrainJob, meter: Meter, screen: Screen) -> QatOutcome:
    """Train and judge, in this process or on workers."""
    task = job.task
    start = task.start.sidecar.label
    screen.say(
        f"{start}: {task.config.epochs} epochs of {steps_per_epoch(len(task.data.train_ids), task.config)} steps"
    )
    with TrainingProgress(task.config.epochs, screen) as progress:

        def on_step(report: StepReport) -> None:
            progress.step(report)
            meter.step(report)

        def on_epoch(report: EpochReport) -> None:
            progress.epoch(report)
            meter.epoch(report)
            if report.epoch == task.config.epochs and job.workers.count > 1:  # how far it is, the ranks do not say
                screen.say(f"float, PTQ and QAT are counted on all {len(task.data.val)} images of val")

        if job.workers.count == 1:
            return run_here(job, on_step, on_epoch, lambda read: progress.shown(read, task.data.val))
        resources = rank_resources(job.workers, ray_nodes(), worker_bytes(task))
        if resources.warning:
            screen.warn(resources.warning)
        return run_on_workers(task, job.workers, job.options.on_bad_image, on_step, on_epoch, resources)


def run_here(
    job: TrainJob,
    on_step: Callable[[StepReport], None],
    on_epoch: Callable[[EpochReport], None],
    shown: Callable[[Reader], Reader],
) -> QatOutcome:
    """One worker: this process, without Ray Train."""
    options = job.options
    recorder = Recorder(job.folder.path, QatMetrics(job.folder.path.name) if needs_ray(options) else None)
    bad_images: list[tuple[str, str]] = []

    def after_step(report: StepReport) -> None:
        recorder.step(report)
        on_step(report)

    def after_epoch(report: EpochReport) -> None:
        recorder.epoch(report)
        on_epoch(report)
        record_bad_images(job.folder.path, bad_images)

    read = shown(thread_reader(options.decode_threads, options.on_bad_image, bad_images))
    outcome = run_task(job.task, read, Ranks(device=job.device), after_step, after_epoch)
    record_bad_images(job.folder.path, bad_images)
    return outcome


# What is written and shown ------------------------------------------------------------------------------------------


def save(job: TrainJob, outcome: QatOutcome, judgement: Judgement) -> tuple[Path, Sidecar]:
    """`<name>_qat.pth` and its sidecar, whose accuracy is that on all of val."""
    start, options = job.task.start, job.options
    model = copy.deepcopy(start.loaded.model).cpu()
    model.load_state_dict(outcome.best_state)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("._amax")}
    counts = judgement["qat"]["val"]
    qat = {"config": job.task.config.to_dict(), "best_epoch": outcome.best_epoch}
    seed = {} if job.split_source == "search" else {"split_seed": options.split_seed}
    sidecar = replace(
        start.sidecar,
        weights_fingerprint=weights_fingerprint(weights),
        data_fingerprint=job.task.data.val.fingerprint,
        seed=options.seed,
        calibration={**start.sidecar.calibration, **seed, "qat": qat},
        accuracy=counts.accuracy(),
        versions=versions(),
    )
    plan = start.plan.after_training(scales_of(model))
    path = save_calibrated(job.folder.path, checkpoint_name(options), model, plan, sidecar, suffix="qat")
    write_scales(job.folder.path, start.plan, plan)
    return path, sidecar


def trained_result(
    job: TrainJob, outcome: QatOutcome, judgement: Judgement, sidecar: Sidecar, watch: Stopwatch
) -> dict[str, Any]:
    """result.json: the counts at its top are those of QAT on the report images."""
    return result_of(
        TRAINING,
        judgement["qat"]["report"],
        options=job.options.to_dict(),
        setting=sidecar.setting.to_dict(),
        weights_fingerprint=sidecar.weights_fingerprint,
        data_fingerprint=sidecar.data_fingerprint,
        bad_images=read_bad_images(job.folder.path),
        left_out=left_out_rows({"train": job.task.data.train, "val": job.task.data.val}),
        seconds=watch.seconds,
        **{name: {part: c.summary() for part, c in parts.items()} for name, parts in judgement.items()},
        best_epoch=outcome.best_epoch,
        engine=default_engine(job.device).to_dict(),
        epochs=[epoch_row(report) for report in outcome.epochs],
        config=job.task.config.to_dict(),
        name=job.options.name,
        images_also_calibrated_on=images_calibrated_on(job.task.start.sidecar, job.task.data.val),
    )


def report(
    job: TrainJob, outcome: QatOutcome, judgement: Judgement, path: Path, watch: Stopwatch, screen: Screen
) -> None:
    rows = [(name, parts["selection"], parts["report"], "") for name, parts in judgement.items()]
    screen.say("\n" + result_table(rows))
    top1 = {name: parts["report"].top1 for name, parts in judgement.items()}
    if (drop := top1["float"] - top1["ptq"]) > 0:
        share = (top1["qat"] - top1["ptq"]) / drop
        screen.say(f"QAT won back {share:.0%} of the drop of {100 * drop:.2f} points")
    if outcome.best_epoch == 0:
        screen.warn("no epoch did better on the selection images than the start, which is what was written")
    if overlap := images_calibrated_on(job.task.start.sidecar, job.task.data.val):
        screen.warn(f"{overlap} of the images of this val were calibrated on")
    warn_of_bad_images(screen, read_bad_images(job.folder.path))
    screen.say(f"best epoch {outcome.best_epoch}; wrote {path}, {path.with_suffix('.json').name} and result.json")
    screen.say(seconds_line(watch.seconds))
