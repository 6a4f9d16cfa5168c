"""The quantized ViT: equal to timm when off, every site where the design says, modes as a table."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from tests.conftest import observed, plan_by_hand, tiny_vit
from vitq_ray.base.config import InputError
from vitq_ray.quant.fake_quant import fake_quantize
from vitq_ray.quant.quantizer import State
from vitq_ray.quant.sites import MODES, SITES, WEIGHT
from vitq_ray.quant.vit import (
    apply_plan,
    frozen_weights,
    observing,
    quant_blocks,
    quantize_vit,
    quantizers_off,
    sites_of,
    tensor_keys,
)

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "qk-norm": {"qk_norm": True},
    "LayerScale": {"init_values": 0.3},
    "register tokens": {"reg_tokens": 3, "no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "average pooling": {"class_token": False, "global_pool": "avg"},
}


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantizers_off_equals_timm(variant: str, images: Tensor) -> None:
    expected = run(tiny_vit(**VARIANTS[variant]), images)
    model = quantize_vit(tiny_vit(**VARIANTS[variant]))
    torch.testing.assert_close(run(model, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_observing_equals_timm(variant: str, images: Tensor) -> None:
    """The path with explicit attention, which quantized modes take too, computes the same model."""
    expected = run(tiny_vit(**VARIANTS[variant]), images)
    model = quantize_vit(tiny_vit(**VARIANTS[variant]))
    with observing(model, dict.fromkeys(tensor_keys(model), lambda x: None)):
        torch.testing.assert_close(run(model, images), expected, rtol=1e-5, atol=1e-5)


def test_state_dict_is_that_of_timm_plus_amax(float_vit: VisionTransformer) -> None:
    names = set(float_vit.state_dict())
    ours = {name for name in quantize_vit(float_vit).state_dict() if not name.endswith("._amax")}
    assert ours == names


def test_29_sites_per_block(quant_vit: VisionTransformer) -> None:
    keys = [key for key, _, _ in sites_of(quant_vit)]
    assert len(SITES) == 29
    assert len(keys) == len(set(keys)) == 58
    assert keys[0] == "transformer.encoder.layer.0.ffn.fc1._input_quantizer"


def by_hand(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """All activation sites of a timm block, computed from its parameters as DESIGN section 4 lists them."""
    sites = {"layernorm_input1": x, "add1_residual_input": x}
    h = block.norm1(x)
    heads = {}
    names = ("query", "key", "value")
    weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
    for name, weight, bias in zip(names, weights, biases, strict=True):
        sites[f"attn.{name}._input"] = h
        sites[f"attn.{name}._aftergemm"] = h @ weight.T
        batch, tokens, _ = h.shape
        heads[name] = (h @ weight.T + bias).reshape(batch, tokens, block.attn.num_heads, -1).permute(0, 2, 1, 3)
        norms = {"query": block.attn.q_norm, "key": block.attn.k_norm, "value": torch.nn.Identity()}
        heads[name] = norms[name](heads[name])
        sites[f"attn.matmul_{name[0]}_input"] = heads[name]
    scores = heads["query"] @ heads["key"].transpose(2, 3)
    sites["attn.softmax_input"] = scores
    probabilities = torch.softmax(scores / math.sqrt(heads["query"].shape[-1]), -1)
    sites["attn.matmul_a_input"] = probabilities
    merged = (probabilities @ heads["value"]).permute(0, 2, 1, 3).reshape(x.shape)
    sites["attn.out._input"] = merged
    sites["attn.out._aftergemm"] = merged @ block.attn.proj.weight.T
    local = block.ls1(sites["attn.out._aftergemm"] + block.attn.proj.bias)
    sites["add1_local_input"] = local
    x = x + local
    sites["layernorm_input2"] = sites["add2_residual_input"] = x
    h = block.norm2(x)
    sites["ffn.fc1._input"] = h
    sites["ffn.fc1._aftergemm"] = h @ block.mlp.fc1.weight.T
    h = F.gelu(sites["ffn.fc1._aftergemm"] + block.mlp.fc1.bias)
    sites["ffn.fc2._input"] = h
    sites["ffn.fc2._aftergemm"] = h @ block.mlp.fc2.weight.T
    sites["add2_local_input"] = block.ls2(sites["ffn.fc2._aftergemm"] + block.mlp.fc2.bias)
    return {f"{name}_quantizer": tensor for name, tensor in sites.items()}


@pytest.mark.parametrize("variant", ["plain", "qk-norm", "LayerScale"])
def test_every_site_sees_its_tensor(variant: str, images: Tensor) -> None:
    float_model = tiny_vit(**VARIANTS[variant])
    with torch.inference_mode():
        expected = by_hand(float_model.blocks[0], float_model._pos_embed(float_model.patch_embed(images)))
    seen = observed(quantize_vit(float_model), images)
    activation_sites = [site for site in SITES if site.family != WEIGHT]
    assert set(expected) == {site.name for site in activation_sites}
    for site in activation_sites:
        tensor = seen[f"transformer.encoder.layer.0.{site.tensor}"]
        torch.testing.assert_close(tensor, expected[site.name], rtol=1e-4, atol=1e-5, msg=site.name)


def test_a_tensor_of_several_sites_is_observed_once(quant_vit: VisionTransformer, images: Tensor) -> None:
    seen = observed(quant_vit, images)
    assert len(seen) == 2 * 19
    assert not any("attn.key._input" in key or "residual" in key for key in seen)


def test_observing_always_removes_its_observers(quant_vit: VisionTransformer, images: Tensor) -> None:
    def fail(x: Tensor) -> None:
        raise RuntimeError("observer failed")

    observers = dict.fromkeys(tensor_keys(quant_vit), fail)
    with pytest.raises(RuntimeError, match="observer failed"), observing(quant_vit, observers):
        run(quant_vit, images)
    assert {q.state for _, _, q in sites_of(quant_vit)} == {State.OFF}
    assert {q._observer for _, _, q in sites_of(quant_vit)} == {None}


LEFT_OUT = {  # DESIGN section 4, by hand: (site name contains) -> modes that leave it out
    "layernorm_input": set(MODES),
    "residual_input": {"ft1", "ft2", "ort", "openvino"},
    "local_input": {"ft1", "ft2", "ft3", "ort", "openvino", "tensorrt"},
    "softmax_input": {"ft1", "trt", "ort", "openvino", "tensorrt"},
    "_aftergemm": {"ft1", "trt", "ort", "openvino", "tensorrt"},
    "._input": set(),
    "._weight": set(),
    "matmul_": set(),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_switch_the_sites_of_the_table(mode: str, quant_vit: VisionTransformer, images: Tensor) -> None:
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, mode))
    for key, _, quantizer in sites_of(quant_vit):
        (family,) = [name for name in LEFT_OUT if name in key]
        wanted = State.OFF if mode in LEFT_OUT[family] else State.QUANTIZE
        assert quantizer.state is wanted, key


def quantized_block_by_hand(block: nn.Module, x: Tensor, amax: dict[str, Tensor], bits: int) -> Tensor:
    """ft2 of one timm block, written out from the table of sites."""

    def quant(name: str, tensor: Tensor) -> Tensor:
        return fake_quantize(tensor, amax[f"transformer.encoder.layer.0.{name}_quantizer"], bits)

    def linear(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, weight = quant(f"{name}._input", x), quant(f"{name}._weight", weight)
        return quant(f"{name}._aftergemm", x @ weight.T) + bias

    h = block.norm1(x)
    batch, tokens, _ = h.shape
    split = []
    names = ("query", "key", "value")
    parts = zip(names, block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
    for name, weight, bias in parts:
        y = linear(f"attn.{name}", h, weight, bias).reshape(batch, tokens, block.attn.num_heads, -1)
        split.append(quant(f"attn.matmul_{name[0]}_input", y.permute(0, 2, 1, 3)))
    q, k, v = split
    scores = quant("attn.softmax_input", q @ k.transpose(2, 3)) * block.attn.scale
    merged = (quant("attn.matmul_a_input", scores.softmax(-1)) @ v).permute(0, 2, 1, 3).reshape(x.shape)
    x = x + linear("attn.out", merged, block.attn.proj.weight, block.attn.proj.bias)
    h = F.gelu(linear("ffn.fc1", block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + linear("ffn.fc2", h, block.mlp.fc2.weight, block.mlp.fc2.bias)


@pytest.mark.parametrize("bits", [3, 8])
def test_a_quantized_block_equals_the_table_written_out(bits: int, images: Tensor) -> None:
    float_model = tiny_vit()
    x = float_model._pos_embed(float_model.patch_embed(images)).detach()
    block = float_model.blocks[0]
    model = quantize_vit(tiny_vit())
    plan = plan_by_hand(model, images, "ft2", bits)
    apply_plan(model, plan)
    with torch.inference_mode():
        expected = quantized_block_by_hand(block, x, plan.amax, bits)
        torch.testing.assert_close(quant_blocks(model)[0](x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_fewer_bits_are_worse(mode: str, quant_vit: VisionTransformer, images: Tensor) -> None:
    exact = run(quant_vit, images)
    errors = []
    for bits in range(8, 1, -1):
        apply_plan(quant_vit, plan_by_hand(quant_vit, images, mode, bits))
        errors.append((run(quant_vit, images) - exact).pow(2).mean().item())
    assert errors[0] < 0.01 * errors[-1]
    assert errors[0] == min(errors)
    assert errors[0] > 0


def test_weight_and_activation_bits_are_separate(quant_vit: VisionTransformer, images: Tensor) -> None:
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft1", 4, act_bits=6))
    for _, site, quantizer in sites_of(quant_vit):
        assert quantizer.bits == (4 if site.family == WEIGHT else 6)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weights_change_nothing(mode: str, quant_vit: VisionTransformer, images: Tensor) -> None:
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, mode, 4))
    expected = run(quant_vit, images)
    with frozen_weights(quant_vit):
        with torch.no_grad():
            quant_blocks(quant_vit)[0].mlp.fc1.weight.zero_()
        assert torch.equal(run(quant_vit, images), expected)
    assert not torch.equal(run(quant_vit, images), expected), "thawed: the zeroed weight shows"


def test_quantizers_off_restores(quant_vit: VisionTransformer, images: Tensor) -> None:
    exact = run(quant_vit, images)
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    quantized = run(quant_vit, images)
    with quantizers_off(quant_vit):
        assert torch.equal(run(quant_vit, images), exact)
    assert torch.equal(run(quant_vit, images), quantized)
    assert not torch.equal(quantized, exact)


def test_gradients_reach_every_parameter(quant_vit: VisionTransformer, images: Tensor) -> None:
    apply_plan(quant_vit, plan_by_hand(quant_vit, images, "ft2"))
    quant_vit(images).pow(2).sum().backward()
    without = [name for name, p in quant_vit.named_parameters() if p.grad is None or not p.grad.any()]
    # A key bias adds the same to all scores of a query, so softmax gives it no gradient but for rounding.
    assert without == []


def test_other_blocks_are_refused() -> None:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=3, block_fn=ResPostBlock
    )
    with pytest.raises(InputError, match=r"blocks\.0 is a ResPostBlock, which cannot be quantized"):
        quantize_vit(model)
