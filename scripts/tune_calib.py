"""Find the best calibration settings of a search space: one float pass, then every setting as a Ray Tune trial.

    python scripts/tune_calib.py                                     # the bundled sample
    python scripts/tune_calib.py --pretrained_dir ViT-B_16.npz --data-path /data/imagenet --model_type ViT-B_16 \\
        --select-images 5000 --search-space search_spaces/calib.py --output runs/vit

Calibration images come from train, val is halved: settings are compared on one half (selection), and the winner is
reported on the other (report), which no decision has seen. Writes run.json, statistics.npz, trials.jsonl,
correct.parquet, result.json and best/ into the output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray import cli, live
from vitq_ray.calibrate import CalibrationStatistics, apply_setting, collect_statistics
from vitq_ray.checkpoint import Sidecar, save_calibrated
from vitq_ray.cluster import cluster
from vitq_ray.config import InputError, QuantSetting
from vitq_ray.data.loader import Batch
from vitq_ray.data.samples import (
    Ids,
    SampleIndex,
    calibration_ids,
    class_balanced_order,
    has_split,
    open_split,
    split_halves,
    split_thirds,
)
from vitq_ray.data.source import stream_batches
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.evaluate import Evaluation, evaluate, sanity_problem
from vitq_ray.files import write_json
from vitq_ray.models import LoadedModel, load_model
from vitq_ray.quant.vit import frozen_weights, quantize_vit, quantizers_off
from vitq_ray.run_folder import RunFolder, default_folder
from vitq_ray.search import Candidate, ImageSet, Resources, bytes_of, make_candidates, run_trials, share
from vitq_ray.search_space import SearchSpace, load_space

DEFAULT_SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "calib.py"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__ or "")
    cli.add_model_options(parser)
    cli.add_setting_options(parser)
    cli.add_search_options(parser)
    parser.add("--calib-batchsz", type=cli.number(int, 1), default=8, help="images per calibration batch")
    parser.add("--search-space", default=str(DEFAULT_SPACE), help="Python file that defines SPACE")
    parser.add("--select-images", type=cli.number(int, 1), help="images to compare settings on; default: half of val")
    parser.add("--batch-size", type=cli.number(int, 1), default=100, help="images per evaluation batch")
    parser.add("--split-seed", type=cli.number(int, 0), default=0, help="seed of the three splits")
    parser.add("--min-float-top1", type=cli.number(float, 0, 1), help="refuse to search below this float top-1")
    parser.add("--output", help="folder of the run; default: a new one under runs/")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Splits:
    """Sample ids: what is calibrated on (in `calib_split`), selected on and reported on (both in val)."""

    calib_split: str
    calibration: Ids
    selection: Ids
    report: Ids


@dataclass
class Search:
    """What a search works with, made by `prepare` before anything is computed."""

    args: argparse.Namespace
    space: SearchSpace
    settings: list[QuantSetting]
    loaded: LoadedModel
    model: nn.Module
    transform: EvalTransform
    device: torch.device
    calib: SampleIndex
    val: SampleIndex
    splits: Splits
    resources: Resources
    watch: cli.Stopwatch = field(default_factory=cli.Stopwatch)
    bad_images: list[tuple[str, str]] = field(default_factory=list)

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) on the driver's device."""
        return self.transform.normalize(images.to(self.device))

    def stream(self, index: SampleIndex, ids: Ids, batch_size: int) -> Iterator[Batch]:
        args = self.args
        return stream_batches(index, ids, self.transform, batch_size, args.on_bad_image, self.bad_images)

    @property
    def snapshots(self) -> list[int]:
        return sorted({setting.num_batches for setting in self.settings})


def prepare(args: argparse.Namespace) -> Search:
    """Check every option and open every file."""
    cli.apply_sample_defaults(args)
    space = load_space(args.search_space)
    settings = space.grid(cli.setting_from(args))
    device = cli.device_from(args)
    loaded = load_model(args.model_type, args.pretrained_dir, args.img_size)
    classes = loaded.geometry.num_classes
    val = open_split(args.data_path, "val", classes)
    split = "train" if has_split(args.data_path, "train") else "val"
    calib = open_split(args.data_path, "train", classes) if split == "train" else val
    needed = max(setting.num_batches for setting in settings) * args.calib_batchsz
    splits = make_splits(args, split, calib, val, needed)
    resources = Resources(args.threads_per_trial, 1.0 if args.use_gpu else 0.0, args.max_trials_in_flight)
    model = quantize_vit(loaded.model).to(device)
    transform = cli.eval_transform(loaded, args.crop_pct)
    return Search(args, space, settings, loaded, model, transform, device, calib, val, splits, resources)


def make_splits(
    args: argparse.Namespace, calib_split: str, calib: SampleIndex, val: SampleIndex, needed: int
) -> Splits:
    """The three splits: functions of the data and `--split-seed` alone."""
    if calib_split == "train":
        calibration = calibration_ids(len(calib), needed, "shuffled", args.split_seed)
        selection, report = split_halves(val.labels, val.fingerprint, args.split_seed)
    else:
        calibration, selection, report = split_thirds(val.labels, val.fingerprint, args.split_seed, needed)
        calibration = class_balanced_order(val.labels, calibration, args.split_seed)
    if args.select_images is not None:
        if args.select_images > len(selection):
            raise InputError(
                f"--select-images: {args.select_images} asked for, the selection half has {len(selection)}"
            )
        chosen = class_balanced_order(val.labels, selection, args.split_seed)[: args.select_images]
        selection = np.sort(chosen)
    if min(len(selection), len(report)) == 0:
        raise InputError(f"val: {len(val)} images cannot be halved into selection and report")
    return Splits(calib_split, calibration, selection, report)


def describe(search: Search, folder: Path) -> dict[str, Any]:
    """run.json: everything that decides the outcome."""
    args, splits = search.args, search.splits
    return {
        "options": vars(args),
        "output": str(folder),
        "search_space": {"name": search.space.name, "choices": dict(search.space.choices)},
        "settings": len(search.settings),
        "splits": {
            "calibration": {"split": splits.calib_split, "sample_ids": splits.calibration.tolist()},
            "selection": splits.selection.tolist(),
            "report": splits.report.tolist(),
        },
        "weights_fingerprint": search.loaded.fingerprint,
        "data_fingerprint": search.val.fingerprint,
        "calibration_fingerprint": search.calib.fingerprint,
        "geometry": search.loaded.geometry.to_dict(),
        "versions": cli.versions(),
    }


def calibrate(search: Search) -> CalibrationStatistics:
    """One float pass over the calibration images, with a snapshot at every batch count of the space."""
    size = search.args.calib_batchsz
    batches = search.stream(search.calib, search.splits.calibration, size)
    shown = cli.track(enumerate(batches), search.snapshots[-1], "calibrate")
    full = ((i, search.to_input(batch.images)) for i, batch in shown if len(batch.labels) == size)
    seen: list[int] = []
    statistics = collect_statistics(search.model, full, search.snapshots, on_batch=lambda i, _: seen.append(i))
    if len(seen) < search.snapshots[-1]:
        raise InputError(
            f"calibration: {search.snapshots[-1]} batches of {size} asked for, {len(seen)} are left without the "
            f"{len(search.bad_images)} broken images"
        )
    return statistics


def evaluate_float(search: Search, ids: Ids, keep: list[Batch] | None = None) -> Evaluation:
    """The float model on images of val; the batches are appended to `keep`, decoded."""
    size = search.args.batch_size

    def batches() -> Iterator[Batch]:
        for batch in cli.track(search.stream(search.val, ids, size), -(-len(ids) // size), "float model"):
            if keep is not None:
                keep.append(batch)
            yield batch

    with quantizers_off(search.model):
        return evaluate(search.model, batches(), search.to_input)


def select(
    search: Search, folder: RunFolder, statistics: CalibrationStatistics
) -> tuple[list[Candidate], dict[str, Evaluation]]:
    """Evaluate the float model and every distinct candidate on the selection images; {name: result}."""
    kept: list[Batch] = []
    with search.watch.stage("float"):
        baseline = evaluate_float(search, search.splits.selection, kept)
    if problem := sanity_problem(baseline, search.loaded.geometry.num_classes, search.args.min_float_top1):
        raise InputError(f"{search.args.pretrained_dir}: {problem}; nothing was searched")
    print(f"float: {live.accuracy(baseline)} on the {baseline.images} selection images")
    with search.watch.stage("scales"):
        candidates, scales = make_candidates(search.model, statistics, search.settings)
    for candidate in candidates:
        folder.append("candidate", name=candidate.name, setting=candidate.setting.to_dict(), same_as=candidate.same_as)
    print(f"{len(candidates)} settings, {len(scales)} of them with scales of their own")
    results = {"float": baseline}
    with search.watch.stage("trials"):
        _race(search, folder, candidates, scales, ImageSet.of(kept), baseline, results)
    folder.write_correct(results)
    return candidates, results


def _race(
    search: Search,
    folder: RunFolder,
    candidates: list[Candidate],
    scales: dict[str, Any],
    images: ImageSet,
    baseline: Evaluation,
    results: dict[str, Evaluation],
) -> None:
    args = search.args
    shared = share(
        search.model,
        search.loaded.geometry,
        images,
        candidates,
        scales,
        search.transform,
        args.batch_size,
        search.resources,
    )
    labels = {c.name: c.setting.label for c in candidates if c.same_as is None}

    with live.LiveTable(labels, baseline) as table:

        def on_result(name: str, evaluation: Evaluation, seconds: float) -> None:
            results[name] = evaluation
            counts = {"images": evaluation.images, "top1_correct": evaluation.top1_correct}
            folder.append("result", name=name, **counts, top5_correct=evaluation.top5_correct, seconds=seconds)
            table.add(name, evaluation, seconds)

        run_trials(shared, list(scales), images, search.resources, folder.path / ".tune", on_result)


def report_winner(
    search: Search, folder: RunFolder, statistics: CalibrationStatistics, winner: Candidate
) -> dict[str, Any]:
    """Winner and float model on the report images; writes best/. Returns the counts of both."""
    ids = search.splits.report
    kept: list[Batch] = []
    with search.watch.stage("report"):
        baseline = evaluate_float(search, ids, kept)
        apply_setting(search.model, statistics, winner.setting)
        with frozen_weights(search.model):
            evaluation = evaluate(search.model, cli.track(kept, len(kept), "winner"), search.to_input)
    counts = {"winner": evaluation.summary(), "float": baseline.summary()}
    loaded, args = search.loaded, search.args
    sidecar = Sidecar(
        setting=winner.setting,
        geometry=loaded.geometry,
        mean=loaded.mean,
        std=loaded.std,
        interpolation=loaded.interpolation,
        weights_fingerprint=loaded.fingerprint,
        data_fingerprint=search.val.fingerprint,
        seed=args.seed,
        crop_pct=args.crop_pct,
        calibration={
            "split": search.splits.calib_split,
            "batches": winner.setting.num_batches,
            "batch_size": args.calib_batchsz,
            "data_fingerprint": search.calib.fingerprint,
        },
        accuracy=counts,
        versions=cli.versions(),
    )
    save_calibrated(folder.best, cli.checkpoint_name(args), search.model, sidecar)
    write_json(folder.best / "setting.json", winner.setting.to_dict())
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    search = prepare(args)
    folder = RunFolder(Path(args.output) if args.output else default_folder("tune_calib"))
    folder.write_run(describe(search, folder.path))
    store = 3 * bytes_of(len(search.splits.selection), search.loaded.geometry.img_size)
    with cluster(args.ray_address, object_store_bytes=max(store, 300_000_000), dashboard=args.dashboard) as ray_cluster:
        print(
            f"run folder {folder.path}" + (f", dashboard {ray_cluster.dashboard_url}" * bool(ray_cluster.dashboard_url))
        )
        with search.watch.stage("calibrate"):
            statistics = calibrate(search)
        folder.write_statistics(statistics.to_bytes())
        candidates, results = select(search, folder, statistics)
        by_name = {c.name: c for c in candidates}
        order = live.ranked({name: e for name, e in results.items() if name != "float"})
        winner = by_name[order[0]]
        counts = report_winner(search, folder, statistics, winner)
    finish(search, folder, by_name, results, order, counts)


def finish(
    search: Search,
    folder: RunFolder,
    candidates: dict[str, Candidate],
    results: dict[str, Evaluation],
    order: list[str],
    counts: dict[str, Any],
) -> None:
    """result.json and the last lines on the terminal."""
    winner, worst = candidates[order[0]], candidates[order[-1]]
    folder.append("winner", name=winner.name, report=counts["winner"])
    folder.write_result(
        {
            **counts["winner"],
            "winner": {"name": winner.name, "setting": winner.setting.to_dict()},
            "float": counts["float"],
            "selection": {name: results[name].summary() for name in ("float", *order)},
            "same_as": {c.name: c.same_as for c in candidates.values() if c.same_as},
            "settings": len(candidates),
            "bad_images": cli.bad_image_rows(search.bad_images),
            "seconds": search.watch.seconds,
        }
    )
    print(f"\n{'':8}{'on selection':>34}   on report")
    print(f"{'float':8}{live.accuracy(results['float']):>34}   {_summary(counts['float'])}")
    print(
        f"{'winner':8}{live.accuracy(results[winner.name]):>34}   {_summary(counts['winner'])}   {winner.setting.label}"
    )
    print(f"{'worst':8}{live.accuracy(results[worst.name]):>34}   {'':26}   {worst.setting.label}")
    print(f"\nwrote {folder.best} (setting, checkpoint) and {folder.path / 'result.json'}")
    print("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in search.watch.seconds.items()))


def _summary(counts: dict[str, Any]) -> str:
    low, high = counts["top1_interval95"]
    return f"{live.percent(counts['top1'])} ({100 * low:.2f} to {100 * high:.2f})"


if __name__ == "__main__":
    sys.exit(cli.run(main))
