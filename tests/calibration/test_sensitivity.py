"""Loss curves against gradients computed by hand, and against the KL that quantization really costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import observed, tiny_vit
from torch import Tensor, nn

from vitq_ray.calibration.scales import Scales, grids_of_setting
from vitq_ray.calibration.sensitivity import Curve, Seen, collect_sensitivity, here, look_at_part, ranges_of
from vitq_ray.calibration.setting import Rule, Setting
from vitq_ray.calibration.statistics import collect_statistics
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import SitePlan, SiteRule
from vitq_ray.quant.quantizer import State
from vitq_ray.quant.vit import quant_blocks, quantize_vit, site_weights, sites_of, tensor_keys

LEVELS = (-8, 7)
GRID = (None, LEVELS)
FC2 = "transformer.encoder.layer.1.ffn.fc2"


def images_of(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def everything(model: nn.Module) -> dict[str, tuple[tuple[int | None, tuple[int, int]], ...]]:
    return dict.fromkeys((*tensor_keys(model), *site_weights(model)), (GRID,))


def signs_of(images: Tensor, classes: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).choice((-1.0, 1.0), (len(images), classes))).float()


@pytest.mark.parametrize(("form", "added_up"), [("token", (2,)), ("image", (1, 2)), ("channel", ())])
def test_a_curve_is_the_square_of_error_times_gradient(form: str, added_up: tuple[int, ...]) -> None:
    """The GELU's output, whose gradient a hand-written end of the model gives."""
    model, images = quantize_vit(tiny_vit()).eval(), images_of(6)
    seen = collect_sensitivity(model, images, {f"{FC2}._input_quantizer": (GRID,)}, seed=5, form=form)
    x = observed(model, images)[f"{FC2}._input_quantizer"].clone().requires_grad_()
    block = quant_blocks(model)[1]
    stream = observed(model, images)["transformer.encoder.layer.1.layernorm_input2_quantizer"]
    logs = model.forward_head(model.norm(stream + block.mlp.fc2(x))).log_softmax(dim=1)
    objective = (signs_of(images, 7, 5) * logs.exp().sqrt().detach() * logs).sum()
    (gradient,) = torch.autograd.grad(objective, x)
    curve = seen.curve(f"{FC2}._input_quantizer", None, LEVELS)
    for amax, loss in zip(curve.amax, curve.loss, strict=True):
        error = fake_quantize(x.detach(), torch.tensor(amax, dtype=torch.float32), levels=LEVELS) - x.detach()
        effect = error * gradient
        wanted = (effect.sum(dim=added_up) if added_up else effect).square().sum() / (2 * len(images))
        assert loss == pytest.approx(float(wanted), rel=1e-3)
    assert curve.amax[1] == pytest.approx(float(x.detach().abs().max()))  # of all images, not of the first part


@pytest.mark.parametrize("axis", [None, 0])
def test_a_weights_curve_is_its_layers_output_error(axis: int | None) -> None:
    model, images = quantize_vit(tiny_vit()).eval(), images_of(4)
    key = f"{FC2}._weight_quantizer"
    seen = collect_sensitivity(model, images, {key: ((axis, LEVELS),)})
    assert seen.moments is not None
    weight = site_weights(model)[key]
    x = observed(model, images)[f"{FC2}._input_quantizer"].flatten(0, 1)
    tokens = seen.moments.tokens[FC2].flatten()
    moment = (x * tokens[:, None]).T @ x / (2 * len(images))
    curve = seen.curve(key, axis, LEVELS)
    amax = torch.tensor(curve.amax[..., 3], dtype=torch.float32)
    error = fake_quantize(weight, amax, axis=axis, levels=LEVELS) - weight
    wanted = seen.moments.channels[FC2] * torch.einsum("oi,ij,oj->o", error, moment, error)
    found = curve.loss[..., 3]
    assert np.allclose(found, (wanted if axis == 0 else wanted.sum()).detach().numpy(), rtol=1e-3)
    assert float(seen.moments.channels[FC2].sum()) == pytest.approx(1, rel=1e-5)


def only(model: nn.Module, key: str, amax: float) -> None:
    for name, _, quantizer in sites_of(model):
        quantizer.state = State.OFF
        if name == key:
            quantizer.take(torch.tensor(amax), SiteRule(4))


@pytest.mark.parametrize("site", ["ffn.fc2._input_quantizer", "attn.matmul_v_input_quantizer"])
def test_predictions_are_the_kl_that_one_site_costs(site: str) -> None:
    """To second order, with tokens taken as independent: within a factor, over two octaves of loss."""
    model, images = quantize_vit(tiny_vit()).eval(), images_of(128)
    key = f"transformer.encoder.layer.0.{site}"
    curve = collect_sensitivity(model, images, {key: (GRID,)}).curve(key, None, LEVELS)
    with torch.inference_mode():
        logs = model(images).log_softmax(dim=1)
        for index in (1, 3, 5):
            only(model, key, float(curve.amax[index]))
            kl = (logs.exp() * (logs - model(images).log_softmax(dim=1))).sum(dim=1).mean()
            assert 0.4 < curve.loss[index] / float(kl) < 2.5
            only(model, "none", 1.0)


def test_asymmetric_grids_are_judged_by_the_grid_that_a_plan_has() -> None:
    """The output of GELU, hardly negative: the symmetric grid of as many bits would clip half of it."""
    model, images = quantize_vit(tiny_vit()).eval(), images_of(128)
    key = "transformer.encoder.layer.0.ffn.fc2._input_quantizer"
    setting = Setting(mode="ft1", calibrator="fisher", weights="fisher", weight_bits=4, act_bits=4, num_batches=1)
    setting = replace(setting, rules=(Rule.parse("gelu_output -> asymmetric"),))
    grids = grids_of_setting(setting, 2)
    wanted = {name: grids[name] for name in (*tensor_keys(model), *site_weights(model))}
    seen = collect_sensitivity(model, images, wanted)
    scales = Scales(model, collect_statistics(model, [(0, images)], (1,), kinds=("range",)), seen)
    plan = scales.plan(setting)
    with torch.inference_mode():
        logs = model(images).log_softmax(dim=1)
        for name, _, quantizer in sites_of(model):
            quantizer.state = State.OFF
            if name == key:
                quantizer.take(plan.sites[key].amax, plan.sites[key].rule)
        kl = (logs.exp() * (logs - model(images).log_softmax(dim=1))).sum(dim=1).mean()
    assert plan.sites[key].rule.zero_point > 0
    assert 0.4 < scales.predicted_kl(plan)[key] / float(kl) < 2.5


def test_a_factor_on_one_of_three_that_share_a_scale_counts() -> None:
    model, images = quantize_vit(tiny_vit()).eval(), images_of(8)
    seen = collect_sensitivity(model, images, {key: (*v, (0, LEVELS)) for key, v in everything(model).items()})
    plain = Setting(mode="ft2", calibrator="fisher", weights="fisher", weight_bits=4, act_bits=4)
    twice = replace(plain, rules=(Rule.parse("*.attn.matmul_v* -> x 2"),))
    before, after = (Scales(model, None, seen).plan(setting) for setting in (plain, twice))
    key = "transformer.encoder.layer.0.attn.matmul_q_input_quantizer"
    assert float(after.sites[key].amax) == pytest.approx(2 * float(before.sites[key].amax))


def test_the_same_images_give_the_same_curves() -> None:
    model, images = quantize_vit(tiny_vit()).eval(), images_of(5)
    first, second = (collect_sensitivity(model, images, everything(model), seed=1) for _ in range(2))
    assert first.curves.keys() == second.curves.keys()
    assert all(np.array_equal(first.curves[key].loss, second.curves[key].loss) for key in first.curves)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_parts_of_the_images_merge_to_what_all_of_them_give() -> None:
    """Ten images in four parts, the way of workers, against all of them in one."""
    model, images, seen = quantize_vit(tiny_vit()).eval(), images_of(10), []
    grids = {f"{FC2}.{name}_quantizer": (GRID,) for name in ("_input", "_weight")}

    def whole(function: Any, model: nn.Module, items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        if function is ranges_of:
            parts = [part for (part,) in items]
            yield from [ranges_of(model, torch.cat(parts))] * len(parts)
            return
        parts, signs, points, forms = zip(*items, strict=True)
        seen.extend(map(len, parts))
        merged = look_at_part(model, torch.cat(parts), torch.cat(signs), points[0], forms[0])
        yield from [merged, *[Seen(tokens={key: [] for key in merged.tokens})] * (len(parts) - 1)]

    parted, once = (collect_sensitivity(model, images, grids, 1, iter, s) for s in (here, whole))
    assert seen == [3, 3, 3, 1]
    assert once.curves.keys() == parted.curves.keys()
    for key, curve in parted.curves.items():
        assert np.allclose(curve.loss, once.curves[key].loss, rtol=1e-4)
        assert np.array_equal(curve.amax, once.curves[key].amax)
    assert parted.moments is not None
    assert once.moments is not None
    for name in ("channels", "inputs", "tokens"):
        found, wanted = getattr(parted.moments, name), getattr(once.moments, name)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert float((found[key] - value).abs().max()) < 1e-4 * float(value.abs().max())


def test_where_a_curve_is_least() -> None:
    curve = Curve(np.array([4.0, 2.0, 1.0]), np.array([4.0, 1.0, 9.0]))
    assert curve.best() == 2
    assert curve.at([2.0, 8.0, 0.5]).tolist() == pytest.approx([1, 16, 18])
    assert np.isfinite(curve.at([0.0]))
    assert curve.at([2 * 2**0.5])[0] == pytest.approx(2)  # halfway between logarithms
    rows = Curve(np.array([[4.0, 2.0], [8.0, 4.0]]), np.array([[1.0, 2.0], [3.0, 1.0]]))
    assert rows.best().tolist() == [[4.0], [4.0]]
    assert rows.at([[4.0], [8.0]]).tolist() == pytest.approx([1, 3])


def test_a_scale_that_is_shared_loses_least_in_sum() -> None:
    wide = Curve(np.array([8.0, 4.0, 2.0]), np.array([8.0, 2.0, 90.0]))
    narrow = Curve(np.array([4.0, 2.0, 1.0]), np.array([4.0, 1.0, 0.1]))
    together = Curve.together([wide, narrow])
    assert together.best() == 4  # 2 + 4, against 8 + 16 and 90 + 1
    dead = Curve(np.zeros(3), np.zeros(3))
    assert Curve.together([dead, wide]).best() == 4
    assert Curve.together([dead, dead]).best() == 0


def test_scales_by_curves() -> None:
    """Fused sites have one scale; others their own least; the prediction is the sum over what is on."""
    model, images = quantize_vit(tiny_vit()).eval(), images_of(8)
    seen = collect_sensitivity(model, images, {key: (*v, (0, LEVELS)) for key, v in everything(model).items()})
    setting = Setting(mode="ft2", calibrator="fisher", weights="fisher", weight_bits=4, act_bits=4)
    scales = Scales(model, None, seen)
    plan = scales.plan(setting)
    q, k, v = (plan.sites[f"transformer.encoder.layer.0.attn.matmul_{n}_input_quantizer"].amax for n in "qkv")
    assert q == k == v
    key = f"{FC2}._input_quantizer"
    assert float(plan.sites[key].amax) == pytest.approx(float(seen.curve(key, None, LEVELS).best()))
    losses = scales.predicted_kl(plan)
    on = {name for name, site in plan.sites.items() if site.rule.on}
    assert losses.keys() == on
    assert losses[key] == pytest.approx(float(seen.curve(key, None, LEVELS).loss.min()))
    worse = dict(plan.sites) | {key: SitePlan(plan.sites[key].amax / 4, plan.sites[key].rule)}
    assert scales.predicted_kl(type(plan)(plan.mode, worse))[key] > losses[key]
    with pytest.raises(ValueError, match="was not looked at on the grid"):
        scales.plan(Setting(mode="ft2", calibrator="fisher", weight_bits=4, act_bits=5))
