"""Conformance with numbers from an independent implementation of DESIGN section 4 (../shared/reference)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitq_ray.base.config import QuantSetting
from vitq_ray.calibration.statistics import CalibrationStatistics, apply_setting, collect_statistics, setting_amax
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.models.load import load_model
from vitq_ray.quant.sites import MODES
from vitq_ray.quant.vit import quantize_vit

CALIBRATORS = {
    "max": ("max", None),
    "percentile99.9": ("percentile", 99.9),
    "percentile99.99": ("percentile", 99.99),
    "percentile99.999": ("percentile", 99.999),
    "mse": ("mse", None),
    "entropy": ("entropy", None),
}


class Reference:
    """Model, images and expected arrays of the reference folder, and the statistics of its calibration batches."""

    def __init__(self, folder: Path) -> None:
        self.meta = json.loads((folder / "meta.json").read_text())
        self.expected = dict(np.load(folder / "expected.npz"))
        loaded = load_model("auto", str(folder / "model.npz"))
        self.model: nn.Module = quantize_vit(loaded.model)
        transform = EvalTransform(loaded.geometry.img_size)
        index = open_split(str(folder), "val")
        batches = iter_batches(index, range(len(index)), transform, self.meta["batch_size"])
        self.images: Tensor = transform.normalize(torch.cat([batch.images for batch in batches]))
        snapshots = self.meta["num_batches"]
        parts = list(enumerate(self.images.split(self.meta["batch_size"])))[: snapshots[-1]]
        self.statistics: CalibrationStatistics = collect_statistics(self.model, parts, snapshots)

    def logits(self) -> np.ndarray:
        with torch.inference_mode():
            return self.model(self.images).numpy()


@pytest.fixture(scope="module")
def ref() -> Reference:
    folder = Path(__file__).resolve().parents[2] / "shared" / "reference" / "public"
    if not folder.is_dir():
        pytest.skip("reference numbers (../shared/reference) are not on this machine")
    return Reference(folder)


def assert_amax(amax: dict[str, Tensor], expected: dict[str, np.ndarray], prefix: str) -> int:
    """Every amax within one float32 rounding; returns how many numbers were compared."""
    wanted = {key for key in expected if key.startswith(prefix)}
    assert wanted == {f"{prefix}{key}._amax" for key in amax}
    for key, value in amax.items():
        reference = expected[f"{prefix}{key}._amax"]
        assert reference.shape == tuple(value.shape), key
        assert (np.abs(value.numpy() - reference) <= np.spacing(np.abs(reference))).all(), key
    return sum(value.numel() for value in amax.values())


@pytest.mark.parametrize("batches", [1, 2, 4])
@pytest.mark.parametrize("name", CALIBRATORS)
def test_amax_of_every_calibrator(name: str, batches: int, ref: Reference) -> None:
    calibrator, percentile = CALIBRATORS[name]
    setting = QuantSetting("ft1", calibrator, percentile, batches)  # ft1: per channel, nothing fused
    amax = setting_amax(ref.model, ref.statistics, setting)
    assert assert_amax(amax, ref.expected, f"amax/{name}/{batches}/") == 1413


@pytest.mark.parametrize("mode", MODES)
def test_amax_of_every_mode(mode: str, ref: Reference) -> None:
    setting = QuantSetting(mode, "percentile", 99.99, ref.meta["num_batches"][-1])
    amax = setting_amax(ref.model, ref.statistics, setting)
    assert assert_amax(amax, ref.expected, f"amax_{mode}/") >= 87


def test_float_logits(ref: Reference) -> None:
    np.testing.assert_allclose(ref.logits(), ref.expected["logits/float"], atol=1e-4)


@pytest.mark.parametrize("calibrator", ["max", "percentile"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_of_every_mode(mode: str, calibrator: str, ref: Reference) -> None:
    percentile = 99.99 if calibrator == "percentile" else None
    apply_setting(ref.model, ref.statistics, QuantSetting(mode, calibrator, percentile, 4))
    difference = np.abs(ref.logits() - ref.expected[f"logits/{mode}/{calibrator}"]).max(axis=1)
    # Values that sit between two integers round one way or the other by the last float32 bit, which then shows in
    # that image's logits. Two implementations differ so in a few images; all others agree to rounding.
    flipped = difference > 1e-4
    assert flipped.sum() <= 6  # of 64; a narrow range or another fusion changes 8 and more
    assert difference.max() < 1
