"""Evaluate a float or a calibrated checkpoint on all of val, in map order.

    python scripts/evaluate.py                                                         # the bundled sample, float
    python scripts/evaluate.py --pretrained_dir runs/calib/vit_calib.pth --data-path /data/imagenet

Bits and mode of a calibrated checkpoint come from its sidecar. Writes `result.json`, and with `--save-logits` the
arrays `logits` (N, classes), `labels` and `sample_id`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.base.files import atomic_file, output_file, output_folder
from vitq_ray.cluster.start import cluster
from vitq_ray.cluster.workers import WorkerPool, evaluate_on
from vitq_ray.commands import options as cli
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import SampleIndex, open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.measure.evaluation import Evaluation, evaluate, sanity_problem
from vitq_ray.models.checkpoint import Sidecar, is_calibrated, load_calibrated
from vitq_ray.models.geometry import named_geometry
from vitq_ray.models.load import LoadedModel, load_model
from vitq_ray.quant.vit import frozen_weights
from vitq_ray.run.results import EVALUATION, Stopwatch, result_of, write_result

OnBatch = Callable[[Batch, Tensor], None]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__ or "")
    cli.add_model_options(parser)
    cli.add_worker_options(parser)
    parser.add("--batch-size", type=cli.number(int, 1), default=64, help="images per batch")
    parser.add("--engine", choices=("fake",), default="fake", help="fake quantization in floating point")
    parser.add("--quant-mode", type=cli.quant_mode, help="checked against the mode of the calibrated checkpoint")
    parser.add("--limit", type=cli.number(int, 1), help="evaluate only the first N images of val")
    parser.add("--save-logits", help="file (.npz) for the logits of every image")
    parser.add("--output", default="runs/evaluate", help="folder for result.json")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[LoadedModel, Sidecar | None]:
    """The model, and its sidecar if it is a calibrated one."""
    if is_calibrated(args.pretrained_dir):
        calibrated = load_calibrated(args.pretrained_dir)
        _require_same(args, calibrated.sidecar)
        return calibrated.loaded, calibrated.sidecar
    if args.quant_mode is not None:
        raise InputError(
            f"--quant-mode: {args.quant_mode} given, but {args.pretrained_dir} is a float checkpoint; "
            "calibrate it first with scripts/calib.py"
        )
    return load_model(args.model_type, args.pretrained_dir, args.img_size), None


def _require_same(args: argparse.Namespace, sidecar: Sidecar) -> None:
    """What the user says of a calibrated checkpoint must be what its sidecar says."""
    setting, geometry = sidecar.setting, sidecar.geometry
    said = {
        "--quant-mode": (args.quant_mode, setting.mode),
        "--img_size": (args.img_size, geometry.img_size),
        "--crop-pct": (args.crop_pct, sidecar.crop_pct),
    }
    if (named := named_geometry(args.model_type)) is not None:
        said |= {
            f"--model_type {args.model_type}: its {name}": (getattr(named, name), getattr(geometry, name))
            for name in ("patch_size", "width", "depth", "heads", "mlp_width")
        }
    for option, (given, stored) in said.items():
        if given is not None and given != stored:
            raise InputError(f"{option}: {given} given, but {args.pretrained_dir} was calibrated with {stored}")


@contextmanager
def ready(loaded: LoadedModel, sidecar: Sidecar | None) -> Iterator[torch.nn.Module]:
    """The model, with weights quantized once if it is a calibrated one."""
    if sidecar is None:
        yield loaded.model
    else:
        with frozen_weights(loaded.model):
            yield loaded.model


class LogitKeeper:
    """Collects logits for `--save-logits`."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, batch: Batch, logits: Tensor) -> None:
        self.parts.append((logits.float().cpu(), batch.labels, batch.sample_ids))

    def save(self, path: Path) -> None:
        logits, labels, ids = (torch.cat(column).numpy() for column in zip(*self.parts, strict=True))
        with atomic_file(path) as stream:
            np.savez(stream, logits=logits, labels=labels, sample_id=ids)


def _overlap(sidecar: Sidecar | None, index: SampleIndex) -> int:
    """Calibration images that are in this val too: all, if the checkpoint was calibrated on it."""
    if sidecar is None or sidecar.calibration.get("data_fingerprint") != index.fingerprint:
        return 0
    return int(sidecar.calibration["batches"] * sidecar.calibration["batch_size"])


def prepare(args: argparse.Namespace) -> tuple[LoadedModel, Sidecar | None, SampleIndex, torch.device]:
    """Check every option, open every file and make the output folder before a second is spent computing."""
    cli.apply_sample_defaults(args)
    device = cli.device_from(args)
    loaded, sidecar = load(args)
    loaded.model.to(device)
    index = open_split(args.data_path, "val", loaded.geometry.num_classes)
    output_folder(args.output, "--output")
    if args.save_logits:
        output_file(args.save_logits, "--save-logits")
    return loaded, sidecar, index, device


def main(argv: Sequence[str] | None = None) -> None:
    watch, args = Stopwatch(), parse(argv)
    with watch.stage("load"):
        loaded, sidecar, index, device = prepare(args)
    transform = cli.eval_transform(loaded, args.crop_pct if sidecar is None else sidecar.crop_pct)
    ids = range(min(len(index), args.limit or len(index)))
    bad_images: list[tuple[str, str]] = []
    keeper = LogitKeeper()
    keep = keeper if args.save_logits else lambda batch, logits: None
    batches = iter_batches(index, ids, transform, args.batch_size, args.decode_threads, args.on_bad_image, bad_images)
    shown = cli.track(batches, -(-len(ids) // args.batch_size), "evaluate")
    with watch.stage("evaluate"), ready(loaded, sidecar) as model:
        if args.num_workers is None:
            evaluation = evaluate(model, shown, lambda images: transform.normalize(images.to(device)), keep)
        else:
            evaluation = evaluate_sharded(args, model, transform, shown, keep)
    if evaluation.images == 0:
        raise InputError(f"{args.data_path}: no readable image in val")
    if args.save_logits:
        keeper.save(Path(args.save_logits))
    what = "float" if sidecar is None else sidecar.setting.label
    if problem := sanity_problem(evaluation, loaded.geometry.num_classes, what=what):
        cli.warn(problem)
    overlap = _overlap(sidecar, index)
    result = result_of(
        EVALUATION,
        evaluation,
        options=vars(args),
        setting=None if sidecar is None else sidecar.setting.to_dict(),
        weights_fingerprint=loaded.fingerprint,
        data_fingerprint=index.fingerprint,
        bad_images=bad_images,
        seconds=watch.seconds,
        calibration=None if sidecar is None else sidecar.calibration,
        images_also_calibrated_on=overlap,
        checkpoint=args.pretrained_dir,
        model_type=loaded.geometry.model_type,
        img_size=loaded.geometry.img_size,
    )
    write_result(Path(args.output), result)
    report(args, evaluation, what, overlap)
    cli.warn_of_bad_images(bad_images)


def evaluate_sharded(
    args: argparse.Namespace, model: nn.Module, transform: EvalTransform, batches: Iterable[Batch], keep: OnBatch
) -> Evaluation:
    """The same batches on several workers: the same counts, however many there are."""
    with (
        cluster(args.ray_address, dashboard=False),
        WorkerPool(model, transform, args.num_workers, args.threads_per_worker, 1.0 if args.use_gpu else 0.0) as pool,
    ):
        return evaluate_on(pool, batches, keep)


def report(args: argparse.Namespace, evaluation: Evaluation, what: str, overlap: int) -> None:
    low, high = evaluation.summary()["top1_interval95"]
    print(
        f"{what}: top-1 {evaluation.top1:.2%} (95 % interval {low:.2%} to {high:.2%}), "
        f"top-5 {evaluation.top5:.2%} of {evaluation.images} images"
    )
    if overlap:
        cli.warn(f"{overlap} of the images of this val were calibrated on")
    print(f"wrote {Path(args.output) / 'result.json'}")
