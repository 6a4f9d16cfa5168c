"""Conformance with numbers from an independent implementation of DESIGN section 4 (tests/data/reference)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import FT_MODES, REFERENCE, make_setting
from vitq_ray.calibration.scales import apply_setting, plan_of
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.models.load import load_model
from vitq_ray.quant.vit import quantize_vit

CALIBRATORS = {
    "max": "max",
    "percentile99.9": "percentile 99.9",
    "percentile99.99": "percentile 99.99",
    "percentile99.999": "percentile 99.999",
    "mse": "mse",
    "entropy": "entropy",
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
    return Reference(REFERENCE)


# Activations differ between CPUs by a few float32 roundings, and amax with them. In the searches of mse and entropy one
# value in a neighbouring bin can then make the runner-up win: seen for 5 of 27,108 values on one CPU, 0 on another.
ROUNDING = 1e-6  # relative; a bin is 5e-4
SEARCHES = ("mse", "entropy")


def assert_amax(amax: dict[str, Tensor], expected: dict[str, np.ndarray], prefix: str, others: int = 0) -> int:
    """Every amax equal but for rounding, except `others` that a search may find elsewhere; how many were compared."""
    wanted = {key for key in expected if key.startswith(prefix)}
    assert wanted == {f"{prefix}{key}._amax" for key in amax}
    unequal = []
    for key, value in amax.items():
        reference = expected[f"{prefix}{key}._amax"]
        assert reference.shape == tuple(value.shape), key
        if (np.abs(value.numpy() - reference) > ROUNDING * np.abs(reference)).any():
            unequal.append(key)
            np.testing.assert_allclose(value.numpy(), reference, rtol=0.05, err_msg=key)
    assert len(unequal) <= others, unequal
    return sum(value.numel() for value in amax.values())


@pytest.mark.parametrize("batches", [1, 2, 4])
@pytest.mark.parametrize("name", CALIBRATORS)
def test_amax_of_every_calibrator(name: str, batches: int, ref: Reference) -> None:
    setting = make_setting("ft1", CALIBRATORS[name], batches)  # ft1: per channel, nothing fused
    amax = plan_of(ref.model, ref.statistics, setting).amax
    others = 2 if name in SEARCHES else 0
    assert assert_amax(amax, ref.expected, f"amax/{name}/{batches}/", others) == 1413


@pytest.mark.parametrize("mode", FT_MODES)
def test_amax_of_every_mode(mode: str, ref: Reference) -> None:
    setting = make_setting(mode, "percentile 99.99", ref.meta["num_batches"][-1])
    amax = plan_of(ref.model, ref.statistics, setting).amax
    assert assert_amax(amax, ref.expected, f"amax_{mode}/") >= 87


def test_every_amax_of_the_reference_is_compared(ref: Reference) -> None:
    values = [value for name, value in ref.expected.items() if name.startswith("amax")]
    assert sum(value.size for value in values) == 27_108
    prefixes = {name[: name.index("transformer.")] for name in ref.expected if name.startswith("amax")}
    modes = {f"amax_{mode}/" for mode in FT_MODES}
    assert prefixes == {f"amax/{name}/{n}/" for name in CALIBRATORS for n in (1, 2, 4)} | modes


def test_float_logits(ref: Reference) -> None:
    np.testing.assert_allclose(ref.logits(), ref.expected["logits/float"], atol=1e-4)


@pytest.mark.parametrize("calibrator", ["max", "percentile"])
@pytest.mark.parametrize("mode", FT_MODES)
def test_logits_of_every_mode(mode: str, calibrator: str, ref: Reference) -> None:
    text = "percentile 99.99" if calibrator == "percentile" else calibrator
    apply_setting(ref.model, ref.statistics, make_setting(mode, text, 4))
    difference = np.abs(ref.logits() - ref.expected[f"logits/{mode}/{calibrator}"]).max(axis=1)
    # Values that sit between two integers round one way or the other by the last float32 bit, which then shows in
    # that image's logits. Two implementations differ so in a few images; all others agree to rounding.
    flipped = difference > 1e-4
    assert flipped.sum() <= 6  # of 64; a narrow range or another fusion changes 8 and more
    assert difference.max() < 1
