"""What a race saves: every setting evaluated once on all images, then raced offline by each objective.

    python benchmarks/race_replay.py --bits 8 --output runs/replay      # minutes; goes on where it was stopped
    python benchmarks/race_replay.py --bits 8 6 5 4 --output runs/replay

The settings are those of a search space on the bundled sample, or on the model and images that are given, calibrated
once, and are raced on the selection images of several split seeds. Printed for every objective: images evaluated as a
share of a full evaluation, settings that end tied with the winner, the winner's place among all settings where all
images of all are evaluated (by the same objective; 1: the race lost nothing), and its regret in top-1: by how much the
best of all settings, on the same images, is better. The winner's top-1 on the report images is what a user gets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vitq_ray.base.files import atomic_file
from vitq_ray.calibration.planner import needs_sensitivity
from vitq_ray.calibration.scales import Scales, noise_per_site
from vitq_ray.calibration.setting import Setting
from vitq_ray.commands.options import TuneOptions
from vitq_ray.commands.screen import SILENT
from vitq_ray.commands.tune_job import TuneJob, prepare
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import Ids
from vitq_ray.data.splits import class_balanced_order, race_order, split_val
from vitq_ray.engines.execute import executed
from vitq_ray.measure.calibration import calibration_pass
from vitq_ray.measure.evaluation import evaluate
from vitq_ray.measure.fidelity import float_part
from vitq_ray.measure.metrics import pack, unpack
from vitq_ray.measure.racing import FIDELITY, TOP1, Race, chunks_left, standings
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan
from vitq_ray.search.contest import race_rules

Results = dict[str, np.ndarray]


def plans_of(job: TuneJob) -> list[tuple[Setting, Plan]]:
    """Every setting with scales of its own, in the order in which a search races them."""
    size = job.options.calib_batchsz
    batches = iter_batches(job.calib, job.splits.calibration.tolist(), job.transform, size)
    statistics = calibration_pass(job.model, batches, size, job.snapshots, job.to_input).statistics
    scales, found = Scales(job.model, statistics), {}
    for setting in job.proposals().next_round():
        plan = scales.plan(setting)
        noise = sum(noise_per_site(job.model, statistics, setting.num_batches, plan).values())
        found.setdefault(plan.key, (noise, setting, plan))
    return [(setting, plan) for _, setting, plan in sorted(found.values(), key=lambda row: row[0])]


def with_float_logits(job: TuneJob, ids: Ids) -> list[Batch]:
    """Images of val, decoded, with what the float model says."""
    batches, run = [], float_part(job.model)
    with torch.inference_mode():
        for batch in iter_batches(job.val, ids.tolist(), job.transform, job.batch_size):
            logits = run(job.to_input(batch.images))
            batches.append(Batch(batch.images, batch.labels, batch.sample_ids, logits))
    return batches


def evaluated(job: TuneJob, ids: Ids, folder: Path) -> list[tuple[Setting, Results]]:
    """Every setting on these images of val; what a folder has of it is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = job.engine  # found out before any plan: it leaves the model with other scales
    batches, rows = None, []
    for setting, plan in plans_of(job):
        path = folder / f"{plan.key[:24]}.npz"
        if not path.exists():
            batches = batches or with_float_logits(job, ids)
            apply_plan(job.model, plan)
            with executed(job.model, engine) as run:
                results = evaluate(run, batches, job.to_input).results
            with atomic_file(path) as stream:
                np.savez(stream, **{name: np.frombuffer(data, np.uint8) for name, data in pack(results).items()})
        with np.load(path) as stored:
            rows.append((setting, unpack({name: stored[name].tobytes() for name in stored.files}, len(ids))))
    return rows


def raced(rows: Sequence[tuple[Setting, Results]], order: np.ndarray, batch: int, objective: str) -> Race:
    """A whole race on images in this order, one candidate after the other."""
    race = Race(race_rules(len(order), None, batch, 0.05, 0.005, objective))
    for i, (_, results) in enumerate(rows):
        race.enter(str(i))
        for start, end in chunks_left(race.rules, 0):
            part = order[start:end]
            race.record(str(i), start, {name: values[part] for name, values in results.items()})
            race.judge()
            if race.decision(str(i)) is not None:
                break
    return race


def compare(job: TuneJob, labels: np.ndarray, rows: Sequence[tuple[Setting, Results]], seeds: int) -> None:
    header = f"{'seed':>4}  {'objective':9}  {'images':>6}  {'ties':>4}  {'place':>5}  {'regret, selection':>17}"
    print(f"{header}  {'report':>7}  {'KL on report':>12}  winner")
    for seed in range(seeds):
        _, half, report = split_val(labels, job.val.fingerprint, seed)
        order = race_order(labels, half, len(half), seed)
        top1 = np.array([results["correct"][order].mean() for _, results in rows])
        kl = np.array([results["kl"][order].mean(dtype=float) for _, results in rows])
        for objective, scores in ((FIDELITY, -kl), (TOP1, top1)):
            race = raced(rows, order, job.batch_size, objective)
            winner = int(race.leader() or 0)
            setting, results = rows[winner]
            share = race.images_evaluated / (len(rows) * len(order))
            ties = list(standings(race).values()).count("tied")
            place = 1 + int((scores > scores[winner]).sum())
            print(
                f"{seed:>4}  {objective:9}  {share:>6.1%}  {ties:>4}  {place:>5}"
                f"  {100 * (top1.max() - top1[winner]):>10.2f} points  {results['correct'][report].mean():>7.2%}"
                f"  {results['kl'][report].mean(dtype=float):>12.5f}  {setting.label}"
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4])
    parser.add_argument("--search-space", default="calib")
    parser.add_argument("--pretrained_dir")
    parser.add_argument("--data-path")
    parser.add_argument("--images", type=int, help="of val, class-balanced; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, help="folder that results are kept in")
    args = parser.parse_args(argv)
    for bits in args.bits:
        start = time.perf_counter()
        given = {"search_space": args.search_space, "wprec": bits, "aprec": bits}
        given |= {name: value for name in ("pretrained_dir", "data_path") if (value := getattr(args, name))}
        job = prepare(TuneOptions.of(given), SILENT)
        if any(needs_sensitivity(setting) or setting.transforms for setting in job.settings_to_come):
            parser.error(
                f"{args.search_space}: expected a space of plain calibrators, without transforms and corrections"
            )
        count = min(args.images or len(job.val), len(job.val))
        ids = np.sort(class_balanced_order(job.val.labels, np.arange(len(job.val)), 0)[:count])
        rows = evaluated(job, ids, args.output / f"{bits}-{count}")
        seconds = time.perf_counter() - start
        print(f"\n{bits} bits: {len(rows)} settings on {count} images; {seconds:.0f} s", flush=True)
        compare(job, job.val.labels[ids], rows, args.seeds)


if __name__ == "__main__":
    main()
