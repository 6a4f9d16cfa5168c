"""A search on a real model against setting by setting: wall time of both, on this machine, with the same images.

    python benchmarks/real_search.py --pretrained_dir ../shared/data/vits14/vits14.npz \
        --data-path ../shared/data/clothing-zip

Runs `tune_calib.py` over the bundled space `calib` (48 settings) with its defaults, then evaluates `--settings` of them
one after the other as a script would without this program: a calibration of its own for each, eager fake
quantization in batches of 100 on all selection images, all cores. What was not run is extrapolated from the mean and
said. The settings are spread over the modes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from engine import machine

from vitq_ray.calibration.scales import apply_setting, kinds_needed
from vitq_ray.calibration.setting import read_setting
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.splits import default_calib_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.measure.evaluation import evaluate
from vitq_ray.models.load import load_model
from vitq_ray.quant.vit import frozen_weights, quantize_vit

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "tune_calib.py"


def search(options: argparse.Namespace, folder: Path) -> tuple[float, dict[str, object]]:
    """Seconds of the command, its start included, and its result.json."""
    command = [
        sys.executable,
        str(SCRIPT),
        "--pretrained_dir",
        options.pretrained_dir,
        "--data-path",
        options.data_path,
    ]
    command += ["--search-space", "calib"]
    more = ["--select-images", str(options.select_images)] if options.select_images else []
    start = time.perf_counter()
    subprocess.run([*command, *more, "--output", str(folder / "run")], check=True, stdout=sys.stderr)
    return time.perf_counter() - start, json.loads((folder / "run" / "result.json").read_text())


def rows_of(result: dict[str, object]) -> list[dict[str, object]]:
    """The candidates of a search."""
    candidates = result["candidates"]
    assert isinstance(candidates, dict)
    return list(candidates.values())


def one_by_one(options: argparse.Namespace, result: dict[str, object], images: int) -> list[float]:
    """Seconds of each of some settings, on their own."""
    candidates = rows_of(result)
    chosen = candidates[:: max(1, len(candidates) // options.settings)][: options.settings]
    split = default_calib_split(options.data_path)
    seconds = []
    for row in chosen:
        setting = read_setting(row["setting"], result["format"], 8)
        start = time.perf_counter()
        loaded = load_model("auto", options.pretrained_dir, None)
        model, transform = quantize_vit(loaded.model).eval(), EvalTransform(loaded.geometry.img_size)
        classes = loaded.geometry.num_classes
        train, val = (open_split(options.data_path, name, classes) for name in (split, "val"))
        size, count = setting.batch_size, setting.num_batches

        def to_input(x: torch.Tensor, transform: EvalTransform = transform) -> torch.Tensor:
            return transform.normalize(x)

        calibration = iter_batches(train, range(size * count), transform, size, 2, "error", [])
        batches = ((i, to_input(batch.images)) for i, batch in enumerate(calibration))
        statistics = collect_statistics(model, batches, (count,), kinds=kinds_needed([setting]))
        apply_setting(model, statistics, setting)
        with frozen_weights(model):
            evaluate(model, iter_batches(val, range(images), transform, 100, 2, "error", []), to_input)
        seconds.append(time.perf_counter() - start)
        print(f"  {setting.label}: {seconds[-1]:.0f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_dir", required=True)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--select-images", type=int)
    parser.add_argument("--settings", type=int, default=2, help="how many are run on their own")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        wall, result = search(options, Path(folder))
    candidates = rows_of(result)
    selection = result["selection"]["float"]["images"]  # type: ignore[index]
    print(
        f"search: {wall:.0f} s for {len(candidates)} settings, {selection} selection images; race {result['race']}; "
        f"winner {result['winner']}; stages {result['seconds']}; engine {result['engine']}"
    )
    alone = one_by_one(options, result, selection)
    total = sum(alone) / len(alone) * len(candidates)
    print(f"setting by setting: {total:.0f} s, from {len(alone)} of {len(candidates)} settings; {total / wall:.1f}×")


if __name__ == "__main__":
    main()
