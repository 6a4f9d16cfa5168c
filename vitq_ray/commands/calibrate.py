"""Calibrate one INT8 setting, evaluate it on all of val, and write the calibrated checkpoint.

    python scripts/calib.py                                          # the bundled sample
    python scripts/calib.py --pretrained_dir ViT-B_16.npz --data-path /data/imagenet --model_type ViT-B_16 \\
        --img_size 384 --num-calib-batch 20 --calib-batchsz 8 --quant-mode ft2 --calibrator percentile \\
        --percentile 99.99 --calib-output-path runs/vit

Writes `<name>_calib.pth`, its sidecar `<name>_calib.json`, and `result.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import output_folder
from vitq_ray.calibration.scales import apply_setting, kinds_needed
from vitq_ray.calibration.setting import Setting
from vitq_ray.cluster.start import cluster
from vitq_ray.cluster.workers import WorkerPool, collect_with, evaluate_on
from vitq_ray.commands import options as cli
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import SampleIndex, open_split
from vitq_ray.data.splits import calibration_ids, default_calib_split, require_images
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.measure.calibration import CalibrationPass, calibration_pass, collect_here
from vitq_ray.measure.evaluation import Evaluation, evaluate, sanity_problem
from vitq_ray.models.checkpoint import Sidecar, save_calibrated
from vitq_ray.models.load import LoadedModel, load_model
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.quantizer import State
from vitq_ray.quant.sites import WEIGHT
from vitq_ray.quant.vit import frozen_weights, quant_blocks, quantize_vit, sites_of
from vitq_ray.run.results import CALIBRATION, Stopwatch, result_of, versions, write_result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__ or "")
    cli.add_model_options(parser)
    cli.add_setting_options(parser)
    cli.add_worker_options(parser)
    parser.add("--calib-batchsz", type=cli.number(int, 1), default=8, help="images per calibration batch")
    parser.add("--calib-split", choices=("train", "val"), help="images to calibrate on; default: train if there")
    parser.add("--calib-order", choices=("shuffled", "map"), default="shuffled", help="which images of the split")
    parser.add("--batch-size", type=cli.number(int, 1), default=64, help="images per evaluation batch")
    parser.add("--calib-output-path", default="runs/calib", help="folder for checkpoint and results")
    parser.add("--calib", action="store_true", help="accepted for the old toolkit's command lines")
    parser.add("--name", help="name of the experiment, kept in result.json")
    return parser.parse_args(argv)


@dataclass
class Job:
    """What a run works with, made by `prepare`."""

    args: argparse.Namespace
    setting: Setting
    loaded: LoadedModel
    model: nn.Module
    transform: EvalTransform
    device: torch.device
    calib: SampleIndex
    calib_split: str
    val: SampleIndex
    bad_images: list[tuple[str, str]]

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) on the model's device."""
        return self.transform.normalize(images.to(self.device))

    def batches(self, index: SampleIndex, ids: Any, size: int) -> Iterator[Batch]:
        args = self.args
        return iter_batches(index, ids, self.transform, size, args.decode_threads, args.on_bad_image, self.bad_images)


def prepare(args: argparse.Namespace) -> Job:
    """Check every option, open every file and make the output folder before a second is spent computing."""
    cli.apply_sample_defaults(args)
    setting, device = cli.setting_from(args), cli.device_from(args)
    split = args.calib_split or default_calib_split(args.data_path)
    loaded = load_model(args.model_type, args.pretrained_dir, args.img_size)
    classes = loaded.geometry.num_classes
    val = open_split(args.data_path, "val", classes)
    calib = val if split == "val" else open_split(args.data_path, split, classes)
    require_images(len(calib), args.num_calib_batch * args.calib_batchsz)
    output_folder(args.calib_output_path, "--calib-output-path")
    model = quantize_vit(loaded.model).to(device)
    return Job(args, setting, loaded, model, cli.eval_transform(loaded, args.crop_pct), device, calib, split, val, [])


def calibrate(job: Job) -> CalibrationPass:
    """One float pass: statistics, how well the float model did on these images, and which images they were."""
    args = job.args
    # Every image of the split in order, so that others move up where a broken one is skipped.
    ids = calibration_ids(len(job.calib), len(job.calib), args.calib_order, args.seed)
    batches = cli.track(job.batches(job.calib, ids, args.calib_batchsz), args.num_calib_batch, "calibrate")
    return calibration_pass(
        job.model,
        batches,
        args.calib_batchsz,
        [args.num_calib_batch],
        job.to_input,
        collect_here if args.num_workers is None else collect_with(lambda: pool(job), args.threads_per_worker),
        kinds=kinds_needed([job.setting]),
        bad_images=job.bad_images,
    )


def evaluate_all(job: Job) -> Evaluation:
    """All of val in map order."""
    size = job.args.batch_size
    batches = cli.track(job.batches(job.val, range(len(job.val)), size), -(-len(job.val) // size), "evaluate")
    with frozen_weights(job.model):
        if job.args.num_workers is None:
            return evaluate(job.model, batches, job.to_input)
        with pool(job) as workers:
            return evaluate_on(workers, batches)


def pool(job: Job) -> WorkerPool:
    """Workers with the model as it is now; Ray is running."""
    args = job.args
    return WorkerPool(job.model, job.transform, args.num_workers, args.threads_per_worker, 1.0 if args.use_gpu else 0.0)


def print_summary(model: nn.Module) -> None:
    """Every quantizer: site, bits, axis, amax, on or off; then the share of all weights that are quantized."""
    print(f"{'site':<70} {'bits':>4} {'axis':>10} {'amax':>23}  state")
    for key, _, quantizer in sites_of(model):
        axis = "per tensor" if quantizer.axis is None else f"axis {quantizer.axis}"
        low, high = quantizer.amax.min().item(), quantizer.amax.max().item()
        amax = f"{high:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        state = "on" if quantizer.state is State.QUANTIZE else "off"
        print(f"{key:<70} {quantizer.bits:>4} {axis:>10} {amax:>23}  {state}")
    on = [q.state is State.QUANTIZE for _, _, q in sites_of(model)]
    print(f"quantizers: {sum(on)} of {len(on)} on; {quantized_weight_share(model):.2%} of all weights quantized")


def quantized_weight_share(model: nn.Module) -> float:
    """Quantized parameters over all parameters, a fraction."""
    states = {key: q.state for key, site, q in sites_of(model) if site.family == WEIGHT}
    weights = [w for block in quant_blocks(model) for w in block.weights().values()]
    quantized = sum(w.numel() for w, state in zip(weights, states.values(), strict=True) if state is State.QUANTIZE)
    return quantized / sum(parameter.numel() for parameter in model.parameters())


def calibration_of(job: Job, seen: CalibrationPass) -> dict[str, Any]:
    """What was calibrated on, for result.json and the sidecar."""
    args = job.args
    return {
        "split": job.calib_split,
        "order": args.calib_order,
        "batches": args.num_calib_batch,
        "batch_size": args.calib_batchsz,
        "sample_ids": seen.sample_ids.tolist(),
        "images_also_evaluated": len(seen.sample_ids) if job.calib_split == "val" else 0,
        "float_top1": seen.evaluation.top1,
        "data_fingerprint": job.calib.fingerprint,
    }


def sidecar_of(job: Job, plan: Plan, evaluation: Evaluation, calibration: dict[str, Any]) -> Sidecar:
    loaded = job.loaded
    return Sidecar.of(
        loaded,
        job.setting,
        plan,
        data_fingerprint=job.val.fingerprint,
        seed=job.args.seed,
        crop_pct=job.args.crop_pct,
        calibration={k: v for k, v in calibration.items() if k != "sample_ids"},
        accuracy=evaluation.accuracy(),
        versions=versions(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    watch = Stopwatch()
    args = parse(argv)
    with watch.stage("load"):
        job = prepare(args)
    with nullcontext() if args.num_workers is None else cluster(args.ray_address, dashboard=False):
        run(job, watch)


def run(job: Job, watch: Stopwatch) -> None:
    """Calibrate, evaluate, save, report."""
    args = job.args
    with watch.stage("calibrate"):
        seen = calibrate(job)
    if problem := sanity_problem(seen.evaluation, job.loaded.geometry.num_classes):
        cli.warn(f"{problem} (measured on the calibration images)")
    with watch.stage("scales"):
        plan = apply_setting(job.model, seen.statistics, job.setting)
    print_summary(job.model)
    for site in plan.degenerate_sites():
        cli.warn(f"{site}: amax is 0, this tensor quantizes to zeros")
    with watch.stage("evaluate"):
        evaluation = evaluate_all(job)
    if evaluation.images == 0:
        raise InputError(f"{args.data_path}: no readable image in val")
    calibration = calibration_of(job, seen)
    folder = Path(args.calib_output_path)
    with watch.stage("save"):
        sidecar = sidecar_of(job, plan, evaluation, calibration)
        path = save_calibrated(folder, cli.checkpoint_name(args), job.model, plan, sidecar)
    result = result_of(
        CALIBRATION,
        evaluation,
        options=vars(args),
        setting=job.setting.to_dict(),
        weights_fingerprint=job.loaded.fingerprint,
        data_fingerprint=job.val.fingerprint,
        bad_images=job.bad_images,
        seconds=watch.seconds,
        model_type=args.model_type,
        img_size=job.loaded.geometry.img_size,
        name=args.name,
        seed=args.seed,
        calibration=calibration,
        degenerate_sites=plan.degenerate_sites(),
    )
    write_result(folder, result)
    report(job, evaluation, path, watch)


def report(job: Job, evaluation: Evaluation, path: Path, watch: Stopwatch) -> None:
    low, high = evaluation.summary()["top1_interval95"]
    print(
        f"{job.setting.label}: top-1 {evaluation.top1:.2%} (95 % interval {low:.2%} to {high:.2%}), "
        f"top-5 {evaluation.top5:.2%} of {evaluation.images} images"
    )
    if job.calib_split == "val":
        cli.warn("calibration images came from val and are among the images evaluated")
    cli.warn_of_bad_images(job.bad_images)
    print(f"wrote {path}, {path.with_suffix('.json').name} and result.json")
    print("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in watch.seconds.items()))
