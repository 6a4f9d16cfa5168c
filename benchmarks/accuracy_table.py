"""Best uniform setting, one refined, best with transforms and corrections, that with learned scales, one trained: on
the same report images.

    python benchmarks/accuracy_table.py --output runs/table                             # 8, 6, 4 bits; ft1, ft2
    python benchmarks/accuracy_table.py --bits 4 --modes ft2 --epochs 16 --output runs/table

Every cell of mode and bits runs what a user would, with `--target MODE`: `tune_calib.py --search-space calib`;
`--search-space quick --refine`; the default space; `learned_ptq`; then `qat.py` from the winner of the default space.
The folders are kept, named after what made them: a command goes on where it was stopped. Each model is then run on the
report images, which no decision has seen. Differences of top-1 are paired, image by image, with 95 % intervals
(`measure/paired.py`); KL is to the float model, in nats, also as a multiple of the uniform setting's. `learned_ptq`
calibrates on 4,096 images, the others on 256 at most. On the bundled sample alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import vitq_ray
from vitq_ray.commands.options import TuneOptions
from vitq_ray.commands.screen import SILENT
from vitq_ray.commands.tune_job import TuneJob, prepare
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.engines.execute import default_engine, executed
from vitq_ray.measure.evaluation import Evaluation, evaluate
from vitq_ray.measure.fidelity import float_part
from vitq_ray.measure.paired import accuracy_difference, mean_ratio
from vitq_ray.models.checkpoint import load_calibrated
from vitq_ray.quant.vit import apply_plan

SEARCHES: dict[str, dict[str, object]] = {
    "uniform": {"search_space": "calib"},
    "refined": {"search_space": "quick", "refine": True},
    "default": {},
    "learned": {"search_space": "learned_ptq"},
}
SAMPLE = Path(vitq_ray.__file__).parent / "sample"
# What `search_spaces/qat.py` has for every run; learning rate and epochs are options here.
RECIPE = {"optimizer": "adamw", "schedule": "cosine", "augment": "none", "dropout": 0.0, "batch_size": 64}


def report_images(job: TuneJob) -> list[Batch]:
    """Decoded, with what the float model says of them."""
    run, found = float_part(job.model), []
    with torch.inference_mode():
        for batch in iter_batches(job.val, job.splits.report.tolist(), job.transform, job.batch_size):
            found.append(Batch(batch.images, batch.labels, batch.sample_ids, run(job.to_input(batch.images))))
    return found


def evaluated(checkpoint: Path, job: TuneJob, batches: Sequence[Batch]) -> Evaluation:
    calibrated = load_calibrated(str(checkpoint))
    model = calibrated.loaded.model
    apply_plan(model, calibrated.plan)
    with executed(model, default_engine(torch.device("cpu"))) as run:
        return evaluate(run, batches, job.to_input)


def searched(folder: Path, **options: object) -> tuple[Path, str]:
    """Checkpoint and name of the winner of a search, which is done where its folder does not have it."""
    known = {"resume": str(folder)} if (folder / "run.json").exists() else {"output": str(folder), **options}
    found = vitq_ray.tune(**known, dashboard=False)
    return found.checkpoint, found.winner.label


def trained(folder: Path, checkpoint: Path, args: argparse.Namespace) -> tuple[Path, str]:
    options = {"pretrained_dir": str(checkpoint), "data_path": str(SAMPLE), "num_epochs": args.epochs}
    taught = {"qat_lr": args.lr, "distill": True, "teacher": str(SAMPLE / "vit.npz")}
    fresh = {**options, **taught, **RECIPE, "seed": args.seed, "split_seed": args.seed, "output": str(folder)}
    known = {"resume": str(folder)} if (folder / "run.json").exists() else fresh
    found = vitq_ray.train(**known, dashboard=False)
    return found.checkpoint, f"epoch {found.best_epoch} of {args.epochs}"


def cell(mode: str, bits: int, job: TuneJob, batches: Sequence[Batch], args: argparse.Namespace) -> None:
    """The rows of one mode at one number of bits."""
    common = {"target": mode, "wprec": bits, "aprec": bits, "seed": args.seed, "split_seed": args.seed}
    folder = args.output / f"{mode}-{bits}-{args.seed}"
    uniform: Evaluation | None = None
    checkpoint = of_default = SAMPLE / "vit.npz"
    names = [name for name in SEARCHES if name not in args.skip]
    for name in (*names, *(["trained"] if args.epochs else [])):
        if name == "trained":
            checkpoint, label = trained(folder / f"{name}-{args.epochs}x{args.lr:g}", of_default, args)
        else:
            checkpoint, label = searched(folder / name, **SEARCHES[name], **common)
            of_default = checkpoint if name == "default" else of_default
        found = evaluated(checkpoint, job, batches)
        uniform = uniform or found
        change = accuracy_difference(found.results["correct"], uniform.results["correct"])
        ratio = mean_ratio(found.results["kl"], uniform.results["kl"])
        print(
            f"{mode} {bits} {name:8} {found.results['correct'].mean():7.2%} "
            f"{100 * change.value:+6.2f} ({100 * change.low:+.2f} to {100 * change.high:+.2f})  "
            f"{found.results['kl'].mean(dtype=float):8.5f} x {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})  "
            f"{label}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--modes", nargs="+", default=["ft1", "ft2"])
    parser.add_argument("--skip", nargs="+", default=[], choices=["refined", "learned"], help="rows left out")
    parser.add_argument("--epochs", type=int, default=8, help="of the training; 0 for none")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0, help="of the splits, too")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    job = prepare(TuneOptions.of({"split_seed": args.seed}), SILENT)
    batches = report_images(job)
    right = sum(int((b.float_logits.argmax(1) == b.labels).sum()) for b in batches) / len(job.splits.report)
    print(f"{len(job.splits.report)} report images, float {right:.2%}; differences to the best uniform setting")
    print(f"{'':17} {'top-1':>7} {'points (95 % interval)':>24}  {'KL':>8}  times (95 % interval)")
    for bits in args.bits:
        for mode in args.modes:
            cell(mode, bits, job, batches, args)


if __name__ == "__main__":
    main()
