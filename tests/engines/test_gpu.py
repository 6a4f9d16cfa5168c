"""Integer products of a GPU's engine; on a CPU the same code runs, too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import plan_by_hand
from vitq_ray.engines.execute import Engine, executed, find_engine
from vitq_ray.engines.gpu import IntegerProduct, integer_products
from vitq_ray.quant.vit import apply_plan, frozen_weights, quant_blocks, quantizers_off


@pytest.mark.parametrize(("mode", "bits"), [("ft1", 8), ("ft2", 8), ("ft3", 4)])
def test_integer_products_are_the_quantized_model(mode: str, bits: int, quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, mode, bits))
    with torch.inference_mode():
        with frozen_weights(quant_vit):
            expected = quant_vit(images)
        with integer_products(quant_vit):
            assert all(gemm.product is not None for block in quant_blocks(quant_vit) for gemm, _ in block.gemms())
            found = quant_vit(images)
    assert all(gemm.product is None for block in quant_blocks(quant_vit) for gemm, _ in block.gemms())
    off = (found - expected).abs().amax(1) / expected.std()
    assert (off < 1e-4).float().mean() >= 0.9


def test_quantizers_off_is_float_in_an_engine_too(quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images[:2], "ft2"))
    with torch.inference_mode(), quantizers_off(quant_vit):
        expected = quant_vit(images)
        with integer_products(quant_vit):
            assert torch.equal(quant_vit(images), expected)
    with torch.inference_mode(), integer_products(quant_vit), quantizers_off(quant_vit):
        assert torch.equal(quant_vit(images), expected)


def test_sums_are_exact(quant_vit: nn.Module, images: Tensor) -> None:
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft1"))
    gemm, _ = next(quant_blocks(quant_vit)[0].gemms())
    # Scales of one: levels are the numbers themselves.
    gemm._input_quantizer.take(torch.tensor(127.0), gemm._input_quantizer.rule)
    gemm._weight_quantizer.take(torch.full((32, 1), 127.0), gemm._weight_quantizer.rule)
    x, w = torch.randint(-128, 128, (5, 3, 32)), torch.randint(-128, 128, (32, 32))
    x[0], w[0] = -128, -128
    found = IntegerProduct(w.float(), gemm._input_quantizer, gemm._weight_quantizer)(x.float())
    assert torch.equal(found.long(), x @ w.t())


def test_operands_in_float_stay_in_float(quant_vit: nn.Module, images: Tensor) -> None:
    plan = plan_by_hand(quant_vit, images, "ft1")
    key = "transformer.encoder.layer.0.ffn.fc1._input_quantizer"
    off = dataclasses.replace(plan.sites[key], rule=dataclasses.replace(plan.sites[key].rule, on=False))
    apply_plan(quant_vit, dataclasses.replace(plan, sites={**plan.sites, key: off}))
    with integer_products(quant_vit):
        assert [gemm.product is None for gemm, _ in quant_blocks(quant_vit)[0].gemms()] == [False] * 4 + [True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("name", ["auto", "int8", "fake"])
def test_on_a_gpu(name: str, quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    with executed(quant_vit, Engine("int8")) as run, torch.inference_mode():
        expected = run(images)
    model = quant_vit.cuda()
    with executed(model, find_engine(name, model, 16, torch.device("cuda"))) as run, torch.inference_mode():
        found = run(images.cuda()).cpu()
    off = (found - expected).abs().amax(1) / expected.std()
    assert (off < 1e-3).float().mean() >= 0.9
