"""The correction `learn`: gradient descent on KL to float, of scales, biases and norms."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import tiny_vit
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.learn import _bounded, _parted, _State, learned, most_images
from vitq_ray.calibration.planner import Look, Planner, images_needed, look_at, needs_of
from vitq_ray.calibration.sensitivity import images_to_look_at
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.measure.fidelity import kl_to_float
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.sites import FUSED_GROUPS, site_key
from vitq_ray.quant.vit import apply_plan, quantize_vit, site_weights


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


IMAGES, OTHERS = drawn(256, 3), drawn(256, 4)


def setting(mode: str = "ft2", batches: int = 32, **more: object) -> Setting:
    return Setting(mode=mode, calibrator="fisher", weights="fisher", num_batches=batches, weight_bits=4, act_bits=4,
                   **more)  # type: ignore[arg-type]  # fmt: skip


def planner_of(model: nn.Module, *settings: Setting) -> Planner:
    def collect(seen: nn.Module, kinds: tuple[str, ...]) -> CalibrationStatistics:
        return collect_statistics(seen, list(enumerate(IMAGES.split(8))), (32,), kinds=kinds)

    looks: dict[tuple, Look] = {}
    for transforms, needs in needs_of(settings, 2).items():
        looks[transforms] = look_at(model, transforms, needs, IMAGES[: images_to_look_at(model)], collect)
    return Planner(model, looks, lambda: IMAGES)


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For time: a model as small as this one would take ten."""
    monkeypatch.setattr("vitq_ray.calibration.learn._PASSES", (2, 3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantize_vit(tiny_vit()).eval()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return planner_of(model, setting()).plan(setting())


def kl(model: nn.Module, plan: Plan, images: Tensor) -> float:
    twin = copy.deepcopy(model)
    apply_plan(twin, plan)
    with torch.inference_mode():
        return float(kl_to_float(twin(images), model(images)).mean())


def test_other_images_lose_less_and_no_weight_of_a_gemm_changes(model: nn.Module, plan: Plan) -> None:
    found = learned(model, plan, IMAGES)
    after = found.of(plan)
    assert found.after < found.before
    assert kl(model, after, OTHERS) < 0.95 * kl(model, plan, OTHERS)
    assert all(name.endswith(".bias") or ".norm" in name for name in found.changes)
    weights, on = site_weights(model), [key for key, site in plan.sites.items() if site.rule.on]
    assert found.amax.keys() == set(on) - set(weights)
    assert all(torch.equal(after.sites[key].amax, plan.sites[key].amax) for key in weights)
    for index in range(2):
        for group in FUSED_GROUPS:
            first, *rest = (after.sites[site_key(index, name)].amax for name in group)
            assert all(torch.equal(first, other) for other in rest), group


def test_what_it_says_of_images_left_out_is_what_they_lose(model: nn.Module, plan: Plan) -> None:
    found = learned(model, plan, IMAGES)
    assert found.before == pytest.approx(kl(model, plan, IMAGES[::8]), rel=1e-4)
    assert found.after == pytest.approx(kl(model, found.of(plan), IMAGES[::8]), rel=1e-4)


def test_the_model_and_its_plan_stay(model: nn.Module, plan: Plan) -> None:
    before, scales = copy.deepcopy(model.state_dict()), {k: s.amax.clone() for k, s in plan.sites.items()}
    learned(model, plan, IMAGES[:32])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(site.amax, scales[key]) for key, site in plan.sites.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_seed_decides_the_order(model: nn.Module, plan: Plan) -> None:
    keys = [learned(model, plan, IMAGES[:64], seed).of(plan).key for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def test_nothing_changes_where_images_left_out_lose_more(
    model: nn.Module, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitq_ray.calibration.learn._RATE", 1e3)
    found = learned(model, plan, IMAGES[:64])
    assert found.of(plan).key == plan.key
    assert found.after == found.before


def test_too_few_images_are_refused(model: nn.Module, plan: Plan) -> None:
    with pytest.raises(InputError, match="correction learn: 31 calibration images; expected at least 32"):
        learned(model, plan, IMAGES[:31])
    with pytest.raises(InputError, match="correction learn: 3 calibration batches of 8 images; expected at least 32"):
        setting(batches=3, corrections=("learn",)).require_images()
    found = learned(model, plan, IMAGES[:32])
    assert found.after <= found.before


@pytest.mark.parametrize("mode", ["ort", "openvino", "trt"])
def test_other_grids_learn_scales(model: nn.Module, mode: str) -> None:
    before = planner_of(model, setting(mode)).plan(setting(mode))
    found = learned(model, before, IMAGES)
    after = found.of(before)
    assert found.after < found.before
    assert kl(model, after, OTHERS) < kl(model, before, OTHERS)


def test_a_site_of_zeros_and_one_that_is_off_stay(model: nn.Module, plan: Plan) -> None:
    off, zeros = (site_key(0, name) for name in ("ffn.fc2._input_quantizer", "ffn.fc1._aftergemm_quantizer"))
    other = plan.without([off])
    dead = replace(other.sites[zeros], amax=torch.zeros(()))
    other = Plan(other.mode, {**other.sites, zeros: dead})
    after = learned(model, other, IMAGES[:64]).of(other)
    assert torch.equal(after.sites[zeros].amax, torch.zeros(()))
    assert torch.equal(after.sites[off].amax, plan.sites[off].amax)


def test_norms_of_heads_learn_like_others() -> None:
    model = quantize_vit(tiny_vit(qk_norm=True)).eval()
    plan = planner_of(model, setting()).plan(setting())
    twin = copy.deepcopy(model)
    apply_plan(twin, plan)
    names = _State(twin, plan).now()[0].keys()
    assert {"blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.bias", "blocks.1.norm2.weight"} <= names
    assert not any(name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) for name in names)


@pytest.mark.parametrize("mode", ["ft1", "ft2"])
@pytest.mark.parametrize("others", [("round", "bias"), ("split", "fit", "round")])
def test_a_setting_learns_from_its_calibration_images_behind_its_other_corrections(
    model: nn.Module, mode: str, others: tuple[str, ...]
) -> None:
    plain = setting(mode, 24, transforms=("rotate",), corrections=others)
    both = setting(mode, 24, transforms=("rotate",), corrections=(*others, "learn"))
    planner = planner_of(model, plain)
    before, after = planner.plan(plain), planner.plan(both)
    assert after.key == learned(model, before, IMAGES[:192]).of(before).key != before.key


def test_images_that_a_planner_hands_out(model: nn.Module) -> None:
    looked_at = images_to_look_at(model)
    plain, learns = setting(), setting(corrections=("learn",))
    assert images_needed(model, [plain], 1000) == looked_at < 1000
    assert images_needed(model, [plain, learns], 1000) == 1000
    assert images_needed(model, [plain], 8) == 8
    assert images_needed(model, [learns], 10**9) == most_images(model) == 2**30 // (12 * 16 * 16)


@pytest.mark.parametrize(("count", "left_out"), [(32, 8), (47, 10), (64, 8), (100, 13), (4096, 512)])
def test_images_left_out_are_eight_at_least_and_an_eighth_of_many(count: int, left_out: int) -> None:
    own, held = _parted(count)
    assert len(held) == left_out
    assert sorted([*own.tolist(), *held.tolist()]) == list(range(count))


def test_more_images_take_fewer_passes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitq_ray.calibration.learn._PASSES", (2, 10))
    passes = [_bounded(model, torch.zeros(count, 3, 1, 1))[1] for count in (32, 1024, 4096, 9000)]
    assert passes == [10, 10, 4, 2]
