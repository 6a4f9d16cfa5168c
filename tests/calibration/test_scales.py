"""From settings to plans: fusion, rules, keys, declared statistics; and plans in a model."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.conftest import fresh_package, make_setting, observed, plan_by_hand
from vitq_ray.base.config import InputError
from vitq_ray.calibration import calibrators
from vitq_ray.calibration.calibrators import Calibrator, Parameter
from vitq_ray.calibration.histogram import StatisticsError
from vitq_ray.calibration.scales import (
    Scales,
    apply_setting,
    kinds_needed,
    kinds_of,
    noise_per_site,
    plan_of,
    require_all_possible,
    require_possible,
)
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import CalibrationStatistics, collect_statistics
from vitq_ray.commands.calibrate import quantized_weight_share
from vitq_ray.quant.plan import Plan, SitePlan, SiteRule
from vitq_ray.quant.quantizer import State
from vitq_ray.quant.sites import FAMILIES, MODES, Mode
from vitq_ray.quant.vit import apply_plan, float_copy, quantizers_off, site_weights, sites_of

LAYER = "transformer.encoder.layer."


@pytest.fixture
def statistics(quant_vit: VisionTransformer, images: Tensor) -> CalibrationStatistics:
    return collect_statistics(quant_vit, [(0, images)], [1])


@pytest.fixture
def scales(quant_vit: VisionTransformer, statistics: CalibrationStatistics) -> Scales:
    return Scales(quant_vit, statistics)


BASE = make_setting("ft2", "max", 1)


def with_rules(*rules: str, base: Setting = BASE) -> Setting:
    return replace(base, rules=rules)  # type: ignore[arg-type]


def same(a: Plan, b: Plan) -> bool:
    return a.rules == b.rules and all(torch.equal(a.amax[key], b.amax[key]) for key in a.sites)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", MODES)
def test_max_is_what_the_tables_say(
    mode: str, bits: int, scales: Scales, quant_vit: VisionTransformer, images: Tensor
) -> None:
    """Weight axis, fusion, sites left out."""
    assert same(scales.plan(make_setting(mode, "max", 1, bits)), plan_by_hand(quant_vit, images, mode, bits))


def test_rules_change_the_sites_they_match_and_no_other(scales: Scales) -> None:
    plain = scales.plan(BASE)
    ruled = scales.plan(
        with_rules(
            "0.ffn.fc1._input_quantizer -> percentile 90", "1.ffn.* -> 5 bits", "1.ffn.fc2.* -> off", "*.out.* -> x 0.5"
        )
    )
    percentile = scales.plan(make_setting("ft2", "percentile 90", 1))
    for key, site in ruled.sites.items():
        expected = plain.sites[key]
        if key == f"{LAYER}0.ffn.fc1._input_quantizer":
            assert torch.equal(site.amax, percentile.amax[key])
        elif ".out." in key:
            assert torch.equal(site.amax, expected.amax * 0.5)
        else:
            assert torch.equal(site.amax, expected.amax), key
        in_ffn = key.startswith(f"{LAYER}1.ffn.")
        assert site.rule.bits == (5 if in_ffn else 8)
        assert site.rule.on == (expected.rule.on and not key.startswith(f"{LAYER}1.ffn.fc2."))


def test_a_later_rule_wins(scales: Scales) -> None:
    plan = scales.plan(with_rules("* -> 4 bits", "0.* -> 6 bits"))
    assert {site.rule.bits for key, site in plan.sites.items() if key.startswith(f"{LAYER}0.")} == {6}
    assert {site.rule.bits for key, site in plan.sites.items() if key.startswith(f"{LAYER}1.")} == {4}


def test_calibrators_work_at_the_bits_of_a_rule(scales: Scales) -> None:
    plan = scales.plan(with_rules("*.fc1._input_quantizer -> 3 bits", base=make_setting("ft2", "mse", 1)))
    other = scales.plan(make_setting("ft2", "mse", 1, 3))
    key = f"{LAYER}0.ffn.fc1._input_quantizer"
    assert torch.equal(plan.amax[key], other.amax[key])
    assert not torch.equal(plan.amax[key], scales.plan(make_setting("ft2", "mse", 1)).amax[key])


def test_one_quantizer_under_three_names_is_changed_as_one(scales: Scales, quant_vit: VisionTransformer) -> None:
    plan = scales.plan(with_rules("0.attn.key._input_quantizer -> off"))
    for name in ("query", "key", "value"):
        assert not plan.sites[f"{LAYER}0.attn.{name}._input_quantizer"].rule.on
    apply_plan(quant_vit, plan)
    off = [key for key, _, quantizer in sites_of(quant_vit) if quantizer.state is State.OFF]
    assert off == [key for key, site in plan.sites.items() if not site.rule.on]


def test_rules_are_applied_before_scales_are_fused(scales: Scales) -> None:
    plan = scales.plan(with_rules("0.attn.matmul_q_input_quantizer -> x 100"))
    names = [f"{LAYER}0.attn.matmul_{name}_input_quantizer" for name in "qkv"]
    largest = 100 * scales.plan(make_setting("ft1", "max", 1)).amax[names[0]]
    assert [plan.amax[name] for name in names] == [largest] * 3


@pytest.mark.parametrize("rule", ["0.attn.matmul_q_input_quantizer -> 6 bits", "1.attn.key._weight_quantizer -> off"])
def test_fused_sites_are_not_parted(rule: str, scales: Scales) -> None:
    with pytest.raises(InputError, match="whose scale it shares in this mode differ in bits or in being off"):
        scales.plan(with_rules(rule))
    scales.plan(with_rules(rule, base=make_setting("ft1", "max", 1)))  # nothing is fused there


def test_what_is_possible_is_known_without_a_model() -> None:
    free = make_setting("ft1", "max", 1)
    for rule in ("*.attn.matmul_?_input_quantizer -> 6 bits", "* -> percentile 90", "1.* -> off"):
        require_all_possible([with_rules(rule), with_rules(rule, base=free)], 2)
    parted = with_rules("0.attn.matmul_q_input_quantizer -> 6 bits")
    require_possible(replace(parted, mode="ft1"), 2)
    require_possible(replace(parted, act_bits=6), 2)  # 6 bits are what the other two have
    for impossible, reason in (
        (parted, "rules: .*0.attn.matmul_q_input_quantizer and the two sites whose scale it shares in this mode"),
        (with_rules("*._weight_quantizer -> entropy", base=free), "entropy cannot calibrate the weights it matches"),
        (with_rules("7.* -> off"), "matches no site of the 2 blocks"),
    ):
        with pytest.raises(InputError, match=reason):
            require_possible(impossible, 2)
        with pytest.raises(InputError, match=rf"^setting '{re.escape(impossible.label)}': .*{reason.split()[-1]}"):
            require_all_possible([free, replace(parted, mode="ft1"), impossible], 2)


def test_weights_take_only_calibrators_for_weights(scales: Scales) -> None:
    both = scales.plan(with_rules("1.ffn.* -> percentile 90"))
    plain = scales.plan(BASE)
    key = f"{LAYER}1.ffn.fc1._weight_quantizer"
    assert torch.equal(both.amax[key], plain.amax[key])
    assert not torch.equal(
        both.amax[f"{LAYER}1.ffn.fc1._input_quantizer"], plain.amax[f"{LAYER}1.ffn.fc1._input_quantizer"]
    )
    mse = scales.plan(with_rules("1.ffn.* -> mse", base=make_setting("ft2", "max", 1, 3)))
    assert mse.amax[key] < plain.amax[key]
    with pytest.raises(InputError, match="percentile 90 cannot calibrate the weights it matches"):
        scales.plan(with_rules("*._weight_quantizer -> percentile 90"))


def test_a_pattern_without_a_site_is_refused(scales: Scales) -> None:
    with pytest.raises(InputError, match=r"rule '2\.\* -> off': its pattern matches no site of the 2 blocks"):
        scales.plan(with_rules("2.* -> off"))


# Keys ---------------------------------------------------------------------------------------------------------------


def changed(plan: Plan, key: str, amax: Tensor | None = None, **rule: object) -> Plan:
    site = plan.sites[key]
    new = SitePlan(site.amax if amax is None else amax, replace(site.rule, **rule))  # type: ignore[arg-type]
    return replace(plan, sites={**plan.sites, key: new})


def test_plans_that_compute_the_same_have_one_key(scales: Scales) -> None:
    plan = scales.plan(make_setting("ft1", "max", 1))
    on, off = f"{LAYER}0.ffn.fc1._input_quantizer", f"{LAYER}0.layernorm_input1_quantizer"
    assert plan.key == scales.plan(make_setting("ft1", "percentile 100", 1)).key
    assert plan.key == changed(plan, off, torch.tensor(3.0)).key
    others = [
        changed(plan, on, torch.tensor(3.0)),
        changed(plan, on, bits=7),
        changed(plan, on, on=False),
        changed(plan, on, signed=False),
        changed(plan, on, zero_point=1),
        replace(plan, weights={"head.bias": torch.zeros(7)}),
        replace(plan, weights={"head.bias": torch.ones(7)}),
    ]
    assert len({plan.key, *(other.key for other in others)}) == 8


def test_plans_travel_between_processes(scales: Scales) -> None:
    plan = replace(scales.plan(with_rules("0.* -> 6 bits")), weights={"head.bias": torch.ones(7)})
    back = pickle.loads(pickle.dumps(plan))
    assert same(back, plan)
    assert back.key == plan.key
    assert torch.equal(back.weights["head.bias"], torch.ones(7))


# Plans in a model ---------------------------------------------------------------------------------------------------


def run(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def test_changed_weights_come_and_go_with_their_plan(
    quant_vit: VisionTransformer, scales: Scales, images: Tensor
) -> None:
    exact = run(quant_vit, images)
    plain = scales.plan(BASE)
    apply_plan(quant_vit, plain)
    quantized = run(quant_vit, images)
    weights = {"blocks.0.mlp.fc1.weight": torch.zeros(128, 32), "head.bias": torch.full((7,), 5.0)}
    changed_plan = replace(plain, weights=weights)
    apply_plan(quant_vit, changed_plan)
    shifted = run(quant_vit, images)
    assert torch.equal(quant_vit.head.bias, weights["head.bias"])
    with quantizers_off(quant_vit):
        assert torch.equal(run(quant_vit, images), exact), "the float model has its own weights"
    assert torch.equal(run(quant_vit, images), shifted)
    assert torch.equal(run(float_copy(quant_vit), images), exact)
    apply_plan(quant_vit, changed_plan)  # again: what was before is still known
    apply_plan(quant_vit, plain)
    assert torch.equal(run(quant_vit, images), quantized)
    assert not torch.equal(shifted, quantized)


def test_plans_of_other_models_are_refused(quant_vit: VisionTransformer, scales: Scales) -> None:
    plan = scales.plan(BASE)
    sites = dict(list(plan.sites.items())[:29])
    with pytest.raises(InputError, match="has 29 sites, which are not those of this model"):
        apply_plan(quant_vit, replace(plan, sites=sites))
    with pytest.raises(InputError, match=r"changes 'head.bias' of shape \(3,\), which this model does not have"):
        apply_plan(quant_vit, replace(plan, weights={"head.bias": torch.zeros(3)}))


@pytest.mark.parametrize("zero_point", [0, 3, 100])
@pytest.mark.parametrize(("signed", "low"), [(False, 0), (True, -128)])
def test_grids_are_those_of_pytorch(signed: bool, low: int, zero_point: int) -> None:
    """Unsigned grids and zero points, against PyTorch's own kernel."""
    from vitq_ray.quant.fake_quant import fake_quantize

    rule = SiteRule(8, None, True, signed, zero_point)
    x, amax = torch.linspace(-3, 3, 1001), torch.tensor(2.0)
    scale = float(SitePlan(amax, rule).scale)
    assert scale == pytest.approx(2.0 / (low + 255 - zero_point))
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, low + 255)
    got = fake_quantize(x, amax, levels=rule.levels)
    assert ((got - expected).abs() > 1e-5).float().mean() < 0.01, "a rounding at a half may differ"
    x.requires_grad_(True)
    fake_quantize(x, amax, levels=rule.levels).sum().backward()
    # By hand: from -amax, or from the smallest integer where that is nearer to 0.
    lowest = {(False, 0): 0.0, (False, 3): -3 * 2 / 252, (False, 100): -100 * 2 / 155}.get((signed, zero_point), -2.0)
    assert torch.equal(x.grad.bool(), (x <= 2.0) & (x >= lowest))


# Unsigned and asymmetric grids ---------------------------------------------------------------------------------------


PROBABILITIES, GELU = f"{LAYER}0.attn.matmul_a_input_quantizer", f"{LAYER}1.ffn.fc2._input_quantizer"


@pytest.mark.parametrize("calibrator", ["max", "percentile 99", "mse", "entropy"])
def test_unsigned_probabilities_in_any_mode(calibrator: str, scales: Scales, statistics: CalibrationStatistics) -> None:
    """Twice as many levels up to amax; calibrators that count levels know."""
    signed = scales.plan(make_setting("ft2", calibrator, 1))
    plan = scales.plan(with_rules("attention_probabilities -> unsigned", base=make_setting("ft2", calibrator, 1)))
    changed_sites = [key for key, site in plan.sites.items() if site.rule != signed.sites[key].rule]
    assert changed_sites == [key for key in plan.sites if "matmul_a" in key]
    assert plan.sites[PROBABILITIES].rule == SiteRule(signed=False)
    amax = plan.amax[PROBABILITIES]
    assert plan.sites[PROBABILITIES].scale == pytest.approx(float(amax) / 255)
    histogram = dict(zip(statistics.keys, statistics.after(1), strict=True))[PROBABILITIES]
    if calibrator == "mse":  # brute force over bin centres, the way of the definition
        centres = (np.arange(len(histogram.counts)) + 0.5) * histogram.width
        errors = []
        for candidate in centres[128:]:
            levels = np.minimum(np.rint(centres * 255 / candidate), 255)
            errors.append((histogram.counts * (centres - levels * candidate / 255) ** 2).sum())
        assert float(amax) == pytest.approx(centres[128 + int(np.argmin(errors))])
    if calibrator in ("max", "percentile 99"):
        assert torch.equal(amax, signed.amax[PROBABILITIES])


@pytest.mark.parametrize("calibrator", ["max", "percentile 90"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_asymmetric_grids_cover_the_range(
    calibrator: str, factor: float, scales: Scales, quant_vit: VisionTransformer, images: Tensor
) -> None:
    x = observed(quant_vit, images)[GELU]
    base = make_setting("ft1", calibrator, 1)
    rules = ("gelu_output -> asymmetric", f"gelu_output -> x {factor}")
    limit = float(scales.plan(base).amax[GELU]) * factor
    site = scales.plan(with_rules(*rules, base=base)).sites[GELU]
    low, high = max(x.min().item() * factor, -limit), min(x.max().item() * factor, limit)
    step = (high - low) / 255
    assert low < -5 * step, "a tensor with two sides"
    assert site.rule == SiteRule(signed=False, zero_point=round(-low / step))
    assert float(site.scale) == pytest.approx(step)
    assert site.rule.levels == (-site.rule.zero_point, 255 - site.rule.zero_point)


def test_a_later_grid_replaces_an_earlier_one(scales: Scales) -> None:
    rules = ("*.fc2.* -> asymmetric", "1.ffn.* -> signed")
    plan = scales.plan(with_rules(*rules, base=make_setting("ft1", "max", 1)))
    assert plan.sites[GELU].rule == SiteRule()
    assert not plan.sites[GELU.replace("1.ffn", "0.ffn")].rule.signed
    assert plan.sites[f"{LAYER}0.ffn.fc2._weight_quantizer"].rule == SiteRule(axis=0)
    assert scales.plan(with_rules("* -> signed", base=make_setting("ort", "max", 1))).rules == {
        key: replace(rule, axis=0 if "weight" in key else None)
        for key, rule in scales.plan(make_setting("ft1", "max", 1)).rules.items()
    }


@pytest.mark.parametrize(("x", "expected"), [((0.0, 0.0), (0, 0.0)), ((-3.0, 0.0), (254, 3 / 255)), ((0, 2), (0, 2))])
def test_ranges_of_one_side(x: tuple[float, float], expected: tuple[int, float]) -> None:
    from vitq_ray.calibration.histogram import Range
    from vitq_ray.calibration.scales import _site_between

    site = _site_between(Range(*x), SiteRule(signed=False))
    assert (site.rule.zero_point, float(site.amax)) == (expected[0], pytest.approx(expected[1]))


def test_fused_sites_share_an_asymmetric_grid(scales: Scales, quant_vit: VisionTransformer, images: Tensor) -> None:
    names = [f"{LAYER}0.attn.matmul_{name}_input_quantizer" for name in "qkv"]
    seen = [observed(quant_vit, images)[name] for name in names]
    low, high = min(x.min().item() for x in seen), max(x.max().item() for x in seen)
    plan = scales.plan(with_rules("*.attn.matmul_[qkv]* -> asymmetric"))
    assert len({plan.sites[name].rule for name in names}) == 1
    for name in names:
        assert plan.sites[name].rule.zero_point == round(-low * 255 / (high - low))
        assert float(plan.sites[name].scale) == pytest.approx((high - low) / 255)
    with pytest.raises(InputError, match=r"matmul_q_input_quantizer and the two sites .* differ in their grids"):
        scales.plan(with_rules("*.attn.matmul_v* -> asymmetric"))


def test_grids_that_cannot_be(scales: Scales) -> None:
    with pytest.raises(InputError, match=r"0\.attn\.out\._input_quantizer: has values down to -.*unsigned"):
        scales.plan(with_rules("0.attn.out._input* -> unsigned"))
    scales.plan(with_rules("0.attn.out._input* -> unsigned", "0.attn.out._input* -> off"))
    with pytest.raises(InputError, match="asymmetric cannot be the grid of the weights it matches"):
        scales.plan(with_rules("*._weight_quantizer -> asymmetric"))


def test_statistics_without_signs_have_no_asymmetric_grids(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics
) -> None:
    old = {"histogram": [[replace(h, negative=None, range=None) for h in row] for row in statistics.kinds["histogram"]]}
    scales = Scales(quant_vit, replace(statistics, kinds=old))  # type: ignore[arg-type]
    scales.plan(with_rules("attention_probabilities -> unsigned"))
    with pytest.raises(StatisticsError, match="has no signs"):
        scales.plan(make_setting("ort", "mse", 1))


def test_grids_need_ranges() -> None:
    assert kinds_needed([make_setting("ort", "mse")]) == ("histogram",)  # which knows its range
    assert kinds_needed([make_setting("ort", "max")]) == ("range",)


@pytest.mark.parametrize("mode", ["ft2", "ort"])
def test_noise_of_any_grid_is_that_of_the_tensors(
    mode: str, quant_vit: VisionTransformer, statistics: CalibrationStatistics, scales: Scales, images: Tensor
) -> None:
    """At 5 bits, where the bins of histograms are small beside a step."""
    from vitq_ray.quant.fake_quant import fake_quantize

    plan = scales.plan(make_setting(mode, "percentile 99", 1, 5))
    noise, tensors = noise_per_site(quant_vit, statistics, 1, plan), observed(quant_vit, images)
    compared = [key for key in noise if key in tensors]
    assert len(compared) >= 14
    for key in compared:
        x, site = tensors[key], plan.sites[key]
        low, high = site.rule.levels
        error = fake_quantize(x, site.amax, levels=(-high if low == -high - 1 else low, high)) - x
        assert noise[key] == pytest.approx(float(error.square().sum() / x.square().sum()), rel=0.05), key


# Parts --------------------------------------------------------------------------------------------------------------


def test_a_calibrator_is_a_function_and_a_row(
    monkeypatch: pytest.MonkeyPatch, scales: Scales, statistics: CalibrationStatistics
) -> None:
    """What the table is for: a further row works in settings, rules and texts at once."""
    share = Parameter("share", 0, 1, 0.5, "of the largest value")
    row = Calibrator(
        "part", "a share of max", "range", lambda seen, v, bits: v[0] * np.array([s.max for s in seen]), None, (share,)
    )
    monkeypatch.setitem(calibrators.CALIBRATORS, "part", row)
    half, whole = scales.plan(make_setting("ft1", "part 0.5", 1)), scales.plan(make_setting("ft1", "max", 1))
    for key in statistics.keys:
        assert float(half.amax[key]) == pytest.approx(0.5 * float(whole.amax[key]))
    ruled = scales.plan(with_rules("0.* -> part 0.25", base=make_setting("ft1", "max", 1)))
    assert float(ruled.amax[statistics.keys[0]]) == pytest.approx(0.25 * float(whole.amax[statistics.keys[0]]))
    with pytest.raises(InputError, match=r"'part 2' is not one of .*part S \(0 to 1\)"):
        make_setting("ft1", "part 2")


def test_a_mode_is_a_row(monkeypatch: pytest.MonkeyPatch, scales: Scales, quant_vit: VisionTransformer) -> None:
    left_out = FAMILIES - {"input", "weight"}
    monkeypatch.setitem(MODES, "linears", Mode("linears", 0, False, left_out))
    plan = scales.plan(make_setting("linears", "max", 1))
    apply_plan(quant_vit, plan)
    on = {key for key, _, quantizer in sites_of(quant_vit) if quantizer.state is State.QUANTIZE}
    assert on == {key for key in plan.sites if key.endswith(("._input_quantizer", "._weight_quantizer"))}
    assert plan.amax[f"{LAYER}0.ffn.fc1._weight_quantizer"].shape == (128, 1)


def test_only_what_is_needed_is_collected(quant_vit: VisionTransformer, images: Tensor) -> None:
    assert kinds_needed([make_setting("ft1", "max")]) == ("range",)
    assert kinds_needed([make_setting("ft1", "max"), make_setting("ft1", "mse")]) == ("histogram",)
    assert kinds_needed([with_rules("0.* -> entropy")]) == ("histogram",)
    ranges = collect_statistics(quant_vit, enumerate(images.split(12)), [1, 2], kinds=("range",))
    whole = collect_statistics(quant_vit, enumerate(images.split(12)), [1, 2])
    for n in (1, 2):
        setting = make_setting("ft2", "max", n)
        assert same(plan_of(quant_vit, ranges, setting), plan_of(quant_vit, whole, setting))
    assert CalibrationStatistics.from_bytes(ranges.to_bytes()) == ranges
    with pytest.raises(StatisticsError, match="no histogram was collected, only range"):
        plan_of(quant_vit, ranges, make_setting("ft2", "mse", 2))


SCRIPT = """
from vitq_ray.calibration import calibrators as c
number = c.Parameter("share", 0, 1, 0.5, "of the largest value")
part = lambda seen, values, bits: values[0] * c.max_amax(seen)
weight = lambda w, values, axis, bits: values[0] * c.weight_max(w, axis)
c.CALIBRATORS["part"] = c.Calibrator("part", "a share of max", "range", part, weight, (number,))
from vitq_ray.commands.options import CalibrateOptions
from vitq_ray.commands.parser import parse
from vitq_ray.search.space import space_of
options = parse(CalibrateOptions, ["--calibrator", "part", "--share", "0.25"], "calib")
print(options.setting.label)
space = space_of({"calibrator": ["part"], "share": [0.1, 0.9], "weights": ["part 0.5"]}, "x.py")
for setting in space.grid(options.setting):
    print(setting.label)
try:
    parse(CalibrateOptions, ["--calibrator", "part", "--share", "2"], "calib")
except ValueError as error:
    print(error)
"""


def test_options_and_spaces_read_the_table_of_calibrators(capsys: pytest.CaptureFixture[str]) -> None:
    """The row is there before anything reads the table."""
    with fresh_package():
        exec(SCRIPT, {})
    assert capsys.readouterr().out.splitlines() == [
        "ft2 part 0.25 n=10 w8a8",
        "ft2 part 0.1 n=10 w8a8 weights=part 0.5",
        "ft2 part 0.9 n=10 w8a8 weights=part 0.5",
        "--share: expected a number from 0 to 1, got '2'",
    ]


def test_rules_of_different_kinds_all_hold(scales: Scales) -> None:
    plan = scales.plan(with_rules("0.* -> x 0.5", "0.* -> 6 bits", "0.ffn.* -> off", "* -> mse", "0.* -> x 0.25"))
    mse = scales.plan(with_rules("0.* -> 6 bits", base=make_setting("ft2", "mse", 1)))
    key = f"{LAYER}0.attn.matmul_a_input_quantizer"
    assert plan.sites[key].rule.bits == 6
    assert torch.equal(plan.amax[key], mse.amax[key] * 0.25)
    assert not plan.sites[f"{LAYER}0.ffn.fc1._input_quantizer"].rule.on


@pytest.mark.parametrize("calibrator", ["max", "percentile 99.9", "percentile 100", "mse", "entropy"])
@pytest.mark.parametrize("mode", ["ft1", "ft2", "trt"])
def test_dead_sites_get_amax_0_and_are_listed(
    mode: str, calibrator: str, quant_vit: VisionTransformer, images: Tensor
) -> None:
    """The output projection of a pruned attention: its weights, its output before the bias, what is added."""
    for parameter in quant_vit.blocks[1].attn.proj.parameters():
        parameter.data.zero_()
    setting = make_setting(mode, calibrator, 1)
    statistics = collect_statistics(quant_vit, [(0, images)], [1], kinds=kinds_of(setting.calibrations, "histogram"))
    plan = plan_of(quant_vit, statistics, setting)
    names = ("attn.out._weight_quantizer", "attn.out._aftergemm_quantizer", "add1_local_input_quantizer")
    assert plan.degenerate_sites() == [f"{LAYER}1.{name}" for name in names]
    forecast = noise_per_site(quant_vit, statistics, 1, plan)
    assert all(np.isfinite(value) for value in forecast.values())
    assert forecast[f"{LAYER}1.attn.out._weight_quantizer"] == 0
    apply_plan(quant_vit, plan)
    with torch.inference_mode():
        assert torch.isfinite(quant_vit(images)).all()


def test_a_site_that_wakes_after_the_first_batch(quant_vit: VisionTransformer, images: Tensor) -> None:
    """Its largest value is known, the distribution is not: an error only where a histogram would decide what is on."""
    dead, alive = images.clone(), images
    quant_vit.blocks[0].mlp.fc1.weight.data.zero_()
    statistics = collect_statistics(quant_vit, [(0, dead)], [2])
    key = f"{LAYER}0.ffn.fc1._aftergemm_quantizer"
    torch.manual_seed(0)
    quant_vit.blocks[0].mlp.fc1.weight.data.normal_()
    statistics = statistics.merge(collect_statistics(quant_vit, [(1, alive)], [2], statistics.widths()))
    largest = observed(quant_vit, alive)[key].abs().max()
    scales = Scales(quant_vit, statistics)
    assert scales.plan(make_setting("ft2", "max", 2)).amax[key] == largest
    assert scales.plan(make_setting("ft1", "mse", 2)).amax[key] == largest  # ft1 leaves it out
    with pytest.raises(InputError, match=rf"{re.escape(key)}: is all zeros in the first calibration batch and not"):
        scales.plan(make_setting("ft2", "mse", 2))


def test_noise_is_of_the_sites_that_are_on(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics, scales: Scales
) -> None:
    plan = scales.plan(with_rules("0.ffn.* -> off", "1.ffn.* -> 2 bits", base=make_setting("ft1", "max", 1)))
    noise = noise_per_site(quant_vit, statistics, 1, plan)
    assert set(noise) == {key for key, site in plan.sites.items() if site.rule.on}
    exact = noise_per_site(quant_vit, statistics, 1, scales.plan(make_setting("ft1", "max", 1)))
    coarse = [key for key in noise if noise[key] != exact[key]]
    assert coarse == [key for key in noise if key.startswith(f"{LAYER}1.ffn.")]
    assert all(noise[key] > 100 * exact[key] for key in coarse)


def test_a_setting_applied_is_the_plan_returned(
    quant_vit: VisionTransformer, statistics: CalibrationStatistics
) -> None:
    plan = apply_setting(quant_vit, statistics, with_rules("*.fc2.* -> 4 bits"))
    for key, _, quantizer in sites_of(quant_vit):
        assert quantizer.rule == plan.sites[key].rule
        assert torch.equal(quantizer.amax, plan.sites[key].amax)
    assert set(site_weights(quant_vit)) <= set(plan.sites)


def test_share_of_quantized_weights(quant_vit: VisionTransformer, scales: Scales) -> None:
    """Counted by hand: fc2 of both blocks is 32 x 128 each, a site that is off does not count."""
    total = sum(parameter.numel() for parameter in quant_vit.parameters())
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 128)
    assert quantized_weight_share(quant_vit, scales.plan(BASE)) == linear / total
    ruled = scales.plan(with_rules("*.fc2._weight_quantizer -> off"))
    assert quantized_weight_share(quant_vit, ruled) == (linear - 2 * 32 * 128) / total
