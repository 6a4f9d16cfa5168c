"""Engines agree on real images: the bundled sample, and a real ViT where it is there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import ROOT, make_setting
from vitq_ray.calibration.scales import Scales, kinds_needed
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines.execute import Engine, executed
from vitq_ray.engines.int8 import FusedBlocks
from vitq_ray.models.load import load_model
from vitq_ray.quant.sites import MODES
from vitq_ray.quant.vit import apply_plan, frozen_weights, quant_blocks, quantize_vit

SAMPLE = ROOT / "vitq_ray" / "sample"
REAL = ROOT.parent / "shared" / "data"


def model_and_images(checkpoint: Path, data: Path, count: int) -> tuple[nn.Module, list[Tensor]]:
    """A quantized model, and images of val as it takes them, in batches of 100."""
    loaded = load_model("auto", str(checkpoint), None)
    transform = EvalTransform(loaded.geometry.img_size)
    index = open_split(str(data), "val", loaded.geometry.num_classes)
    batches = iter_batches(index, range(count), transform, 100, 2, "error", [])
    return quantize_vit(loaded.model).eval(), [transform.normalize(batch.images) for batch in batches]


def logits_of(model: nn.Module, images: list[Tensor], engine: str) -> Tensor:
    with torch.inference_mode(), executed(model, Engine(engine)) as run:
        return torch.cat([run(batch) for batch in images])


def eager_logits(model: nn.Module, images: list[Tensor]) -> Tensor:
    with torch.inference_mode(), frozen_weights(model):
        return torch.cat([model(part) for batch in images for part in batch.split(8 if batch.shape[-1] > 32 else 100)])


def follow(model: nn.Module, images: list[Tensor], mode: str, bits: int, calibrator: str) -> None:
    """The model follows a plan, calibrated on its first 16 images."""
    setting = make_setting(mode, calibrator, 2, bits, batch_size=8)
    seen = [(i, images[0][8 * i : 8 * i + 8]) for i in range(2)]
    statistics = collect_statistics(model, seen, (2,), kinds=kinds_needed([setting]))
    apply_plan(model, Scales(model, statistics).plan(setting))


def compare(model: nn.Module, images: list[Tensor], mode: str, bits: int, calibrator: str) -> tuple[float, float]:
    """(share of images where int8 and eager give the same class, mean |difference of logits| / spread)."""
    follow(model, images, mode, bits, calibrator)
    integer, fake = logits_of(model, images, "int8"), logits_of(model, images, "fake")
    assert torch.equal(integer, fake)
    eager = eager_logits(model, images)
    same = (integer.argmax(1) == eager.argmax(1)).float().mean().item()
    return same, ((integer - eager).abs().mean() / eager.std()).item()


def test_a_hundred_images_of_the_sample() -> None:
    model, images = model_and_images(SAMPLE / "vit.npz", SAMPLE, 100)
    assert compare(model, images, "ft2", 8, "percentile 99.99")[0] >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("mode", MODES)
def test_all_of_the_sample(mode: str, bits: int) -> None:
    model, images = model_and_images(SAMPLE / "vit.npz", SAMPLE, 10_000)
    same, difference = compare(model, images, mode, bits, "percentile 99.99")
    print(f"{mode}, {bits} bits: {same:.2%} of {10_000} images the same class, logits differ by {difference:.2%}")
    assert same >= 0.999


def block_differences(model: nn.Module, images: Tensor) -> list[float]:
    """Mean |difference| of every block's output / its spread, where the engine is given what the eager block was."""
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, x: inputs.append(x[0].clone())) for block in quant_blocks(model)]
    with torch.inference_mode(), frozen_weights(model):
        model(images)
        for hook in hooks:
            hook.remove()
        found = []
        for block, x in zip(quant_blocks(model), inputs, strict=True):
            eager, fused = block(x), FusedBlocks(cast(nn.Module, SimpleNamespace(blocks=[block])), "int16")(x)
            found.append(((fused - eager).abs().mean() / eager.std()).item())
    return found


@pytest.mark.parametrize("mode", MODES)
def test_block_by_block(mode: str) -> None:
    """Differences do not add up where every block begins with the same input: they are single roundings."""
    model, images = model_and_images(SAMPLE / "vit.npz", SAMPLE, 100)
    follow(model, images, mode, 8, "percentile 99.99")
    found = block_differences(model, images[0][:16])
    assert max(found) < 5e-4, found


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="no real ViT beside the repository")
@pytest.mark.parametrize("mode", MODES)
def test_a_real_vit(mode: str) -> None:
    """The engines are equal; from the eager model they differ by as much as it does from itself when its input changes
    by a rounding."""
    model, images = model_and_images(REAL / "vits14" / "vits14.npz", REAL / "clothing-zip", 24)
    same, difference = compare(model, images, mode, 8, "percentile 99.999")
    before = eager_logits(model, images)
    noise = 1 + 1e-7 * torch.randn(images[0].shape, generator=torch.Generator().manual_seed(0))
    floor = ((eager_logits(model, [images[0] * noise]) - before).abs().mean() / before.std()).item()
    print(f"{mode}: {same:.1%} of 24 photos, logits differ by {difference:.2%}, by a rounding of the input {floor:.2%}")
    blocks = block_differences(model, images[0][:8])
    print(f"{mode}: blocks differ by {max(blocks):.2e} of their spread at most")
    assert max(blocks) < 2e-3
    assert difference <= max(0.01, 4 * floor)
    assert np.isfinite(difference)
