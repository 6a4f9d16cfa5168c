"""Calibration, search, training and evaluation on a GPU, next to the same on the CPU: what runs, how long, and whether
the numbers agree.

    python benchmarks/gpu_check.py [--output DIR]

It refuses where PyTorch finds no GPU. Top-1 on the GPU may differ from that on the CPU by a few images of 10,000, since
sums are rounded in another order.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# name: script and options; {folder} is that of the device, {gpu} is --use-gpu or nothing
STEPS = {
    "calibration": "calib.py --calib-output-path {folder}/calib {gpu}",
    "calibration, Ray worker": "calib.py --num-workers 1 --calib-output-path {folder}/calib-worker {gpu}",
    "evaluation": "evaluate.py --pretrained_dir {folder}/calib/vit_calib.pth --output {folder}/evaluate "
    "--data-path {sample} {gpu}",
    "search": "tune_calib.py --search-space quick --no-dashboard --output {folder}/search {gpu}",
    "training": "qat.py --num-epochs 1 --no-dashboard --output {folder}/qat {gpu}",
    "training (nccl)": "qat.py --num-workers 1-2 --num-epochs 1 --no-dashboard --output {folder}/group {gpu}",
}
OUTPUTS = ("calib", "calib-worker", "evaluate", "search", "qat", "group")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=None, help="folder for all runs; default: a temporary one")
    args = parser.parse_args(argv)

    import torch

    if not torch.cuda.is_available():
        print("error: this PyTorch finds no CUDA GPU, and there is nothing to check without one", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary)
        print(f"{'':<28} {'CPU':>22} {'GPU':>22}")
        failed = 0
        for name, place in zip(STEPS, OUTPUTS, strict=True):
            cells = [run(name, output / device, device) for device in ("cpu", "gpu")]
            if all(code == 0 for code, _ in cells):
                top1 = [read_top1(output / device / place) for device in ("cpu", "gpu")]
                texts = [f"{t:.2%} in {s:.0f} s" for t, (_, s) in zip(top1, cells, strict=True)]
            else:
                failed += 1
                texts = [f"exit code {code}" for code, _ in cells]
            print(f"{name:<28} {texts[0]:>22} {texts[1]:>22}", flush=True)
    return int(failed > 0)


def run(name: str, folder: Path, device: str) -> tuple[int, float]:
    """(exit code, seconds) of a step."""
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, *command(name, folder, device)], stdout=subprocess.DEVNULL)
    return ended.returncode, time.perf_counter() - start


def command(name: str, folder: Path, device: str) -> list[str]:
    """The script of a step, and its options."""
    script, *options = STEPS[name].split()
    values = {"folder": folder, "gpu": "--use-gpu" if device == "gpu" else "", "sample": ROOT / "vitq_ray" / "sample"}
    return [str(ROOT / "scripts" / script), *filter(None, (option.format(**values) for option in options))]


def read_top1(folder: Path) -> float:
    """A fraction, of the images that the step reports on."""
    result = json.loads((folder / "result.json").read_text())
    return float(result["top1_correct"] / result["images"])


if __name__ == "__main__":
    sys.exit(main())
