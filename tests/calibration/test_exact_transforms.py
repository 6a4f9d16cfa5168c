"""Exact transforms: the float model stays as it is, for every supported kind of ViT, or they are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import observed, tiny_vit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.planner import with_changed
from vitq_ray.calibration.transforms import (
    ALL_TRANSFORMS,
    TRANSFORMS,
    balancing,
    hadamard,
    mean_keeping_rotation,
    transformed,
)
from vitq_ray.engines.execute import unit_plan
from vitq_ray.models.geometry import _add_pre_logits
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan, quant_blocks, quantize_vit

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "LayerScale": {"init_values": 0.5},
    "pooled, norm behind": {"global_pool": "avg", "class_token": False},
    "pooled, norm before": {"global_pool": "avg", "fc_norm": False},
    "odd widths": {"embed_dim": 36, "num_heads": 6},
    "one head": {"num_heads": 1},
    "qk-norm": {"qk_norm": True},
    "no bias of qkv": {"qkv_bias": False},
    "norm before the blocks": {"pre_norm": True},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "pooled by maximum": {"global_pool": "max", "class_token": False, "fc_norm": False},
}
REFUSED = {  # (kind, transform): the reason
    ("qk-norm", "shift"): "transform shift: the model normalises keys (qk-norm), so that their bias counts",
    ("qk-norm", "heads"): "transform heads: the model normalises queries and keys (qk-norm)",
    ("no bias of qkv", "fold"): "transform fold: a layer that reads blocks.0.norm1 has no bias",
    ("no bias of qkv", "rotate"): "transform rotate: a layer that reads blocks.0.norm1 has no bias",
    ("no bias of qkv", "shift"): "transform shift: a layer that reads blocks.0.norm1 has no bias",
    ("norm before the blocks", "rotate"): "transform rotate: a norm in front of the blocks (norm_pre)",
    ("attention pooling", "fold"): "transform fold: the model pools by attention",
    ("attention pooling", "rotate"): "transform rotate: ",
    ("pooled by maximum", "fold"): "transform fold: the model pools by max, which is not linear",
    ("pooled by maximum", "rotate"): "transform rotate: the model pools by max",
    ("pooled by maximum", "shift"): "transform shift: the model pools by max",
    ("attention pooling", "shift"): "transform shift: ",
}


def quantized(kind: str) -> nn.Module:
    return quantize_vit(tiny_vit(**KINDS[kind])).eval()


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def assert_same_function(model: nn.Module, names: tuple[str, ...], images: Tensor) -> nn.Module:
    before = logits(model, images)
    weights = transformed(model, [(name, 0.5) for name in names], images)
    twin = with_changed(model, weights)
    assert weights
    assert float((logits(twin, images) - before).abs().max() / before.std()) < 1e-4
    assert torch.equal(logits(model, images), before)  # the model itself is left alone
    return twin


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_float_model_stays_as_it_is(kind: str, name: str, images: Tensor) -> None:
    model = quantized(kind)
    if (kind, name) in REFUSED:
        with pytest.raises(InputError) as caught:
            transformed(model, [(name, 0.5)], images)
        assert str(caught.value).startswith(REFUSED[kind, name])
    else:
        assert_same_function(model, (name,), images)


def test_all_together(images: Tensor) -> None:
    assert_same_function(quantized("LayerScale"), ("fold", *ALL_TRANSFORMS, "migrate"), images)


def test_two_heads_behind_the_norm(images: Tensor) -> None:
    torch.manual_seed(0)
    model = VisionTransformerDistilled(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert_same_function(quantize_vit(model).eval(), ("rotate", "shift"), images)


def test_pre_logits(images: Tensor) -> None:
    model = tiny_vit()
    _add_pre_logits(model, 24, 7)
    assert_same_function(quantize_vit(model).eval(), ("rotate", "shift"), images)


def test_rotation_centres_the_stream_and_spreads_its_channels(images: Tensor) -> None:
    model = quantized("plain")
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[5] += 50  # an outlier channel
    twin = assert_same_function(model, ("rotate",), images)
    key = "transformer.encoder.layer.1.layernorm_input1_quantizer"
    before, after = observed(model, images)[key], observed(twin, images)[key]
    assert float(after.mean(dim=-1).abs().max()) < 1e-5 * float(after.abs().max())
    assert float(after.abs().max() / after.std()) < 0.7 * float(before.abs().max() / before.std())


def test_shift_takes_the_means_away(images: Tensor) -> None:
    twin = assert_same_function(quantized("plain"), ("shift",), images)
    seen = observed(twin, images)
    for name in ("attn.query", "ffn.fc1"):
        x = seen[f"transformer.encoder.layer.1.{name}._input_quantizer"]
        assert float(x.mean(dim=(0, 1)).abs().max()) < 1e-5
    width = 32
    for block in quant_blocks(twin):
        assert float(block.attn.qkv.bias.detach()[width:].abs().max()) == 0  # those of k and v


def test_heads_have_one_second_moment_with_an_even_diagonal(images: Tensor) -> None:
    twin = assert_same_function(quantized("plain"), ("heads",), images)
    seen = observed(twin, images)
    moments = []
    for name in "qk":
        rows = seen[f"transformer.encoder.layer.0.attn.matmul_{name}_input_quantizer"].transpose(0, 1).flatten(1, 2)
        moments.append(rows.transpose(1, 2) @ rows / rows.shape[1])
    q, k = moments
    assert float((q - k).abs().max()) < 0.2 * float(q.abs().max())  # but for the shrinking
    diagonal = q.diagonal(dim1=1, dim2=2)
    assert float(diagonal.std(dim=1).max()) < 0.2 * float(diagonal.mean())


def test_balance_brings_v_to_the_level_of_q_and_k(images: Tensor) -> None:
    model = quantized("plain")
    weights = transformed(model, [("balance", 1.0)], images)
    seen = observed(with_changed(model, weights), images)
    q, k, v = (float(seen[f"transformer.encoder.layer.1.attn.matmul_{n}_input_quantizer"].abs().max()) for n in "qkv")
    assert v == pytest.approx(max(q, k), rel=1e-4)


@pytest.mark.parametrize("size", [1, 6, 8, 12, 48, 80])
def test_rotations_are_orthogonal_and_even(size: int) -> None:
    matrix = hadamard(size, np.random.default_rng(3))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert float(matrix.abs().max()) <= np.sqrt(2 / size) + 1e-12 or size == 1
    turn = mean_keeping_rotation(size, 3)
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(turn @ ones, ones, atol=1e-12)


def test_balancing_makes_both_moments_one_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    q, k = a @ a.T, 100 * b @ b.T
    turn = balancing(q, k)
    one = torch.eye(6, dtype=torch.float64)
    q, k = (m + 0.1 * m.diagonal().mean() * one for m in (q, k))
    inverse = torch.linalg.inv(turn)
    first, second = turn.T @ q @ turn, inverse @ k @ inverse.T
    assert torch.allclose(first, second, rtol=1e-6, atol=1e-6)
    assert torch.allclose(first, torch.diag(first.diagonal()), atol=1e-6)


def test_a_model_that_follows_a_plan_is_transformed_as_it_was_before(images: Tensor) -> None:
    model = quantized("plain")
    clean = transformed(model, [("rotate", 1.0)], images)
    plan = unit_plan(model, "ft2")
    apply_plan(model, Plan(plan.mode, plan.sites, {"head.bias": torch.full((7,), 3.0)}))
    again = transformed(model, [("rotate", 1.0)], images)
    assert clean.keys() == again.keys()
    assert all(torch.equal(clean[name], again[name]) for name in clean)
