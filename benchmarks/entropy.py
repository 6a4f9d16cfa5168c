"""Entropy amax of all sites of a ViT-B at once, against the loop of nvidia-modelopt's calibrator.

    pip install -e '.[bench]'
    python benchmarks/entropy.py --sites 216 --peer-sites 5

Histograms of 2048 bins from random tensors of several shapes. The peer takes seconds per histogram, so it computes
only the first `--peer-sites`; the same bin is required, and the ratio is per histogram.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from vitq_ray.calibration.calibrators import entropy_amax, mse_amax, percentile_amax
from vitq_ray.calibration.histogram import Histogram


def tensors(count: int) -> list[torch.Tensor]:
    """Normal, GELU-like, softmax-like and heavy-tailed values, in turn."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        lambda x: x,
        torch.nn.functional.gelu,
        lambda x: torch.softmax(4 * x.reshape(-1, 100), -1).flatten(),
        lambda x: x**3,
    )
    return [shapes[i % 4](torch.randn(200_000, generator=generator)) for i in range(count)]


def peer_amax(x: torch.Tensor) -> float:
    from modelopt.torch.quantization.calib import HistogramCalibrator

    calibrator = HistogramCalibrator(num_bits=8, axis=None, unsigned=False, torch_hist=True)
    calibrator.collect(x)
    return float(calibrator.compute_amax("entropy"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=216)
    parser.add_argument("--peer-sites", type=int, default=5)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")

    inputs = tensors(args.sites)
    histograms = [Histogram.observe(x) for x in inputs]
    entropy_amax(histograms[:2]), mse_amax(histograms[:2])  # compile

    start = time.perf_counter()
    ours = entropy_amax(histograms)
    per_site = (time.perf_counter() - start) / args.sites
    start = time.perf_counter()
    peer = [peer_amax(x) for x in inputs[: args.peer_sites]]
    peer_per_site = (time.perf_counter() - start) / args.peer_sites
    start = time.perf_counter()
    mse_amax(histograms)
    mse_seconds = time.perf_counter() - start
    start = time.perf_counter()
    percentile_amax(histograms, [99, 99.9, 99.99, 99.999])
    percentile_seconds = time.perf_counter() - start

    same = np.isclose(ours[: args.peer_sites], peer, rtol=1e-6)
    print(f"entropy, {args.sites} sites: {per_site * args.sites:.3f} s, {per_site * 1e3:.2f} ms per histogram")
    print(f"nvidia-modelopt: {peer_per_site:.2f} s per histogram; same bin for {same.sum()} of {len(same)}")
    print(f"ratio: {peer_per_site / per_site:.0f}")
    print(f"mse, all sites: {mse_seconds:.3f} s; four percentiles, all sites: {percentile_seconds:.3f} s")


if __name__ == "__main__":
    main()
