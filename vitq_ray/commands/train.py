"""Train a calibrated model with its quantizers on, taught by the float model; keep the best epoch.

    python scripts/qat.py                                            # the bundled sample, calibrated first
    python scripts/qat.py --pretrained_dir runs/vit/ViT-B_16_calib.pth --data-path /data/imagenet --distill \\
        --teacher ViT-B_16.npz --model_type ViT-B_16 --num-workers 4 --use-gpu --output runs/vit-qat
    python scripts/qat.py --resume runs/vit-qat                      # go on after an interruption

A float checkpoint is calibrated first, with the setting that --quant-mode, --calibrator, … describe. The best epoch
is chosen on one half of val (selection); float, PTQ and QAT are reported on the other (report). With the bundled
sample distillation is on, otherwise with --distill; its teacher is --teacher, or the checkpoint itself with its
quantizers off. The defaults are the published recipe: SGD, momentum 0.9, dropout 0.1, training images augmented.

Writes run.json, steps.jsonl, epochs.jsonl, state.pt, result.json, `<name>_qat.pth` and its sidecar.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import exists
from vitq_ray.calibration.scales import apply_setting, kinds_needed
from vitq_ray.cluster.qat_group import (
    MAX_FAILURES,
    QatMetrics,
    Workers,
    plan_workers,
    ray_nodes,
    run_on_workers,
    worker_bytes,
)
from vitq_ray.cluster.start import cluster
from vitq_ray.commands import options as cli
from vitq_ray.commands.progress import TrainingProgress
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import Ids, open_split
from vitq_ray.data.splits import Splits, calibration_ids, make_splits, require_images
from vitq_ray.measure.calibration import calibration_pass
from vitq_ray.measure.evaluation import Counts, wilson_interval
from vitq_ray.models.checkpoint import CalibratedModel, Sidecar, is_calibrated, load_calibrated, save_calibrated
from vitq_ray.models.load import load_model
from vitq_ray.models.weights import weights_fingerprint
from vitq_ray.qat.ranks import QatData, Ranks, steps_per_epoch, thread_reader
from vitq_ray.qat.recipe import QatConfig, recipe_of
from vitq_ray.qat.state import EpochReport, QatOutcome, epoch_row
from vitq_ray.qat.task import Judgement, QatTask, Recorder, read_judgement, run_task
from vitq_ray.qat.teacher import TEACHER_LOGITS
from vitq_ray.quant.vit import float_copy, quantize_vit, scales_of
from vitq_ray.run.folder import RunFolder, default_folder, read_bad_images, record_bad_images
from vitq_ray.run.results import TRAINING, Stopwatch, result_of, versions

# What may differ between a run and its continuation: it does not change what is computed.
OPERATIONAL = ("resume", "output", "ray_address", "dashboard", "max_failures", "decode_threads", "checkpoint_steps")
_OF_CALIBRATION = ("quant_mode", "wprec", "aprec", "calibrator", "percentile", "num_calib_batch")


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__ or "")
    cli.add_model_options(parser)
    cli.add_setting_options(parser)
    parser.add("--calib-batchsz", type=cli.number(int, 1), default=8, help="images per calibration batch")
    parser.add("--split-seed", type=cli.number(int, 0), default=0, help="seed of the halves of val")
    parser.add("--distill", action=argparse.BooleanOptionalAction, help="learn from the float model too")
    parser.add("--teacher", help="float checkpoint of the teacher; default: this checkpoint, quantizers off")
    cli.add_recipe_options(parser)
    parser.add("--batch-size", type=cli.number(int, 1), default=32, help="images per worker and forward pass")
    parser.add("--accumulate", type=cli.number(int, 1), default=1, help="forward passes per step")
    parser.add("--global-batch-size", type=cli.number(int, 1), help="images per step; overrides --batch-size")
    parser.add("--num-workers", type=cli.number(int, 1), default=1, help="processes that train together")
    parser.add("--max-failures", type=cli.number(int, 0), default=MAX_FAILURES, help="restarts after a lost worker")
    parser.add("--checkpoint-steps", type=cli.number(int, 1), help="write the state every so many steps, too")
    parser.add("--output", help="folder of the run; default: a new one under runs/")
    parser.add("--resume", help="folder of an interrupted run to go on with")
    parser.add("--ray-address", help="host:port of a Ray cluster, or auto; default: start Ray on this machine")
    parser.add("--dashboard", action=argparse.BooleanOptionalAction, default=True, help="serve Ray's dashboard")
    parser.add("--train", action="store_true", help="accepted for the old toolkit's command lines")
    parser.add("--name", help="name of the experiment, kept in result.json")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """All options, and those that were given; of a resumed run, the options it was started with."""
    args = make_parser().parse_args(argv)
    bare = make_parser()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    given = vars(bare.parse_args(argv))
    if args.resume is None:
        return args, given
    stored = RunFolder.resume(Path(args.resume), TRAINING).read_run()["options"]
    for name, value in given.items():
        if name not in OPERATIONAL and value != stored.get(name):
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option}: {value} given, but {args.resume} was started with {stored.get(name)}")
    operational = {name: getattr(args, name) for name in OPERATIONAL if name in given or name == "resume"}
    return argparse.Namespace(**{**stored, **operational}), {}


@dataclass
class Job:
    """What a run works with, made by `prepare`."""

    args: argparse.Namespace
    folder: RunFolder
    task: QatTask
    workers: Workers
    device: torch.device
    split_source: str
    watch: Stopwatch


def prepare(args: argparse.Namespace, given: dict[str, Any], watch: Stopwatch) -> Job:
    """Check every option and open every file, then calibrate if the checkpoint is a float one."""
    of_sample = args.pretrained_dir is None and args.data_path is None
    cli.apply_sample_defaults(args)
    if args.distill is None:
        args.distill = of_sample or args.teacher is not None
    if args.teacher is not None and not args.distill:
        raise InputError(f"--teacher: {args.teacher} given with --no-distill")
    device = cli.device_from(args)
    folder = run_folder(args)
    with watch.stage("load"):
        start = load_start(args, given, folder.path, watch)
        data, report, source = make_data(args, given, start)
        task = QatTask(
            make_config(args), start, make_teacher(args, start), data, report, folder.path, args.checkpoint_steps
        )
        steps_per_epoch(len(data.train_ids), task.config)
    return Job(args, folder, task, Workers(args.num_workers, args.use_gpu, args.max_failures), device, source, watch)


def run_folder(args: argparse.Namespace) -> RunFolder:
    if args.resume is not None:
        return RunFolder.resume(Path(args.resume), TRAINING)
    return RunFolder.create(Path(args.output) if args.output else default_folder(TRAINING), TRAINING)


def make_config(args: argparse.Namespace) -> QatConfig:
    """The options as a training configuration; batch sizes are shared out to the workers here."""
    parts = args.num_workers * args.accumulate
    global_batch = args.global_batch_size or args.batch_size * parts
    if global_batch % parts:
        raise InputError(
            f"--global-batch-size: {global_batch} is not a multiple of {args.num_workers} workers x "
            f"{args.accumulate} forward passes"
        )
    values = {"global_batch": global_batch, "micro_batch": global_batch // parts, "seed": args.seed}
    return recipe_of({**cli.recipe_values(args), **values}, args.distill)


def load_start(args: argparse.Namespace, given: dict[str, Any], folder: Path, watch: Stopwatch) -> CalibratedModel:
    """The calibrated model to start from: the checkpoint, or what `--resume` finds, or calibrated now."""
    own = folder / "start" / f"{cli.checkpoint_name(args)}_calib.pth"
    if args.resume is not None and own.exists():
        return load_calibrated(str(own))
    if not is_calibrated(args.pretrained_dir):
        calibrate(args, own.parent, watch)
        return load_calibrated(str(own))
    start = load_calibrated(args.pretrained_dir)
    require_same(args, given, start.sidecar)
    return start


def require_same(args: argparse.Namespace, given: dict[str, Any], sidecar: Sidecar) -> None:
    """What the user says of a calibrated checkpoint must be what its sidecar says."""
    setting = sidecar.setting
    stored = dict(
        zip(
            _OF_CALIBRATION,
            (
                setting.mode,
                setting.weight_bits,
                setting.act_bits,
                setting.calibrator.name,
                next(iter(setting.calibrator.values), None),
                setting.num_batches,
            ),
            strict=True,
        )
    )
    stored |= {"img_size": sidecar.geometry.img_size, "crop_pct": sidecar.crop_pct}
    for name, value in stored.items():
        if name in given and given[name] != value:
            option = "--img_size" if name == "img_size" else "--" + name.replace("_", "-")
            raise InputError(f"{option}: {given[name]} given, but {args.pretrained_dir} was calibrated with {value}")


def calibrate(args: argparse.Namespace, folder: Path, watch: Stopwatch) -> None:
    """Calibrate a float checkpoint on images of train, and write it as `<name>_calib.pth` into `folder`."""
    setting = cli.setting_from(args)
    loaded = load_model(args.model_type, args.pretrained_dir, args.img_size)
    index = open_split(args.data_path, "train", loaded.geometry.num_classes)
    val = open_split(args.data_path, "val", loaded.geometry.num_classes)
    size, count = args.calib_batchsz, args.num_calib_batch
    require_images(len(index), size * count)
    transform = cli.eval_transform(loaded, args.crop_pct)
    model = quantize_vit(loaded.model)
    ids = calibration_ids(len(index), len(index), "shuffled", args.seed)
    bad_images: list[tuple[str, str]] = []
    batches = iter_batches(index, ids, transform, size, args.decode_threads, args.on_bad_image, bad_images)
    shown = cli.track(batches, count, "calibrate")
    with watch.stage("calibrate"):
        seen = calibration_pass(
            model,
            shown,
            size,
            [count],
            transform.normalize,
            kinds=kinds_needed([setting]),
            bad_images=bad_images,
        )
        plan = apply_setting(model, seen.statistics, setting)
    record_bad_images(folder.parent, bad_images)
    calibration = {"split": "train", "batches": count, "batch_size": size, "data_fingerprint": index.fingerprint}
    sidecar = Sidecar.of(
        loaded,
        setting,
        plan,
        data_fingerprint=val.fingerprint,
        seed=args.seed,
        crop_pct=args.crop_pct,
        calibration=calibration,
        accuracy={},
        versions=versions(),
    )
    save_calibrated(folder, cli.checkpoint_name(args), model, plan, sidecar)


def make_data(args: argparse.Namespace, given: dict[str, Any], start: CalibratedModel) -> tuple[QatData, Ids, str]:
    """Training images, the two halves of val, and where the halves come from."""
    classes = start.loaded.geometry.num_classes
    train, val = (open_split(args.data_path, split, classes) for split in ("train", "val"))
    of_search = search_splits(args.pretrained_dir, val.fingerprint)
    if of_search is None and val.fingerprint == start.sidecar.data_fingerprint:
        keep_split_seed(args, given, start.sidecar)
    splits = of_search or make_splits("train", train, val, args.split_seed)
    transform = cli.eval_transform(start.loaded, start.sidecar.crop_pct)
    data = QatData(train, np.arange(len(train)), val, splits.selection, transform)
    return data, splits.report, "search" if of_search else f"split seed {args.split_seed}"


def keep_split_seed(args: argparse.Namespace, given: dict[str, Any], sidecar: Sidecar) -> None:
    """Halve val as the search or training did that the checkpoint comes from: half of it has been selected by."""
    seed = sidecar.calibration.get("split_seed")
    if seed is None:
        return
    if given.get("split_seed", seed) != seed:
        raise InputError(
            f"--split-seed: {args.split_seed} given, but {args.pretrained_dir} was selected with {seed}; another one "
            f"would report on images it was selected by"
        )
    args.split_seed = seed


def search_splits(checkpoint: str, fingerprint: str) -> Splits | None:
    """The splits of the search whose `best/` this checkpoint lies in, if it was on this val."""
    run = f"{checkpoint.rpartition('/')[0].rpartition('/')[0]}/run.json"
    if "/best/" not in f"/{checkpoint}" or "://" in checkpoint or not exists(run):
        return None
    description = json.loads(Path(run).read_text())
    splits = description.get("splits")
    if splits is None or description.get("data_fingerprint") != fingerprint:
        return None
    return Splits.from_dict(splits)


def make_teacher(args: argparse.Namespace, start: CalibratedModel) -> nn.Module | None:
    """The float model to learn from: `--teacher`, or the start with its quantizers off."""
    if not args.distill:
        return None
    if args.teacher is None:
        return float_copy(start.loaded.model).eval()
    if is_calibrated(args.teacher):
        raise InputError(f"--teacher: {args.teacher} is a calibrated checkpoint; expected a float one")
    loaded, student = load_model(args.model_type, args.teacher, args.img_size), start.loaded
    classes = student.geometry.num_classes
    if loaded.geometry.num_classes != classes:
        raise InputError(f"--teacher: {args.teacher} has {loaded.geometry.num_classes} classes, the student {classes}")
    theirs = (loaded.geometry.img_size, loaded.mean, loaded.std, loaded.interpolation)
    ours = (student.geometry.img_size, student.mean, student.std, student.interpolation)
    if theirs != ours:
        raise InputError(
            f"--teacher: {args.teacher} takes images of (size, mean, std, interpolation) {theirs}, the student {ours}"
        )
    return loaded.model.eval()


# Running ------------------------------------------------------------------------------------------------------------


def describe(job: Job) -> dict[str, Any]:
    """run.json: everything that decides the outcome."""
    task, data = job.task, job.task.data
    return {
        "options": vars(job.args),
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


def needs_ray(args: argparse.Namespace) -> bool:
    """One worker trains in this process; Ray then only serves dashboard and metrics."""
    return args.num_workers > 1 or args.dashboard or args.ray_address is not None


@contextmanager
def ray_if_needed(args: argparse.Namespace) -> Iterator[str | None]:
    """Ray, for as long as the context lasts; the dashboard's address."""
    if not needs_ray(args):
        yield None
        return
    with cluster(args.ray_address, dashboard=args.dashboard) as ray_cluster:
        yield ray_cluster.dashboard_url


def train(job: Job) -> QatOutcome:
    args, task = job.args, job.task
    start = task.start.sidecar.setting.label
    print(f"{start}: {task.config.epochs} epochs of {steps_per_epoch(len(task.data.train_ids), task.config)} steps")
    with job.watch.stage("train"), TrainingProgress(task.config.epochs) as progress:
        if args.num_workers > 1:
            plan = plan_workers(job.workers, ray_nodes(), worker_bytes(task))
            if plan.warning:
                cli.warn(plan.warning)
            return run_on_workers(task, job.workers, args.on_bad_image, progress.step, progress.epoch, plan)
        return train_alone(job, progress)


def train_alone(job: Job, progress: TrainingProgress) -> QatOutcome:
    """One worker: this process, without Ray Train."""
    recorder = Recorder(job.folder.path, QatMetrics(job.folder.path.name) if needs_ray(job.args) else None)
    bad_images: list[tuple[str, str]] = []

    def on_step(report: Any) -> None:
        recorder.step(report)
        progress.step(report)

    def on_epoch(report: EpochReport) -> None:
        recorder.epoch(report)
        progress.epoch(report)
        record_bad_images(job.folder.path, bad_images)

    read = thread_reader(job.args.decode_threads, job.args.on_bad_image, bad_images)
    outcome = run_task(job.task, read, Ranks(device=job.device), on_step, on_epoch)
    record_bad_images(job.folder.path, bad_images)
    return outcome


def save(job: Job, outcome: QatOutcome, judgement: Judgement) -> tuple[Path, Sidecar]:
    """`<name>_qat.pth` and its sidecar, whose accuracy is that on all of val."""
    start = job.task.start
    model = copy.deepcopy(start.loaded.model).cpu()
    model.load_state_dict(outcome.best_state)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("._amax")}
    counts = judgement["qat"]["val"]
    qat = {"config": job.task.config.to_dict(), "best_epoch": outcome.best_epoch}
    seed = {} if job.split_source == "search" else {"split_seed": job.args.split_seed}
    sidecar = dataclasses.replace(
        start.sidecar,
        weights_fingerprint=weights_fingerprint(weights),
        data_fingerprint=job.task.data.val.fingerprint,
        seed=job.args.seed,
        calibration={**start.sidecar.calibration, **seed, "qat": qat},
        accuracy=counts.accuracy(),
        versions=versions(),
    )
    plan = start.plan.with_amax(scales_of(model))
    path = save_calibrated(job.folder.path, cli.checkpoint_name(job.args), model, plan, sidecar, suffix="qat")
    return path, sidecar


def trained_result(job: Job, outcome: QatOutcome, judgement: Judgement, sidecar: Sidecar) -> dict[str, Any]:
    """result.json: the counts at its top are those of QAT on the report images."""
    return result_of(
        TRAINING,
        judgement["qat"]["report"],
        options=vars(job.args),
        setting=sidecar.setting.to_dict(),
        weights_fingerprint=sidecar.weights_fingerprint,
        data_fingerprint=sidecar.data_fingerprint,
        bad_images=read_bad_images(job.folder.path),
        seconds=job.watch.seconds,
        **{name: {part: c.summary() for part, c in parts.items()} for name, parts in judgement.items()},
        best_epoch=outcome.best_epoch,
        epochs=[epoch_row(report) for report in outcome.epochs],
        config=job.task.config.to_dict(),
        name=job.args.name,
    )


def report(job: Job, outcome: QatOutcome, judgement: Judgement, path: Path) -> None:
    print(f"\n{'':8}{'on selection':>30}{'on report':>30}")
    for name, parts in judgement.items():
        print(f"{name:8}{accuracy_of(parts['selection']):>30}{accuracy_of(parts['report']):>30}")
    top1 = {name: parts["report"].top1 for name, parts in judgement.items()}
    if (drop := top1["float"] - top1["ptq"]) > 0:
        print(f"QAT won back {(top1['qat'] - top1['ptq']) / drop:.0%} of the drop of {100 * drop:.2f} points")
    if outcome.best_epoch == 0:
        cli.warn("no epoch did better on the selection images than the start, which is what was written")
    cli.warn_of_bad_images(read_bad_images(job.folder.path))
    print(f"best epoch {outcome.best_epoch}; wrote {path}, {path.with_suffix('.json').name} and result.json")
    print("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in job.watch.seconds.items()))


def accuracy_of(counts: Counts) -> str:
    low, high = wilson_interval(counts.top1_correct, counts.images)
    return f"{100 * counts.top1:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    args, given = parse(argv)
    job = prepare(args, given, Stopwatch())
    if args.resume is None:
        job.folder.write_run(describe(job))
    elif (difference := job.folder.require_same(describe(job), OPERATIONAL)) is not None:
        cli.warn(f"--resume {args.resume}: the run was begun with other versions: {difference}")
    resume = f"python scripts/qat.py --resume {job.folder.path}"
    try:
        with ray_if_needed(args) as url:
            print(f"run folder {job.folder.path}" + cli.dashboard_hint(url))
            outcome = train(job)
    except KeyboardInterrupt:
        print(f"the state of training is kept; go on with: {resume}", file=sys.stderr)
        raise
    judgement = read_judgement(job.folder.path)
    path, sidecar = save(job, outcome, judgement)
    (job.folder.path / TEACHER_LOGITS).unlink(missing_ok=True)
    job.folder.write_result(trained_result(job, outcome, judgement, sidecar))
    report(job, outcome, judgement, path)
