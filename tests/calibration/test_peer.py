"""Agreement with nvidia-modelopt, the successor of pytorch-quantization; needs `pip install -e '.[bench]'`."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from vitq_ray.calibration.calibrators import entropy_amax, percentile_amax
from vitq_ray.calibration.histogram import Histogram

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

TENSORS = {
    "normal": lambda x: x,
    "GELU": torch.nn.functional.gelu,
    "softmax": lambda x: torch.softmax(4 * x.reshape(-1, 100), -1),
    "heavy tail": lambda x: x**5,
}


def both(name: str, batches: int = 3) -> tuple[Histogram, object]:
    """Our histogram and the peer's calibrator of the same batches, the later ones a little wider."""
    from modelopt.torch.quantization.calib import HistogramCalibrator

    generator = torch.Generator().manual_seed(0)
    peer = HistogramCalibrator(num_bits=8, axis=None, unsigned=False, torch_hist=True)
    ours = None
    for i in range(batches):
        x = TENSORS[name](torch.randn(40_000, generator=generator)) * (1 + 0.1 * i)
        peer.collect(x)
        seen = Histogram.observe(x, None if ours is None else ours.width)
        ours = seen if ours is None else ours.merge(seen)
    assert ours is not None
    return ours, peer


def assert_same_bin(ours: float, peer: float, width: float) -> None:
    # The peer's edges are float32 sums; a bin apart would be a whole width apart.
    assert abs(ours - peer) < 0.01 * width


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 99.999])
@pytest.mark.parametrize("name", TENSORS)
def test_percentile(name: str, percentile: float) -> None:
    ours, peer = both(name)
    amax = percentile_amax([ours], [percentile]).item()
    assert_same_bin(amax, float(peer.compute_amax("percentile", percentile=percentile)), ours.width)


@pytest.mark.slow
@pytest.mark.parametrize("name", TENSORS)
def test_entropy(name: str) -> None:
    ours, peer = both(name)
    assert_same_bin(entropy_amax([ours]).item(), float(peer.compute_amax("entropy")), ours.width)


def test_mse_is_not_compared() -> None:
    """The peer passes num_bits as a bias on CPU: if this fails, it was mended and can be a peer again."""
    ours, peer = both("normal")
    from vitq_ray.calibration.calibrators import mse_amax

    with np.errstate(all="ignore"):
        assert not np.isclose(float(peer.compute_amax("mse")), mse_amax([ours]).item(), rtol=0.01)
