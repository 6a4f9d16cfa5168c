"""Calibration pass with every site observed, against a plain float forward pass of the same batches (timm, eager).

    python benchmarks/calibration_pass.py --model vit_base_patch16_384 --batch-size 8 --batches 3

Random weights and random images: the time does not depend on their values. The two passes alternate batch by batch,
so that a drifting machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import timm
import torch

from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.quant.vit import quantize_vit


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_384")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    plain = timm.create_model(args.model, num_classes=1000).eval()
    observed = timm.create_model(args.model, num_classes=1000).eval()
    observed.load_state_dict(plain.state_dict())
    quantize_vit(observed)
    size = plain.patch_embed.img_size[0]
    images = torch.randn(args.batch_size, 3, size, size)
    widths = collect_statistics(observed, [(0, images)], [1]).widths()  # warm: kernels compiled, memory mapped

    float_seconds, calibration_seconds = [], []
    with torch.inference_mode():
        plain(images)
        for _ in range(args.batches):
            float_seconds.append(seconds(lambda: plain(images)))
            calibration_seconds.append(seconds(lambda: collect_statistics(observed, [(0, images)], [1], widths)))
    ratios = [c / f for c, f in zip(calibration_seconds, float_seconds, strict=True)]
    print(f"{args.model}, {args.batches} batches of {args.batch_size} at {size}x{size}, {args.threads} threads")
    print(f"float forward      {statistics.median(float_seconds):8.3f} s a batch (median)")
    print(f"calibration pass   {statistics.median(calibration_seconds):8.3f} s a batch (median)")
    print(f"ratio              {statistics.median(ratios):8.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
