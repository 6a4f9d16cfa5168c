"""Evaluate a float or a calibrated checkpoint on all of val, in map order.

    python scripts/evaluate.py                                                         # the bundled sample, float
    python scripts/evaluate.py --pretrained_dir runs/calib/vit_calib.pth --data-path /data/imagenet

Bits and mode of a calibrated checkpoint come from its sidecar. Writes `result.json`, and with `--save-logits` the
arrays `logits` (N, classes), `labels` and `sample_id`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitq_ray import cli
from vitq_ray.checkpoint import is_calibrated, load_calibrated
from vitq_ray.config import InputError, QuantSetting
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.evaluate import Evaluation, evaluate, float_sanity_problem
from vitq_ray.files import atomic_file, write_json
from vitq_ray.models import LoadedModel, load_model
from vitq_ray.quant.vit import frozen_weights


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__ or "")
    cli.add_model_options(parser)
    parser.add("--batch-size", type=cli.number(int, 1), default=64, help="images per batch")
    parser.add("--engine", choices=("fake",), default="fake", help="fake: fake quantization in floating point")
    parser.add("--quant-mode", type=cli.quant_mode, help="checked against the mode of the calibrated checkpoint")
    parser.add("--limit", type=cli.number(int, 1), help="evaluate only the first N images of val")
    parser.add("--save-logits", help="file (.npz) for the logits of every image")
    parser.add("--output", default="runs/evaluate", help="folder for result.json")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[LoadedModel, QuantSetting | None]:
    """The model, and its setting if it is a calibrated one."""
    if is_calibrated(args.pretrained_dir):
        calibrated = load_calibrated(args.pretrained_dir)
        _require_same(args, calibrated.sidecar.setting, calibrated.loaded)
        return calibrated.loaded, calibrated.sidecar.setting
    if args.quant_mode is not None:
        raise InputError(
            f"--quant-mode: {args.quant_mode} given, but {args.pretrained_dir} is a float checkpoint; "
            "calibrate it first with scripts/calib.py"
        )
    return load_model(args.model_type, args.pretrained_dir, args.img_size), None


def _require_same(args: argparse.Namespace, setting: QuantSetting, loaded: LoadedModel) -> None:
    """What the user says of a calibrated checkpoint must be what its sidecar says."""
    geometry = loaded.geometry
    said = {
        "--quant-mode": (args.quant_mode, setting.mode),
        "--img_size": (args.img_size, geometry.img_size),
        "--model_type": (None if args.model_type == "auto" else args.model_type, geometry.model_type),
    }
    for option, (given, stored) in said.items():
        if given is not None and given != stored:
            raise InputError(f"{option}: {given} given, but {args.pretrained_dir} was calibrated with {stored}")


@contextmanager
def ready(loaded: LoadedModel, setting: QuantSetting | None) -> Iterator[torch.nn.Module]:
    """The model, with weights quantized once if it is a calibrated one."""
    if setting is None:
        yield loaded.model
    else:
        with frozen_weights(loaded.model):
            yield loaded.model


class LogitKeeper:
    """Collects logits for `--save-logits`."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Batch]] = []

    def __call__(self, batch: Batch, logits: Tensor) -> None:
        self.parts.append((logits.float().cpu(), batch))

    def save(self, path: Path) -> None:
        logits = torch.cat([part for part, _ in self.parts]).numpy()
        labels = torch.cat([batch.labels for _, batch in self.parts]).numpy()
        ids = torch.cat([batch.sample_ids for _, batch in self.parts]).numpy()
        with atomic_file(path) as stream:
            np.savez(stream, logits=logits, labels=labels, sample_id=ids)


def describe(
    args: argparse.Namespace, evaluation: Evaluation, loaded: LoadedModel, setting: QuantSetting | None
) -> dict[str, Any]:
    return {
        **evaluation.summary(),
        "setting": None if setting is None else setting.to_dict(),
        "engine": args.engine,
        "checkpoint": args.pretrained_dir,
        "model_type": loaded.geometry.model_type,
        "img_size": loaded.geometry.img_size,
        "weights_fingerprint": loaded.fingerprint,
        "versions": cli.versions(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    watch, args = cli.Stopwatch(), parse(argv)
    with watch.stage("load"):
        cli.apply_sample_defaults(args)
        device = cli.device_from(args)
        loaded, setting = load(args)
        loaded.model.to(device)
        index = open_split(args.data_path, "val", loaded.geometry.num_classes)
    transform = cli.eval_transform(loaded)
    ids = range(min(len(index), args.limit or len(index)))
    bad_images: list[tuple[str, str]] = []
    keeper = LogitKeeper()
    keep = keeper if args.save_logits else lambda batch, logits: None
    batches = iter_batches(index, ids, transform, args.batch_size, args.num_workers, args.on_bad_image, bad_images)
    with watch.stage("evaluate"), ready(loaded, setting) as model:
        shown = cli.track(batches, -(-len(ids) // args.batch_size), "evaluate")
        evaluation = evaluate(model, shown, lambda images: transform.normalize(images.to(device)), keep)
    if evaluation.images == 0:
        raise InputError(f"{args.data_path}: no readable image in val")
    if args.save_logits:
        keeper.save(Path(args.save_logits))
    if problem := float_sanity_problem(evaluation):
        cli.warn(problem if setting is None else problem.replace("float top-1", "top-1"))
    result = describe(args, evaluation, loaded, setting)
    result["data_fingerprint"] = index.fingerprint
    result["bad_images"] = [{"image": name, "reason": reason} for name, reason in bad_images]
    write_json(Path(args.output) / "result.json", {**result, "seconds": watch.seconds})
    report(args, evaluation, setting, len(bad_images))


def report(args: argparse.Namespace, evaluation: Evaluation, setting: QuantSetting | None, bad: int) -> None:
    low, high = evaluation.summary()["top1_interval95"]
    print(
        f"{'float' if setting is None else setting.label}: top-1 {evaluation.top1:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%}), top-5 {evaluation.top5:.2%} of {evaluation.images} images"
    )
    if bad:
        cli.warn(f"{bad} broken images were skipped; they are listed in result.json")
    print(f"wrote {Path(args.output) / 'result.json'}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
