"""Fused blocks: they compute what the quantized model computes, in every arithmetic the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.conftest import ROOT, plan_by_hand, tiny_vit
from vitq_ray.base.config import InputError
from vitq_ray.engines import passes
from vitq_ray.engines.execute import Engine, Execution, Split, evaluation_batch, executed, find_engine, unit_plan
from vitq_ray.engines.int8 import FusedBlocks, RowLinear, with_blocks
from vitq_ray.measure.evaluation import NonFiniteLogitsError
from vitq_ray.models.geometry import Geometry, build_model
from vitq_ray.quant.plan import Plan, SitePlan
from vitq_ray.quant.sites import FAMILIES, MODES, WEIGHT, sites_of_blocks
from vitq_ray.quant.vit import apply_plan, frozen_weights, quant_blocks, quantize_vit, quantizers_off

ARITHMETICS = ("int16", "uint8", "float32")
VARIANTS: dict[str, dict[str, Any] | Geometry] = {
    "plain": {},
    "qk-norm": {"qk_norm": True},
    "LayerScale": {"init_values": 0.3},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "pooling": {"class_token": False, "global_pool": "avg"},
    "tanh GELU": {"act_layer": lambda: nn.GELU(approximate="tanh")},
    "odd widths": {"embed_dim": 42, "num_heads": 6, "mlp_ratio": 2.5},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "norm before the head": {"global_pool": "avg", "fc_norm": True},
    "norm before the blocks": {"pre_norm": True},
    "pre_logits": Geometry("x", 8, 32, 2, 4, 64, 16, 7, pre_logits=24),
    "hybrid": Geometry("x", 8, 32, 2, 4, 64, 16, 7, hybrid_stages=(1, 1), hybrid_widths=(32, 128, 128)),
}


def variant_of(name: str) -> VisionTransformer:
    options = VARIANTS[name]
    if not isinstance(options, Geometry):
        return tiny_vit(**options)
    torch.manual_seed(0)
    model = build_model(options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def eager(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode(), frozen_weights(model):
        return model(images)


def fused(model: nn.Module, images: Tensor, arithmetic: str) -> Tensor:
    with torch.inference_mode():
        return with_blocks(model, FusedBlocks(model, arithmetic))(images)


def assert_same_model(model: nn.Module, images: Tensor) -> None:
    """All arithmetics agree bit for bit; and with the eager model but for roundings that fell to the other side, which
    change an image by a step here and there."""
    expected = eager(model, images)
    found = [fused(model, images, arithmetic) for arithmetic in ARITHMETICS]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    off = (found[0] - expected).abs().amax(1) / expected.std()
    assert (off < 1e-4).float().mean() >= 0.9


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("mode", "bits"), [("ft1", 8), ("ft2", 8), ("ft3", 4), ("trt", 6)])
def test_every_kind_of_vit_in_every_mode(variant: str, mode: str, bits: int, images: Tensor) -> None:
    model = quantize_vit(variant_of(variant)).eval()
    apply_plan(model, plan_by_hand(model, images, mode, bits))
    assert_same_model(model, images)


@pytest.mark.parametrize("mode", ["ft2", "ort"])
def test_more_tokens_than_are_computed_at_once(mode: str) -> None:
    """50 tokens: two are left behind a block of 48 rows, fewer than are multiplied at once."""
    model = quantize_vit(tiny_vit(img_size=56)).eval()
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    apply_plan(model, plan_by_hand(model, images, mode, 8))
    assert_same_model(model, images)


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantizers_off_is_the_float_model(variant: str, images: Tensor) -> None:
    model = quantize_vit(variant_of(variant)).eval()
    with torch.inference_mode(), quantizers_off(model):
        expected = model(images)
        found = with_blocks(model, FusedBlocks(model, "int16"))(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def changed(plan: Plan, chosen: Callable[[str], bool], **rule: Any) -> Plan:
    """The plan with another rule at some sites."""
    families = sites_of_blocks(2)
    sites = {
        key: SitePlan(site.amax, dataclasses.replace(site.rule, **rule)) if chosen(families[key].family) else site
        for key, site in plan.sites.items()
    }
    return dataclasses.replace(plan, sites=sites)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_left_out(family: str, quant_vit: nn.Module, images: Tensor) -> None:
    """A product with an operand in float is computed in float."""
    quant_vit.eval()
    plan = plan_by_hand(quant_vit, images, "ft3")
    apply_plan(quant_vit, changed(plan, lambda f: f == family, on=False))
    assert_same_model(quant_vit, images)


def test_one_of_three_in_float(quant_vit: nn.Module, images: Tensor) -> None:
    """Query and value take levels, key what the levels stand for."""
    quant_vit.eval()
    plan = plan_by_hand(quant_vit, images, "ft2")
    sites = {
        key: dataclasses.replace(site, rule=dataclasses.replace(site.rule, on=False))
        if key.endswith("key._weight_quantizer")
        else site
        for key, site in plan.sites.items()
    }
    apply_plan(quant_vit, dataclasses.replace(plan, sites=sites))
    assert_same_model(quant_vit, images)


@pytest.mark.parametrize("rule", [{"signed": False}, {"signed": False, "zero_point": 100}, {"zero_point": -30}])
def test_unsigned_and_shifted_grids(rule: dict[str, Any], quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    plan = plan_by_hand(quant_vit, images, "ft2")
    apply_plan(quant_vit, changed(plan, lambda family: family != WEIGHT, **rule))
    assert_same_model(quant_vit, images)
    apply_plan(quant_vit, changed(plan, lambda family: family == WEIGHT, **rule))
    assert_same_model(quant_vit, images)


@pytest.mark.parametrize("mode", MODES)
def test_dead_branches(mode: str, quant_vit: nn.Module, images: Tensor) -> None:
    """A pruned MLP: amax is 0 on both sides of its products, and all of their levels."""
    quant_vit.eval()
    with torch.no_grad():
        for parameter in quant_blocks(quant_vit)[1].mlp.parameters():
            parameter.zero_()
    plan = plan_by_hand(quant_vit, images, mode)
    assert len(plan.degenerate_sites()) >= 4
    apply_plan(quant_vit, plan)
    assert_same_model(quant_vit, images)


def test_an_amax_that_is_no_number_is_an_error(quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    plan = plan_by_hand(quant_vit, images, "ft2")
    for site in ("0.ffn.fc1._input_quantizer", "1.attn.out._weight_quantizer"):
        key = f"transformer.encoder.layer.{site}"
        bad = dataclasses.replace(plan.sites[key], amax=torch.tensor(float("inf")))
        apply_plan(quant_vit, dataclasses.replace(plan, sites={**plan.sites, key: bad}))
        with pytest.raises(NonFiniteLogitsError, match="amax"):
            fused(quant_vit, images, "int16")


def test_the_images_beside_it_and_the_threads_do_not_matter(quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    with executed(quant_vit, Engine("int8")) as run, torch.inference_mode():
        whole = run(images)
        for size in (1, 5, 23):
            assert torch.equal(torch.cat([run(part) for part in images.split(size)]), whole)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(run(images), whole)
        finally:
            torch.set_num_threads(threads)


CANDIDATES = """
import torch
from tests.conftest import plan_by_hand, tiny_vit
from vitq_ray.engines import passes
from vitq_ray.engines.execute import Engine, Execution
from vitq_ray.quant.sites import MODES
from vitq_ray.quant.vit import apply_plan, quantize_vit

model = quantize_vit(tiny_vit()).eval()
images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
run, functions = Execution(model, Engine("int8")), [f for f in vars(passes).values() if hasattr(f, "signatures")]
for candidate in range(20):
    mode, bits = tuple(MODES)[candidate % 4], (8, 6, 4, 3, 2)[candidate % 5]
    apply_plan(model, plan_by_hand(model, images * (1 + candidate / 20), mode, bits))
    run.follow()
    signatures = sum(len(f.signatures) for f in functions)
    logits = run(images).sum().item()
    print(mode, sum(len(f.signatures) for f in functions) - signatures, logits)
print("compiled", sum(sum(f.stats.cache_misses.values()) for f in functions))
"""


def test_candidates_compile_nothing() -> None:
    """Twenty candidates, of all modes, bits and scales, in a new process: the first loads kernels, the others none; and
    where they are in the cache on disk, nothing is compiled at all."""
    model = quantize_vit(tiny_vit()).eval()
    run = Execution(model, Engine("int8"))
    for mode in ("ft1", "ft3"):  # fills the cache
        apply_plan(model, unit_plan(model, mode))
        run.follow()
        run(torch.zeros(1, 3, 16, 16))
    found = subprocess.run([sys.executable, "-c", CANDIDATES], cwd=ROOT, capture_output=True, text=True, check=True)
    *rows, last = found.stdout.strip().splitlines()
    new = [int(row.split()[1]) for row in rows]
    assert len({row.split()[2] for row in rows}) == 20
    assert new[0] > 0
    assert new[1:] == [0] * 19
    assert last == "compiled 0"


def test_a_plan_may_change_any_weight(images: Tensor) -> None:
    """Each parameter by itself: after `follow` the logits are those of a new execution, and back again."""
    model = quantize_vit(tiny_vit(qk_norm=True, init_values=0.3, reg_tokens=2)).eval()
    plan = plan_by_hand(model, images, "ft2")
    apply_plan(model, plan)
    run = Execution(model, Engine("int8"))
    before = run(images)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert {"pos_embed", "patch_embed.proj.bias", "blocks.0.ls1.gamma", "blocks.1.attn.q_norm.bias"} < set(parameters)
    random = torch.Generator().manual_seed(0)
    for name, values in parameters.items():
        changed = values * 0.7 + 0.2 * torch.randn(values.shape, generator=random)
        apply_plan(model, dataclasses.replace(plan, weights={name: changed}))
        run.follow()
        found = run(images)
        assert torch.equal(found, Execution(model, Engine("int8"))(images)), name
        assert not torch.equal(found, before), name
    apply_plan(model, plan)
    run.follow()
    assert torch.equal(run(images), before)


def test_weights_are_taken_over_by_follow_only(quant_vit: nn.Module, images: Tensor) -> None:
    """Between two plans an execution is the first, in all parts of its blocks; parameters may be new objects."""
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    blocks = FusedBlocks(quant_vit, "int16")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    before = blocks(x)
    for block in quant_blocks(quant_vit):
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                parameter.data.mul_(0.5)
                setattr(module, name, nn.Parameter(parameter.detach() * 1.5))
    assert torch.equal(blocks(x), before)
    blocks.follow()
    assert torch.equal(blocks(x), FusedBlocks(quant_vit, "int16")(x))
    assert not torch.equal(blocks(x), before)


@pytest.mark.parametrize("bias", [True, False])
def test_patches_and_rows_take_all_threads(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a border is left over, as a convolution leaves it."""
    torch.manual_seed(0)
    patches, head = nn.Conv2d(3, 20, 4, stride=4, bias=bias), nn.Linear(40, 7, bias=bias)
    images, rows = torch.randn(9, 3, 18, 15), torch.randn(200, 40)
    seen: list[int] = []
    linear = passes.linear

    def counted(*arguments: Any) -> None:
        seen.append(threading.get_ident())
        linear(*arguments)

    monkeypatch.setattr(passes, "linear", counted)
    threads = torch.get_num_threads()
    try:
        for layer, x in ((patches, images), (head, rows)):
            found = []
            for count in (1, 2):
                seen.clear()
                torch.set_num_threads(count)
                with torch.inference_mode():
                    found.append(RowLinear(layer)(x))
                assert len(seen) == len(set(seen)) == count
            assert torch.equal(*found)
            torch.testing.assert_close(found[0], layer(x), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("part", ["mlp.fc1.weight", "mlp.fc2.bias", "norm1.weight", "attn.qkv.weight"])
def test_what_is_no_number_is_an_error(part: str, quant_vit: nn.Module, images: Tensor) -> None:
    """As a level, NaN would be some integer."""
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    with torch.no_grad():
        quant_blocks(quant_vit)[1].get_parameter(part).view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteLogitsError, match="NaN"):
        fused(quant_vit, images, "int16")


def test_images_that_are_no_numbers_are_an_error(quant_vit: nn.Module, images: Tensor) -> None:
    quant_vit.eval()
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    images[3, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteLogitsError), executed(quant_vit, Engine("int8")) as run:
        run(images)


def test_engines_are_found(quant_vit: nn.Module) -> None:
    quant_vit.eval()
    apply_plan(quant_vit, unit_plan(quant_vit, "ft1"))
    cpu = torch.device("cpu")
    found = find_engine("auto", quant_vit, 16, cpu)
    assert set(found.images_per_second) == {"int8", "fake"}
    assert found.name == max(found.images_per_second, key=lambda name: found.images_per_second[name])
    assert find_engine("fake", quant_vit, 16, cpu) == Engine("fake")
    with pytest.raises(InputError, match="engine: 'onednn' is not one of auto, int8, fake"):
        find_engine("onednn", quant_vit, 16, cpu)


def test_a_cpu_without_exact_products_gets_fake(quant_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitq_ray.engines.execute.integers", lambda: None)
    assert find_engine("auto", quant_vit, 16, torch.device("cpu")) == Engine("fake")
    with pytest.raises(InputError, match="int8 has no exact integer products on this CPU"):
        find_engine("int8", quant_vit, 16, torch.device("cpu"))


def test_batches_follow_the_activations(float_vit: nn.Module, images: Tensor) -> None:
    cpu = torch.device("cpu")
    wide = tiny_vit(img_size=224, patch_size=14, embed_dim=384, num_heads=6, depth=1)
    assert evaluation_batch(wide, cpu) == 7  # 12 MiB / (257 tokens · 1536 · 4 bytes)
    assert evaluation_batch(float_vit, cpu) == 100
    assert evaluation_batch(wide, torch.device("cuda")) == 100
    with torch.inference_mode():
        torch.testing.assert_close(Split(float_vit, 5)(images), float_vit(images))
