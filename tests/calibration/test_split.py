"""The correction `split`: large values of fc2's input shared among neurons."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_vit
from test_planner import IMAGES, fisher, kl, planner_of
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.calibration.planner import require_techniques, with_changed
from vitq_ray.calibration.split import Split, split
from vitq_ray.models.checkpoint import CalibratedModel
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.plan import Plan
from vitq_ray.quant.vit import clipped, observing, quantize_vit, site_weights, tensor_keys

KEY = "transformer.encoder.layer.{}.ffn.fc2._input_quantizer".format
LARGE = 5  # the neuron of block 0 whose values are far above all others'


@pytest.fixture
def model() -> nn.Module:
    """A neuron that is about 12 for every token."""
    found = quantize_vit(tiny_vit()).eval()
    with torch.no_grad():
        found.blocks[0].mlp.fc1.bias[LARGE] += 12.0
    return found


def shown(model: nn.Module, key: str) -> Tensor:
    """One tensor of the float model, for all images."""
    parts: list[Tensor] = []
    observers = {each: parts.append if each == key else _ignored for each in tensor_keys(model)}
    with torch.inference_mode(), observing(model, observers):
        model(IMAGES)
    return torch.cat(parts)


def _ignored(x: Tensor) -> None:
    pass


def written(model: nn.Module, plan: Plan, found: Split | None) -> Tensor:
    """What fc2 of block 0 writes where only its input is quantized."""
    twin = model if found is None else with_changed(model, found.changes)
    site = plan.sites[KEY(0)]
    amax = site.amax if found is None else torch.tensor(found.amax[KEY(0)])
    x = fake_quantize(shown(twin, KEY(0)), amax, levels=site.rule.levels)
    written: Tensor = twin.blocks[0].mlp.fc2(x).detach()
    return written


@pytest.mark.parametrize("mode", ["ft1", "ft2", "tensorrt"])
def test_a_large_neuron_is_carried_by_spares_at_a_finer_scale(model: nn.Module, mode: str) -> None:
    plan = planner_of(model, fisher(mode=mode)).plan(fisher(mode=mode))
    found = split(model, plan, IMAGES, {})
    amax, before = found.amax[KEY(0)], float(plan.sites[KEY(0)].amax)
    assert amax < 0.6 * before
    mlp, own = model.blocks[0].mlp, with_changed(model, found.changes).blocks[0].mlp
    taken = [n for n in range(len(mlp.fc1.weight)) if not torch.equal(mlp.fc1.weight[n], own.fc1.weight[n])]
    of_large = [n for n in taken if torch.equal(own.fc1.weight[n], mlp.fc1.weight[LARGE])]
    assert LARGE not in taken
    assert len(of_large) == int(shown(model, KEY(0)).max() / amax)  # as many as there are multiples of amax below it
    below = sorted(((mlp.fc1.bias[LARGE] - own.fc1.bias[of_large]) / amax).tolist())
    assert below == pytest.approx(range(1, 1 + len(of_large)), rel=1e-4)
    assert all(torch.equal(own.fc2.weight[:, n], mlp.fc2.weight[:, LARGE]) for n in of_large)
    wanted = mlp.fc2(shown(model, KEY(0))).detach()
    errors = [float((written(model, plan, each) - wanted).square().mean()) for each in (None, found)]
    assert errors[1] < 0.3 * errors[0]
    corrected = planner_of(model, fisher(mode=mode)).plan(fisher(mode=mode, corrections=("split",)))
    key = KEY(0).replace("fc2._input", "fc1._weight")
    weight, site = site_weights(with_changed(model, corrected.weights))[key], corrected.sites[key]
    rows = fake_quantize(weight, site.amax, axis=site.rule.axis, levels=site.rule.levels)
    assert all(torch.equal(rows[n], rows[LARGE]) for n in of_large)  # copies are quantized alike
    assert kl(model, corrected, IMAGES) < 0.8 * kl(model, plan, IMAGES)


def test_with_activations_that_clip_it_is_the_float_model(model: nn.Module) -> None:
    plan = planner_of(model, fisher(8)).plan(fisher(8))
    found = split(model, plan, IMAGES, {})
    with torch.inference_mode():
        wanted = model(IMAGES)
        twin = clipped(with_changed(model, found.changes), found.amax)(IMAGES)
        without_clipping = with_changed(model, found.changes)(IMAGES)
    assert float((twin - wanted).abs().max()) < 0.1 * float(wanted.std())
    assert float((without_clipping - wanted).abs().max()) > float((twin - wanted).abs().max())


def test_a_checkpoint_without_its_quantizers_is_about_the_float_model(model: nn.Module) -> None:
    """What export compares with, and what a training starts from."""
    setting = fisher(8, corrections=("split",))
    plan = planner_of(model, setting).plan(setting)
    loaded, sidecar = SimpleNamespace(model=with_changed(model, plan.weights)), SimpleNamespace(setting=setting)
    with torch.inference_mode():
        wanted = model(IMAGES)
        found = CalibratedModel(loaded, plan, sidecar).without_quantizers()(IMAGES)  # type: ignore[arg-type]
        weights_alone = loaded.model(IMAGES)
    assert float((found - wanted).abs().max()) < 0.1 * float(wanted.std()) < float((weights_alone - wanted).abs().max())


def test_the_mean_of_spares_and_of_what_is_left_goes_into_the_bias(model: nn.Module) -> None:
    plan = planner_of(model, fisher()).plan(fisher())
    found = split(model, plan, IMAGES, {})
    twin = clipped(with_changed(model, found.changes), found.amax)
    x, y = (each.blocks[0].mlp.fc2(shown(each, KEY(0))).detach() for each in (model, twin))
    assert torch.allclose(x.mean(dim=(0, 1)), y.mean(dim=(0, 1)), atol=1e-4)


def test_other_corrections_come_on_top(model: nn.Module) -> None:
    names = ((), ("fit", "round"), ("split", "fit", "round"), ("split", "round"), ("split", "round", "bias"))
    planner = planner_of(model, *(fisher(corrections=each) for each in names))
    losses = {each: kl(model, planner.plan(fisher(corrections=each)), IMAGES) for each in names}
    assert losses[("split", "fit", "round")] < 0.8 * losses[("fit", "round")] < losses[()]
    assert losses[("split", "round")] < losses[()]
    assert losses[("split", "round", "bias")] < losses[()]


def test_nothing_is_split_where_nothing_gains(model: nn.Module) -> None:
    plain = quantize_vit(tiny_vit()).eval()
    for rules in (("*.ffn.fc2._input_quantizer -> off",), ("*.ffn.fc2._input_quantizer -> asymmetric",)):
        setting, without = (fisher(rules=rules, mode="ft1", corrections=names) for names in (("split",), ()))
        planner = planner_of(model, setting, without)
        assert planner.plan(setting).key == planner.plan(without).key
    with torch.no_grad():
        for block in plain.blocks:
            block.mlp.fc2.weight.zero_()  # nothing depends on what it reads
    plan = planner_of(plain, fisher()).plan(fisher())
    assert split(plain, plan, IMAGES, {}) == Split({}, {}, {})


@pytest.mark.parametrize("factor", [0.8, 8.0])
def test_a_rules_factor_multiplies_the_scale_that_serves(model: nn.Module, factor: float) -> None:
    """Also where nothing is above the scale that it leads to."""
    amax = {}
    for by in (1.0, factor):
        setting = fisher(rules=(f"*.ffn.fc2._input_quantizer -> x {by}",), corrections=("split",))
        amax[by] = planner_of(model, setting).plan(setting).sites[KEY(0)].amax
    assert torch.isclose(amax[factor], factor * amax[1.0])


def test_a_neuron_takes_no_more_spares_than_there_are(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitq_ray.calibration.split._MOST", 4)
    found = split(model, planner_of(model, fisher()).plan(fisher()), IMAGES, {})
    spares, _ = found.copies[KEY(0).replace("fc2._input", "fc1._weight")]
    assert 1 <= len(spares) <= 4
    assert found.amax[KEY(0)] >= float(shown(model, KEY(0)).max()) / 5


def test_neurons_that_are_split_are_no_spares(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[:20] += 8.0
    found = split(model, planner_of(model, fisher()).plan(fisher()), IMAGES, {})
    spares, sources = found.copies[KEY(0).replace("fc2._input", "fc1._weight")]
    assert len(set(spares.tolist())) == len(spares) == len(sources)
    assert not set(spares.tolist()) & set(sources.tolist())


def test_a_layer_without_a_bias_is_refused(model: nn.Module) -> None:
    bare = copy.deepcopy(model)
    bare.blocks[1].mlp.fc1.register_parameter("bias", None)
    with pytest.raises(InputError, match=r"correction split: mlp\.fc1 has no bias"):
        require_techniques(bare, [fisher(corrections=("split",))])
