"""Shared fixtures: small models and images; everything is made here, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from vitq_ray.quant.vit import quantize_vit

SHARED = Path(__file__).resolve().parents[2] / "shared"


def tiny_vit(seed: int = 0, **overrides: object) -> VisionTransformer:
    """A random float ViT of 2 blocks on 16x16 images, with weights large enough to be interesting."""
    torch.manual_seed(seed)
    options = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 7,
        **overrides,
    }
    model = VisionTransformer(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def float_vit() -> VisionTransformer:
    return tiny_vit()


@pytest.fixture
def quant_vit() -> VisionTransformer:
    return quantize_vit(tiny_vit())


@pytest.fixture
def images() -> torch.Tensor:
    """(24, 3, 16, 16) float32 in about [-3, 3]."""
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def reference() -> Path:
    """The folder of independent reference numbers; skips where it is absent."""
    folder = SHARED / "reference" / "public"
    if not folder.is_dir():
        pytest.skip("reference numbers (../shared/reference) are not on this machine")
    return folder
