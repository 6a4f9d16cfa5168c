"""Plans whose weights are others than the model's: transforms, scales of what they leave, corrections."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import tiny_vit
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.corrections import centred, debiased, rounded
from vitq_ray.calibration.look_files import look_from_bytes, look_to_bytes
from vitq_ray.calibration.planner import (
    Look,
    Planner,
    Transforms,
    look_at,
    needs_of,
    require_techniques,
    with_changed,
)
from vitq_ray.calibration.sensitivity import gradient_pass
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import apply_plan, quantize_vit, site_weights

ALL = ("rotate", "shift", "heads", "balance")
IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantize_vit(tiny_vit()).eval()


def fisher(bits: int = 4, mode: str = "ft2", **more: object) -> Setting:
    values = {"calibrator": "fisher", "weights": "fisher", "num_batches": 2, "batch_size": 8, **more}
    return Setting(mode=mode, weight_bits=bits, act_bits=bits, **values)  # type: ignore[arg-type]


def looks_of(model: nn.Module, settings: Sequence[Setting]) -> dict[Transforms, Look]:
    def collect(seen: nn.Module, kinds: tuple[str, ...]) -> CalibrationStatistics:
        return collect_statistics(seen, list(enumerate(IMAGES.split(8))), (2,), kinds=kinds)

    needs = needs_of(settings, 2)
    return {transforms: look_at(model, transforms, needs[transforms], IMAGES, collect) for transforms in needs}


def planner_of(model: nn.Module, *settings: Setting) -> Planner:
    return Planner(model, looks_of(model, settings), lambda: IMAGES)


def kl(model: nn.Module, plan: Plan, images: Tensor) -> float:
    with torch.inference_mode():
        apply_plan(model, plan)
        quantized = model(images).log_softmax(dim=1)
        float_model = with_changed(model, {})
        logs = float_model(images).log_softmax(dim=1)
    return float((logs.exp() * (logs - quantized)).sum(dim=1).mean())


def test_a_plan_has_the_weights_of_its_transforms(model: nn.Module) -> None:
    plain, turned = fisher(), fisher(transforms=ALL)
    planner = planner_of(model, plain, turned)
    assert not planner.plan(plain).weights
    plan = planner.plan(turned)
    assert "patch_embed.proj.weight" in plan.weights
    assert planner.plan(fisher(transforms=tuple(reversed(ALL)))).key == plan.key  # the order of names does not matter
    assert 0 < planner.forecast(turned, plan) < 1


def test_where_one_setting_needs_gradients_all_are_forecast_by_them(model: nn.Module) -> None:
    others = fisher(calibrator="mse", weights="max")
    needs = needs_of([others, fisher(transforms=("rotate",))], 2)
    assert list(needs) == [(), fisher(transforms=("rotate",)).transforms]
    assert needs[()].kinds == ("histogram",)
    assert all(need.grids for need in needs.values())
    assert needs[fisher(transforms=("rotate",)).transforms].kinds == ()
    assert needs_of([others], 2)[()].grids == {}


def test_scales_by_gradients_beat_the_largest_value(model: nn.Module) -> None:
    chosen, largest = fisher(), fisher(calibrator="max", weights="max")
    planner = planner_of(model, chosen, largest)
    plans = [planner.plan(setting) for setting in (chosen, largest)]
    assert kl(model, plans[0], IMAGES) < 0.7 * kl(model, plans[1], IMAGES)
    assert planner.forecast(chosen, plans[0]) < planner.forecast(largest, plans[1])


def test_rounding_loses_less_and_stays_on_the_grid(model: nn.Module) -> None:
    setting = fisher(corrections=("round",))
    looks = looks_of(model, [setting])
    sensitivity = looks[()].sensitivity
    assert sensitivity is not None
    assert sensitivity.moments is not None
    plan = Planner(model, looks, lambda: IMAGES).plan(setting)
    before, after = site_weights(model), site_weights(with_changed(model, plan.weights))
    for key, weight in before.items():
        site = plan.sites[key]
        share, moment = sensitivity.moments.of_weight(key)

        def loss(values: Tensor, weight: Tensor = weight, share: Tensor = share, moment: Tensor = moment) -> float:
            error = (values - weight).detach()
            return float((share * ((error @ moment) * error).sum(dim=1)).sum())

        levels = {"axis": site.rule.axis, "levels": site.rule.levels}
        nearest = fake_quantize(weight, site.amax, **levels)
        assert loss(after[key]) < 0.9 * loss(nearest)
        assert torch.allclose(fake_quantize(after[key], site.amax, **levels), after[key], atol=1e-6)


def test_bias_correction_takes_the_mean_error_of_a_branch_away(model: nn.Module) -> None:
    setting = fisher(bits=3)
    looks = looks_of(model, [setting])
    sensitivity = looks[()].sensitivity
    assert sensitivity is not None
    assert sensitivity.moments is not None
    plan = Planner(model, looks, lambda: IMAGES).plan(setting)
    changes = debiased(model, plan, IMAGES, sensitivity.moments)
    assert sorted(changes) == [f"blocks.{i}.{name}.bias" for i in (0, 1) for name in ("attn.proj", "mlp.fc2")]
    again = debiased(model, Plan(plan.mode, plan.sites, changes), IMAGES, sensitivity.moments)
    for name, value in changes.items():  # nothing is left to be corrected
        before = dict(model.named_parameters())[name].detach()
        assert float((again[name] - value).abs().max()) < 0.05 * float((value - before).abs().max())


def test_centred_values_make_up_for_lost_mass(model: nn.Module) -> None:
    setting = fisher(bits=3)
    plan = planner_of(model, setting).plan(setting)
    changes = centred(model, plan, IMAGES)
    twin = with_changed(model, changes)
    with torch.inference_mode():
        float_logits, moved = with_changed(model, {})(IMAGES), twin(IMAGES)
    assert float((float_logits - moved).abs().max()) < 1e-4 * float(float_logits.std())
    moved_by = (twin.blocks[0].attn.qkv.bias - with_changed(model, {}).blocks[0].attn.qkv.bias).detach()
    assert float(moved_by[-32:].abs().max()) > 1e-3


def test_the_centre_is_where_the_weighted_loss_is_least(model: nn.Module) -> None:
    """Against its definition, for one block; four images are one pass."""
    plan = planner_of(model, fisher(bits=3)).plan(fisher(bits=3))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    twin = with_changed(model, {})
    gradient_pass(twin, IMAGES[:4], lambda key, x, g: seen.update({key: (x, g)}))
    site = "transformer.encoder.layer.0.attn.{}_quantizer".format
    a, v = (seen[site(f"matmul_{name}_input")][0] for name in "av")  # (B, H, N, N), (B, H, N, D)
    heads = v.shape[1]
    weight = seen[site("out._input")][1].unflatten(2, (heads, -1)).transpose(1, 2).norm(dim=3, keepdim=True)
    quantized = plan.sites[site("matmul_a_input")]
    error = a - fake_quantize(a, quantized.amax, levels=quantized.rule.levels)
    mass = error.sum(dim=3, keepdim=True)
    moved = centred(model, plan, IMAGES[:4])["blocks.0.attn.qkv.bias"] - twin.blocks[0].attn.qkv.bias.detach()
    centre = -moved[-32:].unflatten(0, (heads, 1, -1))
    losses = [float((weight * (error @ v - factor * mass * centre).square()).sum()) for factor in (1, 0, 0.9, 1.1)]
    assert losses[0] == min(losses)
    assert losses[0] < 0.99 * losses[1]


def test_corrections_in_turn(model: nn.Module) -> None:
    plan = planner_of(model, fisher(bits=3, corrections=("centre", "round", "bias"))).plan(
        fisher(bits=3, corrections=("centre", "round", "bias"))
    )
    assert {"blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias"} <= plan.weights.keys()


def test_probabilities_that_stay_float_lose_no_mass(model: nn.Module) -> None:
    setting = fisher(rules=("attention_probabilities -> off",))
    plan = planner_of(model, setting).plan(setting)
    assert centred(model, plan, IMAGES) == {}
    assert rounded(model, plan, _moments(model, setting))


def _moments(model: nn.Module, setting: Setting) -> object:
    sensitivity = looks_of(model, [setting])[()].sensitivity
    assert sensitivity is not None
    return sensitivity.moments


def test_what_a_model_does_not_allow(model: nn.Module) -> None:
    require_techniques(model, [fisher(transforms=ALL)])
    with pytest.raises(InputError, match=r"transform heads: the model normalises queries and keys \(qk-norm\)"):
        require_techniques(quantize_vit(tiny_vit(qk_norm=True)), [fisher(transforms=("heads",))])


@pytest.mark.parametrize(
    ("bias", "name", "layer"), [("qkv_bias", "centre", "attn.qkv"), ("proj_bias", "bias", "attn.proj")]
)
def test_corrections_need_biases(bias: str, name: str, layer: str) -> None:
    with pytest.raises(InputError, match=f"correction {name}: {layer} has no bias"):
        require_techniques(quantize_vit(tiny_vit(**{bias: False})), [fisher(corrections=(name,))])


def test_grids_that_nobody_named_are_looked_at_when_they_are_met(model: nn.Module) -> None:
    planner = planner_of(model, fisher())
    setting = fisher(rules=("*.ffn.fc1.* -> 6 bits",))
    plan = planner.plan(setting)
    assert plan.sites["transformer.encoder.layer.0.ffn.fc1._input_quantizer"].rule.bits == 6
    assert planner.forecast(setting, plan) < planner.forecast(fisher(), planner.plan(fisher()))


def test_a_look_is_read_again_as_it_was_written(model: nn.Module) -> None:
    setting, of = fisher(mode="ft1", calibrator="mse", transforms=ALL), {"weights": "a", "images": "b"}
    look = looks_of(model, [setting])[setting.transforms]
    data = look_to_bytes(look, of)
    again = look_from_bytes(data, "look-0.npz", of)
    before, after = (Planner(model, {setting.transforms: each}) for each in (look, again))
    assert before.plan(setting).key == after.plan(setting).key
    assert before.forecast(setting, before.plan(setting)) == after.forecast(setting, after.plan(setting))
    with pytest.raises(InputError, match=r"look-0.npz: .*is at other images than this run's"):
        look_from_bytes(data, "look-0.npz", {**of, "images": "c"})
    with pytest.raises(InputError, match=r"look-0.npz: .*truncated or damaged"):
        look_from_bytes(data[:-200], "look-0.npz", of)
