"""What parts of a plan cost, the share of integer work, and which parts are left in float."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import plan_by_hand, tiny_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitq_ray.base.config import InputError
from vitq_ray.calibration.scales import Scales, grids_of_plan
from vitq_ray.calibration.sensitivity import collect_sensitivity
from vitq_ray.engines.execute import Engine
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.sites import LAYER_PREFIX, MODES
from vitq_ray.quant.vit import apply_plan, float_copy, quantize_vit
from vitq_ray.quant.work import integer_share, products_of
from vitq_ray.search.float_sets import Choice, choices_of, float_set, rules_of_set
from vitq_ray.search.site_effects import Effect, Part, effects, parts_of, predicted_of

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantize_vit(tiny_vit()).eval()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return plan_by_hand(model, IMAGES, "ft2", 4)


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IMAGES).double()
        return found


def test_work_is_that_of_a_flop_counter() -> None:
    """PyTorch counts 2 operations a multiply-accumulate, here of everything; the patches and the head are not ours."""
    vit = tiny_vit()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        vit(IMAGES[:1])
    embedding, head = 4 * 32 * 3 * 8 * 8, 32 * 7
    products = products_of(quantize_vit(vit))
    assert sum(p.macs for p in products) == counter.get_total_flops() // 2 - embedding - head
    assert len(products) == 2 * 8


@pytest.mark.parametrize("mode", MODES)
def test_share_of_a_plan(model: nn.Module, mode: str) -> None:
    plan, products = plan_by_hand(model, IMAGES, mode), products_of(model)
    assert integer_share(products, plan) == 1
    half = plan.without(
        [f"{LAYER_PREFIX}1.{name}" for name in ("attn.out._weight_quantizer", "add1_local_input_quantizer")]
    )
    out = next(p for p in products if (p.block, p.name) == (1, "attn.out"))
    assert integer_share(products, half) == pytest.approx(1 - out.macs / sum(p.macs for p in products))
    assert integer_share(products, plan.only(())) == 0


def test_only_and_without(plan: Plan) -> None:
    on = {key for key, site in plan.sites.items() if site.rule.on}
    off = next(key for key in plan.sites if key not in on)
    key = next(iter(on))
    assert {k for k, s in plan.only([key, off]).sites.items() if s.rule.on} == {key}
    assert {k for k, s in plan.without([key]).sites.items() if s.rule.on} == on - {key}
    assert plan.only(on).key == plan.key


def test_every_site_is_in_one_part_of_each_kind(plan: Plan) -> None:
    on = [key for key, site in plan.sites.items() if site.rule.on]
    for kind in ("whole", "site", "family", "block"):
        parts = parts_of(plan, [kind])
        assert sorted(itertools.chain.from_iterable(part.keys for part in parts)) == sorted(on)
    assert [part.name for part in parts_of(plan, ["block"])] == ["0.*", "1.*"]
    shared = next(part for part in parts_of(plan, ["site"]) if part.name == "1.attn.query._input_quantizer")
    assert [key.rpartition(".attn.")[2] for key in shared.keys] == [
        f"{n}._input_quantizer" for n in ("query", "key", "value")
    ]
    with pytest.raises(InputError, match="kind of part: 'layer' is not one of whole, site, family, block"):
        parts_of(plan, ["layer"])


def test_effects_are_those_of_the_part_alone(model: nn.Module, plan: Plan) -> None:
    """Beside the eager model, quantizers switched by hand."""
    parts = [part for part in parts_of(plan) if part.name in ("*", "*.ffn.fc2._input_quantizer", "1.*")]
    assert len(parts) == 3
    found = dict(effects(model, plan, parts, IMAGES.split(3), Engine("fake")))
    floating = logits(float_copy(model)).log_softmax(1)
    for part, results in found.items():
        apply_plan(model, plan.only(part.keys))
        others = logits(model).log_softmax(1)
        expected = (floating.exp() * (floating - others)).sum(1).numpy()
        np.testing.assert_allclose(results["kl"], expected, rtol=0.05, atol=1e-4)
    assert found[parts[0]]["kl"].mean() > found[parts[1]]["kl"].mean() > 0


def test_predictions_of_a_plan_without_its_setting(model: nn.Module, plan: Plan) -> None:
    seen = collect_sensitivity(float_copy(model).eval(), IMAGES, grids_of_plan(plan, 2))
    losses = Scales(model, None, seen).predicted_kl(plan)
    whole, *families = parts_of(plan, ["whole", "family"])
    assert predicted_of(whole, losses) == pytest.approx(sum(predicted_of(part, losses) for part in families))
    assert predicted_of(whole, losses) > 0


def test_an_effect_has_an_interval() -> None:
    kl = np.array([0.1, 0.3, 0.2, 0.2], np.float32)
    effect = Effect(Part("block", "0.*", ("a", "b")), {"kl": kl, "agree": np.array([True, False, True, True])}, 0.15)
    assert effect.mean == pytest.approx(0.2)
    low, high = effect.interval95
    assert (low + high) / 2 == pytest.approx(0.2)
    assert high - low == pytest.approx(2 * 1.96 * np.std([0.1, 0.3, 0.2, 0.2], ddof=1) / 2)
    assert effect.to_dict()["agreement"] == 0.75
    assert effect.to_dict()["sites"] == 2
    assert Effect(effect.part, {"kl": kl[:1]}).interval95 == (0.0, float("inf"))


def test_choices_of_a_plan(model: nn.Module, plan: Plan) -> None:
    found = {choice.part.name: choice for choice in choices_of(plan, products_of(model))}
    assert len(found) == 2 * 6
    assert found["0.probabilities"].group == found["0.attention"].group
    assert found["0.attention"].macs == 2 * found["0.probabilities"].macs
    assert rules_of_set([found["1.ffn.fc1"]])[0].action == "off"
    assert len(found["1.qkv"].part.keys) == 9
    gone = plan.without(found["0.attention"].part.keys)
    assert {"0.attention", "0.probabilities"}.isdisjoint(c.part.name for c in choices_of(gone, products_of(model)))


def test_the_knapsack_is_the_best_of_all_subsets() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        choices = [
            Choice(f"g{i // 2}", (), Part("choice", f"c{i}", (f"k{i}",)), int(rng.integers(0, 2000))) for i in range(10)
        ]
        losses = {choice.part.name: float(rng.normal(0.5)) for choice in choices}
        budget = float(rng.integers(1, 6000))
        best = 0.0
        for size in range(6):
            for subset in itertools.combinations(choices, size):
                alone = len({choice.group for choice in subset}) == size
                if alone and sum(choice.macs for choice in subset) <= 0.995 * budget:  # what rounding up may cost
                    best = max(best, sum(losses[choice.part.name] for choice in subset))
        chosen = float_set(choices, losses, budget)
        assert sum(choice.macs for choice in chosen) <= budget
        assert len({choice.group for choice in chosen}) == len(chosen)
        assert sum(losses[choice.part.name] for choice in chosen) >= best - 1e-12
    assert float_set(choices, losses, 0.0) == []
