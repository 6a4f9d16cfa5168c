"""Plans whose weights are others than the model's: transforms, scales of what they leave, corrections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from conftest import tiny_vit
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.corrections import debiased, rounded
from vitq_ray.calibration.fit import Fit, _fit, _normal_equations, _solved, fitted
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


def test_fit_takes_the_mean_error_of_what_fc2_reads_away(model: nn.Module) -> None:
    plan = planner_of(model, fisher(bits=3)).plan(fisher(bits=3))
    changes, twin = fitted(model, plan, IMAGES, move_v=True).changes, with_changed(model, {})
    for index, block in enumerate(twin.blocks):
        name = f"transformer.encoder.layer.{index}.ffn.fc2._input_quantizer"
        x = torch.cat(_shown(twin, IMAGES)[name])
        error = x - fake_quantize(x, plan.sites[name].amax, levels=plan.sites[name].rule.levels)
        bias, weight = block.mlp.fc2.bias.detach(), block.mlp.fc2.weight.detach()
        wanted = bias + weight @ error.mean(dim=(0, 1))
        assert torch.allclose(changes[f"blocks.{index}.mlp.fc2.bias"], wanted, atol=1e-6)
        assert float((wanted - bias).abs().max()) > 1e-4


def _shown(model: nn.Module, images: Tensor, gradients: bool = False) -> dict[str, list[Tensor]]:
    """{tensor: its parts, or those of its gradient}"""
    parts: dict[str, list[Tensor]] = {}
    gradient_pass(model, images, lambda key, x, g: parts.setdefault(key, []).append(g if gradients else x))
    return parts


def sharpness_of(model: nn.Module, changes: Mapping[str, Tensor], index: int) -> Tensor:
    """What a fit multiplies the scores of every head with (H,); q's rows have it, k's have not, v's weights neither."""
    attention, name = model.blocks[index].attn, f"blocks.{index}.attn.qkv."
    if name + "weight" not in changes:
        return torch.ones(attention.num_heads)
    weight, bias = attention.qkv.weight.detach(), attention.qkv.bias.detach()
    width = weight.shape[1]
    assert torch.equal(changes[name + "weight"][width:], weight[width:])
    assert torch.equal(changes[name + "bias"][width : 2 * width], bias[width : 2 * width])
    of_rows = (changes[name + "weight"] / weight)[:width].unflatten(0, (attention.num_heads, -1))
    assert torch.allclose(changes[name + "bias"][:width], of_rows[..., 0].flatten() * bias[:width])
    sharpness: Tensor = of_rows[:, 0, 0]
    assert torch.allclose(of_rows, sharpness[:, None, None].expand_as(of_rows))
    return sharpness


@pytest.mark.parametrize("move_v", [True, False])
def test_fit_brings_attention_closer_to_float(model: nn.Module, move_v: bool) -> None:
    """Against its definition, on the images of the fit and on others; the projection is square, so it can be undone."""
    setting = fisher(bits=3, rules=("*.matmul_a_input_quantizer -> x 2.5",))  # small probabilities are lost
    plan = planner_of(model, setting).plan(setting)
    twin, changes, name = with_changed(model, {}), fitted(model, plan, IMAGES, move_v).changes, "blocks.0.attn."
    attention = twin.blocks[0].attn
    before = attention.proj.weight.detach()
    gain = (changes[name + "proj.weight"] / before).median(dim=0).values.unflatten(0, (attention.num_heads, 1, -1))
    assert torch.allclose(gain, gain[..., :1].expand_as(gain), rtol=1e-4)
    assert float((gain - 1).abs().max()) > 1e-3
    moved = torch.linalg.solve(before, changes[name + "proj.bias"] - attention.proj.bias.detach())
    moved = moved.unflatten(0, (attention.num_heads, 1, -1))  # centre + offset
    shift = torch.zeros_like(moved)
    if move_v:
        shift = (changes[name + "qkv.bias"] - attention.qkv.bias.detach())[-32:].unflatten(
            0, (attention.num_heads, 1, -1)
        )
    sharpness = sharpness_of(twin, changes, 0)[:, None, None]
    others = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    site = "transformer.encoder.layer.0.attn.{}_quantizer".format
    quantized = plan.sites[site("matmul_a_input")]
    for images, share in ((IMAGES, 0.9), (others, 1.0)):
        tensors, gradients = _shown(twin, images), _shown(twin, images, gradients=True)
        a, v = (torch.cat(tensors[site(f"matmul_{n}_input")]) for n in "av")  # (B, H, N, N), (B, H, N, D)
        g = torch.cat(gradients[site("out._input")]).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        scores = torch.cat(tensors[site("softmax_input")]) * attention.scale
        plain, sharpened = (
            fake_quantize(p, quantized.amax, levels=quantized.rule.levels)
            for p in (a, (scores * sharpness).softmax(dim=-1))
        )
        plain, corrected = plain @ v, gain * (sharpened @ (v + shift)) + moved
        losses = [float((g.norm(dim=3, keepdim=True) * (a @ v - y).square()).sum()) for y in (plain, corrected)]
        assert losses[1] < share * losses[0]


def test_probabilities_have_the_scale_that_serves_with_a_fit(model: nn.Module) -> None:
    """Too large a scale is found out, and what attention hands on has a smaller error than with the scale as it was."""
    setting = fisher(bits=3, rules=("*.matmul_a_input_quantizer -> x 2.5",))
    plan = planner_of(model, setting).plan(setting)
    of_block = "transformer.encoder.layer.0.attn.{}_input_quantizer".format
    key, losses = of_block("matmul_a"), {}
    for may_change in (False, True):
        fit = fitted(model, plan, IMAGES, True, {key: 1.0} if may_change else None)
        site = plan.sites[key]
        amax = site.amax * fit.factors[key]
        twin = with_changed(model, fit.changes)
        tensors, before = _shown(with_changed(model, fit.moved), IMAGES), _shown(model, IMAGES)
        a, v = (torch.cat(tensors[of_block(f"matmul_{name}")]) for name in "av")
        x = fake_quantize(a, amax, levels=site.rule.levels) @ v
        out = twin.blocks[0].attn.proj(x.transpose(1, 2).flatten(2))
        wanted = model.blocks[0].attn.proj(torch.cat(before[of_block("out.")]))
        losses[may_change] = float((out - wanted).detach().square().sum())
    assert fit.factors[key] < 1
    assert losses[True] < 0.9 * losses[False]


def test_a_rules_factor_multiplies_the_scale_that_serves(model: nn.Module) -> None:
    """A fit would undo it, if it were to choose among the scales that the factor leads to."""
    key = "transformer.encoder.layer.0.attn.matmul_a_input_quantizer"
    amax = {}
    for factor in (1.0, 2.5):
        setting = fisher(bits=3, rules=(f"*.matmul_a_input_quantizer -> x {factor}",), corrections=("fit",))
        amax[factor] = planner_of(model, setting).plan(setting).sites[key].amax
    assert torch.isclose(amax[2.5], 2.5 * amax[1.0])


def test_one_image_chooses_no_scale_of_probabilities(model: nn.Module) -> None:
    plan = planner_of(model, fisher(bits=3)).plan(fisher(bits=3))
    keys = [f"transformer.encoder.layer.{index}.attn.matmul_a_input_quantizer" for index in range(2)]
    assert fitted(model, plan, IMAGES[:1], True, dict.fromkeys(keys, 1.0)).factors == dict.fromkeys(keys, 1.0)


def test_fit_says_nothing_of_heads_from_one_image(model: nn.Module) -> None:
    plan = planner_of(model, fisher(bits=3)).plan(fisher(bits=3))
    changes, before = (
        fitted(model, plan, IMAGES[:1], move_v=True).changes,
        dict(with_changed(model, {}).named_parameters()),
    )
    for name, value in changes.items():
        assert torch.equal(value, before[name]) == (not name.endswith("fc2.bias")), name


def test_what_is_behind_v_has_scales_for_where_fit_has_moved_it(model: nn.Module) -> None:
    plain, corrected = fisher(bits=3), fisher(bits=3, corrections=("fit",))
    planner = planner_of(model, plain)
    plans = [planner.plan(setting) for setting in (plain, corrected)]
    moved = {key for key, site in plans[0].sites.items() if not torch.equal(site.amax, plans[1].sites[key].amax)}
    tensors = {"matmul_q_input", "matmul_k_input", "matmul_v_input", "out._input", "out._aftergemm"}
    names = {key.split(".attn.")[1].removesuffix("_quantizer") for key in moved}
    assert {"matmul_v_input", "out._aftergemm"} <= names <= tensors | {"out._weight", "query._weight"}
    fit = fitted(model, plans[0], IMAGES, move_v=True)
    twin = with_changed(model, fit.moved)  # the same function
    with torch.inference_mode():
        float_logits, logits = with_changed(model, {})(IMAGES), twin(IMAGES)
    assert float((float_logits - logits).abs().max()) < 1e-4 * float(float_logits.std())
    again = planner_of(twin, plain).plan(plain)
    for key in (f"transformer.encoder.layer.{i}.attn.{name}_quantizer" for i in (0, 1) for name in tensors):
        assert torch.allclose(again.sites[key].amax, plans[1].sites[key].amax, rtol=1e-4), key
    assert planner.forecast(corrected, plans[1]) == planner.forecast(plain, plans[0])


def test_a_gain_takes_the_scale_of_the_weight_along(model: nn.Module) -> None:
    """So does a sharpness, but where query, key and value share one scale."""
    for mode, layers in (("ft2", ("out",)), ("ft1", ("out", "query"))):
        plain, corrected = (
            fisher(calibrator="mse", weights="max", bits=3, mode=mode, corrections=c) for c in ((), ("fit",))
        )
        plan = planner_of(model, plain, corrected).plan(corrected)
        weights = site_weights(with_changed(model, plan.weights))
        assert float(min(sharpness_of(with_changed(model, {}), plan.weights, index).min() for index in (0, 1))) < 1
        for name in (f"transformer.encoder.layer.{i}.attn." for i in (0, 1)):
            for key in (f"{name}{layer}._weight_quantizer" for layer in layers):
                largest = weights[key].detach().abs().amax(dim=1 if plan.sites[key].rule.axis == 0 else (0, 1))
                assert torch.allclose(plan.sites[key].amax.flatten(), largest.flatten())
            if mode == "ft2":
                shared = [plan.sites[f"{name}{layer}._weight_quantizer"].amax for layer in ("query", "key", "value")]
                assert torch.equal(shared[0], shared[1])
                assert torch.equal(shared[1], shared[2])


def test_scores_of_a_head_are_flattened_where_that_loses_less(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first block's attention hands on is closer to float with it than without it, also of other images."""
    setting = fisher(bits=3, corrections=("fit",))
    planner, others = planner_of(model, setting), torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    plans = [planner.plan(setting)]
    monkeypatch.setattr("vitq_ray.calibration.fit._SHARPNESS", (1.0,))
    plans.append(planner.plan(setting))
    sharpness = [sharpness_of(with_changed(model, {}), plan.weights, 0) for plan in plans]
    assert torch.equal(sharpness[1], torch.ones(4))
    assert {round(float(each), 4) for each in sharpness[0]} <= {1.0, 0.95, 0.9}
    assert float(sharpness[0].min()) < 1
    wanted, losses = _of_attention(with_changed(model, {}), others), []
    for plan in plans:
        apply_plan(model, plan.only(["transformer.encoder.layer.0.attn.matmul_a_input_quantizer"]))
        losses.append(float((_of_attention(model, others) - wanted).square().sum()))
    assert losses[0] < losses[1]


def _of_attention(model: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.blocks[0].attn.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.inference_mode():
        model(images)
    hook.remove()
    return seen[0]


def test_a_norm_of_q_would_undo_a_sharpness() -> None:
    for qk_norm in (False, True):
        model = quantize_vit(tiny_vit(qk_norm=qk_norm)).eval()
        plan = planner_of(model, fisher(bits=3)).plan(fisher(bits=3))
        assert any("qkv.weight" in name for name in fitted(model, plan, IMAGES, True).changes) != qk_norm


def test_fit_moves_v_only_where_scales_are_chosen_by_gradients(model: nn.Module) -> None:
    plain, corrected = (fisher(calibrator="mse", corrections=names) for names in ((), ("fit",)))
    planner = planner_of(model, plain, corrected)
    plan = planner.plan(corrected)
    for key, site in planner.plan(plain).sites.items():
        scaled = key.endswith((".attn.out._weight_quantizer", ".attn.query._weight_quantizer"))
        assert torch.equal(site.amax, plan.sites[key].amax) or scaled
    assert {"blocks.0.attn.proj.weight", "blocks.0.mlp.fc2.bias"} <= plan.weights.keys()
    bias = dict(with_changed(model, {}).named_parameters())["blocks.0.attn.qkv.bias"]
    assert torch.equal(plan.weights.get("blocks.0.attn.qkv.bias", bias)[32:], bias[32:])


def _columns(images: int, width: int = 3, tokens: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Made-up products (B, 1, N, D), masses (B, 1, N, 1) and weights (B, 1, N, 1)."""
    draw = torch.Generator().manual_seed(0)
    found = torch.randn(images, 1, tokens, width, generator=draw, dtype=torch.float64)
    mass, weight = (torch.rand(images, 1, tokens, 1, generator=draw, dtype=torch.float64) for _ in "mw")
    return found, mass, weight


def _equations(found: Tensor, mass: Tensor, weight: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    terms = {"gg": (found**2).sum(3, keepdim=True), "gc": mass * found, "go": found, "cc": mass**2, "co": mass}
    terms |= {"oo": torch.ones_like(mass), "g": (error * found).sum(3, keepdim=True), "c": mass * error, "o": error}
    return _normal_equations({name: (weight * term).sum(dim=2) for name, term in terms.items()})


def test_the_normal_equations_are_those_of_least_squares() -> None:
    found, mass, weight = _columns(6)
    error = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3 * found
    matrix, right = _equations(found, mass, weight, error)
    solved = _solved(matrix.sum(dim=0), right.sum(dim=0), 0.0)[0]
    one = torch.eye(3, dtype=torch.float64)
    vectors = [(x.expand_as(found)[..., None] * one).reshape(-1, 3) for x in (mass, torch.ones_like(mass))]
    rows, root = torch.cat([found.reshape(-1, 1), *vectors], dim=1), weight.expand_as(found).reshape(-1, 1).sqrt()
    wanted = torch.linalg.lstsq(rows * root, error.reshape(-1, 1) * root).solution[:, 0]
    assert torch.allclose(solved, wanted, rtol=1e-6)


def test_a_fit_is_kept_where_images_that_were_left_out_agree() -> None:
    found, mass, weight = _columns(6)
    centre = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    lost = mass * centre
    assert torch.allclose(_fit(*_equations(found, mass, weight, lost), True)[0][0][1:4], centre, atol=0.2)
    assert not _fit(*_equations(found, mass, weight, lost), False)[0][0][1:4].any()
    signs = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64).reshape(6, 1, 1, 1)
    assert not _fit(*_equations(found, mass, weight, signs * (lost + 0.5 * found)), True)[0].any()
    assert not _fit(*_equations(found, mass, 0 * weight, lost), True)[0].any()  # nothing depends on this head
    assert float(_fit(*_equations(found, mass, weight, 5 * found), True)[0][0][0]) == 1.0  # a gain of two at most


def test_names_of_earlier_versions_are_read_and_not_planned(model: nn.Module) -> None:
    setting = fisher(corrections=("centre",))
    assert Setting.from_dict(setting.to_dict(), complete=True) == setting
    with pytest.raises(InputError, match=r"corrections: \['centre'\] is not one of split, fit, round, bias"):
        fisher(corrections=(["centre"],))
    with pytest.raises(InputError, match="correction centre: of an earlier version; its place was taken by fit"):
        require_techniques(model, [setting])


def test_corrections_in_turn(model: nn.Module) -> None:
    plan = planner_of(model, fisher(bits=3, corrections=("fit", "round", "bias"))).plan(
        fisher(bits=3, corrections=("fit", "round", "bias"))
    )
    assert {"blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias"} <= plan.weights.keys()


def test_what_stays_float_needs_no_fit(model: nn.Module) -> None:
    setting = fisher(rules=("attention_probabilities -> off", "*.ffn.fc2._input_quantizer -> off"))
    plan = planner_of(model, setting).plan(setting)
    asked = {f"transformer.encoder.layer.{index}.attn.matmul_a_input_quantizer": 1.0 for index in range(2)}
    assert fitted(model, plan, IMAGES, True, asked) == Fit({}, {}, {})
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
    ("bias", "name", "layer"), [("proj_bias", "fit", "attn.proj"), ("proj_bias", "bias", "attn.proj")]
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
