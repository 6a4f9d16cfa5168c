"""Find the best calibration setting of a search space: one float pass, then a race of all settings under Ray Tune.

    python scripts/tune_calib.py                                     # the bundled sample
    python scripts/tune_calib.py --pretrained_dir ViT-B_16.npz --data-path /data/imagenet --model_type ViT-B_16 \\
        --select-images 5000 --search-space search_spaces/calib.py --output runs/vit
    python scripts/tune_calib.py --resume runs/vit                   # go on after a kill, with the options of before

Calibration images come from train, val is halved: settings are compared on one half (selection), and the winner is
reported on the other (report), which no decision has seen. Writes run.json, statistics.npz, trials.jsonl,
correct.parquet, result.json and best/ into the output folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vitq_ray.cluster.start import cluster
from vitq_ray.commands import options as cli
from vitq_ray.commands import tune as search
from vitq_ray.run.folder import RunFolder, default_folder
from vitq_ray.run.results import SEARCH
from vitq_ray.search.proposals import DEFAULT_SAMPLES, SEARCH_ALGORITHMS

DEFAULT_SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "calib.py"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__ or "")
    cli.add_model_options(parser, decode_threads=False)  # Ray Data decodes
    cli.add_setting_options(parser)
    cli.add_search_options(parser)
    parser.add("--calib-batchsz", type=cli.number(int, 1), default=8, help="images per calibration batch")
    parser.add("--search-space", default=str(DEFAULT_SPACE), help="Python file that defines SPACE")
    parser.add("--search-alg", choices=SEARCH_ALGORITHMS, default="grid", help="which settings of the space are tried")
    parser.add(
        "--num-samples", type=cli.number(int, 1), help=f"settings that random or optuna try; default: {DEFAULT_SAMPLES}"
    )
    parser.add(
        "--select-images",
        type=cli.number(int, 1),
        help=f"images to compare settings on; default: half of val, at most {search.MOST_SELECTION_IMAGES}",
    )
    parser.add("--batch-size", type=cli.number(int, 1), default=100, help="images per evaluation batch")
    parser.add("--chunk-images", type=cli.number(int, 1), help="images between two looks; default: a 25th of all")
    parser.add(
        "--alpha", type=cli.number(float, 1e-9, 0.999), default=0.05, help="chance of losing the best (racing.py)"
    )
    parser.add(
        "--tie-margin",
        type=cli.number(float, 0, 0.5),
        default=0.005,
        help="accuracy not worth telling apart, a fraction",
    )
    parser.add("--from-run", help="folder of a finished search: try its best and tied settings instead of the space's")
    parser.add(
        "--target-drop", type=cli.number(float, -100, 100), default=0.5, help="points below float that need no QAT"
    )
    parser.add("--split-seed", type=cli.number(int, 0), default=0, help="seed of the three splits")
    parser.add("--min-float-top1", type=cli.number(float, 0, 1), help="refuse to search below this float top-1")
    parser.add("--output", help="folder of the run; default: a new one under runs/")
    parser.add("--resume", help="folder of a run to go on with; other options are those of before")
    return _with_stored_options(parser, argv)


def _with_stored_options(parser: cli.Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """With `--resume`, what is not given is as it was."""
    args = parser.parse_args(argv)
    if args.resume is None:
        return args
    stored = RunFolder.resume(Path(args.resume), SEARCH).read_run()["options"]
    kept = {k: v for k, v in stored.items() if k in vars(args) and k not in ("resume", "output")}
    parser.set_defaults(**kept)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    args = parse(argv)
    job = search.prepare(args)
    path = Path(args.resume or args.output or default_folder("tune_calib"))
    folder = search.open_folder(job, path)
    if folder.finished:
        print(f"{path}: this search is finished; its outcome is in {path / 'result.json'}")
        return
    store = search.object_store_bytes(job)
    try:
        with cluster(args.ray_address, object_store_bytes=store, dashboard=args.dashboard) as ray_cluster:
            job.watch.seconds["start"] = round(time.perf_counter() - began, 3)  # checks, and Ray
            search.run(job, folder, ray_cluster)
    except KeyboardInterrupt:
        command = shlex.join(["python", "scripts/tune_calib.py", "--resume", str(path)])
        print(f"\nstopped; what was done is kept. Go on with: {command}", flush=True)
        raise


if __name__ == "__main__":
    sys.exit(cli.run(main))
