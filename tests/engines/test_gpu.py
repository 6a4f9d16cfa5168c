"""The GPU's engine. On a CPU the same function of a block runs uncompiled, and products in float16 do not; tests that
need a GPU say so, and run without Ray, too: `python -m pytest tests/engines/test_gpu.py`."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.conftest import ROOT, plan_by_hand, tiny_vit
from tests.engines.test_int8 import VARIANTS, changed, fused, variant_of
from vitq_ray.base.config import InputError
from vitq_ray.base.device import exact_float32
from vitq_ray.calibration.calibrators import Calibration
from vitq_ray.calibration.scales import Scales, grids_of_plan, kinds_needed
from vitq_ray.calibration.sensitivity import collect_sensitivity
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import HISTOGRAM, RANGE, collect_statistics
from vitq_ray.data.loader import iter_batches
from vitq_ray.data.samples import open_split
from vitq_ray.data.transforms import EvalTransform
from vitq_ray.engines import gpu
from vitq_ray.engines.execute import Engine, Execution, executed, find_engine
from vitq_ray.engines.gpu import (
    CompiledBlocks,
    IntegerProduct,
    Products,
    can_compile,
    exact_products,
    integer_products,
    products_of,
    run_block,
    with_compiled_blocks,
)
from vitq_ray.measure.evaluation import NonFiniteLogitsError
from vitq_ray.models.load import load_model
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import FAMILIES, MODES, WEIGHT
from vitq_ray.quant.vit import apply_plan, frozen_weights, quant_blocks, quantize_vit, quantizers_off

CPU = torch.device("cpu")
INTEGERS = Products(int8=True, half=False)
NONE = Products(int8=False, half=False)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def here(model: nn.Module, products: Products = INTEGERS, run: Any = run_block) -> nn.Module:
    return with_compiled_blocks(model, CompiledBlocks(model, products, run))


def logits(run: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return run(images)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """But for roundings that fell to the other side, which change an image by a step here and there."""
    off = (found - expected).abs().amax(1) / expected.std()
    assert (off < 1e-4).float().mean() >= 0.9


# The function of a block, on a CPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["ft1", "ft2", "ft3", "trt", "ort"])
def test_every_kind_of_vit_in_every_mode(variant: str, mode: str, images: Tensor) -> None:
    model = quantize_vit(variant_of(variant)).eval()
    assert can_compile(model)
    for bits in (8, 6, 4):
        apply_plan(model, plan_by_hand(model, images, mode, bits))
        assert_close(logits(here(model), images), fused(model, images, "int16"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantizers_off_is_the_float_model(variant: str, images: Tensor) -> None:
    model = quantize_vit(variant_of(variant)).eval()
    with torch.inference_mode(), quantizers_off(model):
        expected, found = model(images), here(model)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_left_out(family: str, quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    plan = changed(plan_by_hand(quant_vit, images, "ft3"), lambda f: f == family, on=False)
    apply_plan(quant_vit, plan)
    assert_close(logits(here(quant_vit), images), fused(quant_vit, images, "int16"))


@pytest.mark.parametrize("rule", [{"signed": False}, {"signed": False, "zero_point": 100}, {"zero_point": -30}])
def test_unsigned_and_shifted_grids(rule: dict[str, Any], quant_vit: nn.Module, images: Tensor) -> None:
    """Inputs are shifted to fit int8; weights that do not fit are multiplied in float."""
    quant_vit.eval()
    plan = plan_by_hand(quant_vit, images, "ft2")
    for of_weights in (False, True):
        apply_plan(quant_vit, changed(plan, lambda family, wanted=of_weights: (family == WEIGHT) == wanted, **rule))
        blocks = CompiledBlocks(quant_vit, INTEGERS, run_block)
        assert (kinds(blocks) == {torch.int8}) == (not of_weights)
        assert_close(logits(with_compiled_blocks(quant_vit, blocks), images), fused(quant_vit, images, "int16"))


def kinds(blocks: CompiledBlocks) -> set[torch.dtype]:
    """Types of the operands of linear layers."""
    return {layer.weight.dtype for block in blocks._blocks for layer in linears(block.tensors)}


def linears(tensors: Any) -> tuple[gpu.Linear, ...]:
    return tensors.qkv, tensors.out, tensors.fc1, tensors.fc2


def test_integers_and_floats_agree(quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    found = CompiledBlocks(quant_vit, NONE, run_block)
    assert kinds(found) == {torch.float32}
    x = torch.randn(3, 5, 32)
    assert torch.equal(found(x), CompiledBlocks(quant_vit, INTEGERS, run_block)(x))


@pytest.mark.parametrize("mode", MODES)
def test_dead_branches(mode: str, quant_vit: nn.Module, images: Tensor) -> None:
    """A pruned MLP: amax is 0 on both sides of its products."""
    quant_vit.eval()
    with torch.no_grad():
        for parameter in quant_blocks(quant_vit)[1].mlp.parameters():
            parameter.zero_()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, mode))
    assert_close(logits(here(quant_vit), images), fused(quant_vit, images, "int16"))


def test_a_number_that_is_none_is_an_error(quant_vit: nn.Module, images: Tensor) -> None:
    """Also the second time; and after it is a number again, the blocks are as before."""
    quant_vit.eval()
    plan = plan_by_hand(quant_vit, images, "ft2")
    apply_plan(quant_vit, plan)
    blocks = CompiledBlocks(quant_vit, INTEGERS, run_block)
    x = torch.randn(2, 5, 32)
    before = blocks(x)
    for name in ("blocks.1.mlp.fc1.weight", "blocks.0.norm1.bias", "blocks.0.mlp.fc2.bias"):
        broken = quant_vit.get_parameter(name).detach().clone()
        broken.view(-1)[0] = float("nan")
        apply_plan(quant_vit, dataclasses.replace(plan, weights={name: broken}))
        for _ in range(2):
            with pytest.raises(NonFiniteLogitsError, match="a weight or a bias has NaN"):
                blocks.follow()
        apply_plan(quant_vit, plan)
        blocks.follow()
        assert torch.equal(blocks(x), before)
    key = "transformer.encoder.layer.0.ffn.fc1._input_quantizer"
    bad = dataclasses.replace(plan.sites[key], amax=torch.tensor(float("inf")))
    apply_plan(quant_vit, dataclasses.replace(plan, sites={**plan.sites, key: bad}))
    with pytest.raises(NonFiniteLogitsError, match="an amax has NaN"):
        blocks.follow()


def test_an_image_that_is_no_number_has_no_logits(quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    expected = logits(here(quant_vit), images)
    images[3, 0, 0, 0] = float("inf")
    found = logits(here(quant_vit), images)
    assert found[3].isnan().all()
    assert torch.equal(torch.cat([found[:3], found[4:]]), torch.cat([expected[:3], expected[4:]]))


def test_a_plan_may_change_any_weight(images: Tensor) -> None:
    model = quantize_vit(tiny_vit(qk_norm=True, init_values=0.3, reg_tokens=2)).eval()
    plan = plan_by_hand(model, images, "ort")
    apply_plan(model, plan)
    blocks = CompiledBlocks(model, INTEGERS, run_block)
    run = with_compiled_blocks(model, blocks)
    before = logits(run, images)
    random = torch.Generator().manual_seed(0)
    for name, values in [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]:
        other = values * 0.7 + 0.2 * torch.randn(values.shape, generator=random)
        apply_plan(model, dataclasses.replace(plan, weights={name: other}))
        blocks.follow()
        found = logits(run, images)
        assert torch.equal(found, logits(here(model), images)), name
        assert not torch.equal(found, before), name
    apply_plan(model, plan)
    blocks.follow()
    assert torch.equal(logits(run, images), before)
    of_blocks = {f"blocks.0.{part}": torch.zeros(32) for part in ("norm1.weight", "ls2.gamma", "attn.proj.bias")}
    apply_plan(model, dataclasses.replace(plan, weights=of_blocks))
    assert torch.equal(logits(run, images), before)  # until they follow


def addresses(blocks: CompiledBlocks) -> list[int]:
    def of(value: Any) -> Iterator[int]:
        if isinstance(value, Tensor):
            yield value.data_ptr()
        elif value is not None:
            for part in value:
                yield from of(part)

    return [address for block in blocks._blocks for address in of(block.tensors)]


def candidates(model: nn.Module, images: Tensor) -> Iterator[Plan]:
    """Twenty, of all modes whose grids are signed, bits and scales."""
    for number in range(20):
        mode, bits = ("ft1", "ft2", "ft3", "trt")[number % 4], (8, 6, 4, 3, 2)[number % 5]
        yield plan_by_hand(model, images * (1 + number / 20), mode, bits)


def test_candidates_change_numbers_only(quant_vit: nn.Module, images: Tensor) -> None:
    """One compilation for two blocks and twenty candidates; their tensors stay where they are."""
    quant_vit.eval()
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    run = torch.compile(run_block, backend=backend, dynamic=False, fullgraph=True)
    blocks: CompiledBlocks | None = None
    seen = set()
    for plan in candidates(quant_vit, images):
        apply_plan(quant_vit, plan)
        if blocks is None:
            blocks = CompiledBlocks(quant_vit, INTEGERS, run)
            places = addresses(blocks)
        blocks.follow()
        found = logits(with_compiled_blocks(quant_vit, blocks), images)
        assert torch.equal(found, logits(here(quant_vit), images))
        seen.add(found.sum().item())
        assert addresses(blocks) == places
    assert len(seen) == 20
    assert len(compiled) == 1
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ort"))  # levels shifted to fit int8: numbers, too
    blocks.follow()
    logits(with_compiled_blocks(quant_vit, blocks), images)
    assert len(compiled) == 1
    assert blocks.is_compiled


def test_a_weight_is_quantized_when_something_about_it_changed(
    quant_vit: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant_vit.eval()
    plan = plan_by_hand(quant_vit, images, "ft2")
    apply_plan(quant_vit, plan)
    blocks = CompiledBlocks(quant_vit, INTEGERS, run_block)
    made: list[Tensor] = []
    levels = gpu._levels
    monkeypatch.setattr(gpu, "_levels", lambda x, row: (made.append(x), levels(x, row))[1])
    apply_plan(quant_vit, plan_by_hand(quant_vit, 2 * images, "ft2"))
    blocks.follow()
    assert not made
    key = "transformer.encoder.layer.0.attn.key._weight_quantizer"
    other = SitePlan(plan.sites[key].amax * 0.9, plan.sites[key].rule)
    apply_plan(quant_vit, dataclasses.replace(plan, sites={**plan.sites, key: other}))
    blocks.follow()
    assert len(made) == 1


@pytest.mark.parametrize("where", ["_levels", "_in_place"])
def test_a_plan_that_could_not_be_taken_over_is_taken_over_later(
    where: str, quant_vit: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of a device may be short for a moment; weights of the plan before must not meet scales of this one."""
    quant_vit.eval()
    plan = plan_by_hand(quant_vit, images, "ft2")
    apply_plan(quant_vit, plan)
    blocks = CompiledBlocks(quant_vit, INTEGERS, run_block)
    weights = {
        key: SitePlan(site.amax * (0.5 if "_weight_" in key else 1), site.rule) for key, site in plan.sites.items()
    }
    apply_plan(quant_vit, dataclasses.replace(plan, sites=weights))

    def short(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("short")

    with monkeypatch.context() as patch:
        patch.setattr(gpu, where, short)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            blocks.follow()
    blocks.follow()
    x = torch.randn(2, 5, quant_vit.embed_dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blocks(x), CompiledBlocks(quant_vit, INTEGERS, run_block)(x))


def test_fewer_images_run_as_many(quant_vit: nn.Module, images: Tensor) -> None:
    """The rest of an evaluation compiles nothing; a much smaller number is not filled up. Without quantizers, since
    libraries add up another number of rows in another order, and a rounding would make a step of it."""
    quant_vit.eval()
    sizes: list[int] = []

    def run(x: Tensor, *arguments: Any) -> Tensor:
        sizes.append(len(x))
        return run_block(x, *arguments)

    with quantizers_off(quant_vit):
        whole = here(quant_vit, run=run)
        expected = logits(whole, images)
        for count in (24, 20, 12, 11, 6, 3):
            torch.testing.assert_close(logits(whole, images[:count]), expected[:count], rtol=1e-4, atol=1e-4)
    assert sizes[::2] == [24, 24, 24, 24, 11, 11, 3]


def test_without_a_compiler_blocks_run_as_they_are(
    quant_vit: nn.Module, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    expected = logits(here(quant_vit), images)
    gpu._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "vitq_ray"):
        for _ in range(2):
            blocks = CompiledBlocks(quant_vit, INTEGERS, broken)
            assert torch.equal(logits(with_compiled_blocks(quant_vit, blocks), images), expected)
            assert not blocks.is_compiled
    (record,) = caplog.records
    assert record.getMessage() == (
        "blocks are not compiled on this machine and run slower: RuntimeError: Failed to find C compiler"
    )


# Products ------------------------------------------------------------------------------------------------------------


def test_products_are_compared_with_integers(quant_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    exact_products.cache_clear()
    assert products_of(quant_vit, CPU) == INTEGERS  # float16 is for GPUs
    assert str(INTEGERS) == "int8 × int8, _int_mm; attention float32 × float32"
    assert str(Products(True, True)) == "int8 × int8, _int_mm; attention float16 × float16 in float32"
    product = gpu.int8_product

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        return product(a, b).clamp(max=2**17)

    monkeypatch.setattr(gpu, "int8_product", saturating)
    assert products_of(quant_vit, CPU) == INTEGERS  # once per process
    exact_products.cache_clear()
    assert products_of(quant_vit, CPU) == NONE
    exact_products.cache_clear()


def test_products_that_are_not_used_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_is_exact", lambda *_: True)
    monkeypatch.setattr(gpu, "exact_products", exact_products.__wrapped__)
    gpu_device = torch.device("cuda")
    assert products_of(quantize_vit(tiny_vit()), gpu_device) == Products(True, True)
    odd = quantize_vit(tiny_vit(embed_dim=42, num_heads=6, mlp_ratio=2.5))
    assert not products_of(odd, gpu_device).int8, "no layer has sides that are multiples of 8"
    assert products_of(quantize_vit(tiny_vit(act_layer=nn.SiLU)), gpu_device) == Products(True, False)


def test_float32_is_float32() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        exact_float32()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_int8_that_is_not_exact_is_refused(quant_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitq_ray.engines.execute.products_of", lambda model, device: NONE)
    device = torch.device("cuda")
    with pytest.raises(InputError, match="int8 has no exact integer products on this GPU; use fake"):
        find_engine("int8", quant_vit, 16, device)
    assert find_engine("auto", quant_vit, 16, device) == Engine("fake", device="cuda")
    monkeypatch.setattr("vitq_ray.engines.execute.products_of", lambda model, device: Products(True, True))
    assert find_engine("int8", quant_vit, 16, device).to_dict() == {
        "name": "int8",
        "arithmetic": "int8 × int8, _int_mm; attention float16 × float16 in float32",
        "images_per_second": {},
    }


# Blocks that are not compiled ----------------------------------------------------------------------------------------


def test_other_activations_and_norms_are_not_compiled() -> None:
    assert not can_compile(quantize_vit(tiny_vit(act_layer=nn.SiLU)))
    assert not can_compile(quantize_vit(tiny_vit(norm_layer=nn.RMSNorm)))


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


def test_quantizers_off_is_float_with_integer_products_too(quant_vit: nn.Module, images: Tensor) -> None:
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


# On a GPU ------------------------------------------------------------------------------------------------------------

GPU = torch.device("cuda")
SAMPLE = ROOT / "vitq_ray" / "sample"


@cache
def sample() -> tuple[nn.Module, Tensor]:
    """The bundled model, quantized, and a thousand images of val as it takes them, both on the CPU."""
    loaded = load_model("auto", str(SAMPLE / "vit.npz"))
    transform = EvalTransform(loaded.geometry.img_size)
    val = open_split(str(SAMPLE), "val", loaded.geometry.num_classes)
    images = torch.cat([batch.images for batch in iter_batches(val, range(1000), transform, 100)])
    return quantize_vit(loaded.model).eval(), transform.normalize(images)


@cache
def sample_on_a_gpu() -> nn.Module:
    exact_float32()
    return quantize_vit(load_model("auto", str(SAMPLE / "vit.npz")).model).eval().to(GPU)


@cache
def plan_of_sample(mode: str, bits: int) -> Plan:
    model, images = sample()
    setting = Setting(mode, Calibration.parse("percentile 99.99"), 1, weight_bits=bits, act_bits=bits)
    statistics = collect_statistics(model, [(0, images[:64])], (1,), kinds=kinds_needed([setting]))
    return Scales(model, statistics).plan(setting)


def in_hundreds(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([run(part).cpu() for part in images.split(100)])


@needs_gpu
@pytest.mark.filterwarnings("default")
def test_products_of_a_gpu_are_exact() -> None:
    """Shapes of ViT-S/14 and ViT-B/16."""
    for tokens, width, hidden in ((257, 384, 1536), (197, 768, 3072)):
        widths = ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
        products = exact_products(GPU, tokens, widths, 64)
        print(products)
        assert products == Products(int8=True, half=hasattr(torch.ops.aten.bmm, "dtype"))


@needs_gpu
@pytest.mark.filterwarnings("default")
def test_a_gpu_agrees_with_the_cpu() -> None:
    """Every mode and number of bits, one compiled function: at most one in a thousand images gets another class."""
    (model, images), there = sample(), sample_on_a_gpu()
    torch.compiler.reset()
    counters.clear()
    run, same = None, []
    for mode in ("ft1", "ft2", "ft3", "trt", "ort"):
        for bits in (8, 6, 4):
            plan = plan_of_sample(mode, bits)
            apply_plan(model, plan)
            apply_plan(there, plan)
            with executed(model, Engine("int8")) as on_cpu:
                expected = in_hundreds(on_cpu, images)
            if run is None:
                run = Execution(there, Engine("int8"))
            run.follow()
            found = in_hundreds(run, images.to(GPU))
            same.append((found.argmax(1) == expected.argmax(1)).float().mean().item())
            off = ((found - expected).norm() / expected.norm()).item()
            print(f"{mode}, {bits} bits: same class {same[-1]:.1%}, logits off by {off:.1e}")
            assert same[-1] >= 0.999
    assert run is not None
    assert isinstance(run._blocks, CompiledBlocks)
    assert run._blocks.is_compiled
    assert counters["stats"]["unique_graphs"] == 1


@needs_gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["auto", "int8", "fake"])
def test_engines_on_a_gpu(name: str) -> None:
    (_, images), model = sample(), sample_on_a_gpu()
    apply_plan(model, plan_of_sample("ft2", 8))
    engine = find_engine(name, model, 28, GPU)
    print(engine)
    with executed(model, Engine("fake")) as fake, executed(model, engine) as run:
        expected, found = (in_hundreds(each, images.to(GPU)) for each in (fake, run))
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.995


@needs_gpu
@pytest.mark.filterwarnings("default")
def test_an_execution_on_a_gpu_does_not_wait() -> None:
    """Not in a forward pass, and a few times when it takes over a plan."""
    (_, images), model = sample(), sample_on_a_gpu()
    apply_plan(model, plan_of_sample("ft2", 8))
    on_gpu = images[:100].to(GPU)
    with executed(model, Engine("int8")) as run, torch.inference_mode():
        run(on_gpu)
        with Synchronizations() as forward:
            run(on_gpu)
        plan = plan_of_sample("ft1", 4)
        with Synchronizations() as follow:
            apply_plan(model, plan)
            run.follow()
    print(f"a forward pass waits {forward.count} times, a new plan {follow.count} times")
    assert forward.count == 0
    assert follow.count <= 5


class Synchronizations:
    """Counts how often PyTorch waits for the GPU, by its warnings."""

    count = 0

    def __enter__(self) -> Synchronizations:
        self._caught = warnings.catch_warnings(record=True)
        self._seen = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(*error)
        texts = [str(warning.message) for warning in self._seen]  # the first says that the mode is a prototype
        self.count = sum("synchroniz" in text and "prototype" not in text for text in texts)


@needs_gpu
@pytest.mark.filterwarnings("default")
def test_calibration_on_a_gpu_counts_what_the_cpu_counts() -> None:
    """A histogram may differ by values that a last bit moved to the next bin; and nothing waits tensor by tensor."""
    (model, images), there = sample(), sample_on_a_gpu()
    batches = list(enumerate(images[:256].split(64)))
    on_gpu = [(index, part.to(GPU)) for index, part in batches]
    expected = collect_statistics(model, batches, (4,), kinds=(HISTOGRAM, RANGE))
    found = collect_statistics(there, on_gpu, (4,), expected.widths(), kinds=(HISTOGRAM, RANGE))
    for key, ours, cpus in zip(found.keys, found.after(4), expected.after(4), strict=True):
        assert ours.max == pytest.approx(cpus.max, rel=1e-4), key
        assert ours.counts.sum() == cpus.counts.sum()
        size = max(len(ours.counts), len(cpus.counts))
        up_to = [numpy.cumsum(numpy.pad(h.counts, (0, size - len(h.counts)))) for h in (ours, cpus)]
        assert abs(up_to[0] - up_to[1]).max() <= 1e-3 * cpus.counts.sum(), key
    with Synchronizations() as waits:
        collect_statistics(there, on_gpu, (4,), expected.widths(), kinds=(HISTOGRAM, RANGE))
    print(f"{waits.count} synchronizations in 4 batches of {len(found.keys)} tensors")
    assert waits.count <= 4 * 5


@needs_gpu
@pytest.mark.filterwarnings("default")
def test_sensitivity_on_a_gpu_is_that_of_the_cpu() -> None:
    (model, images), there = sample(), sample_on_a_gpu()
    grids = grids_of_plan(plan_of_sample("ft2", 6), 6)
    expected = collect_sensitivity(model, images[:16], grids)
    found = collect_sensitivity(there, images[:16].to(GPU), grids)
    assert found.curves.keys() == expected.curves.keys()
    for key, curve in found.curves.items():
        losses, cpus = curve.loss, expected.curves[key].loss
        numpy.testing.assert_allclose(losses, cpus, rtol=0.02, atol=1e-3 * abs(cpus).max(), err_msg=str(key))
