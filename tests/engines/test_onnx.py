"""Exported files: they compute what the plan computes here, in ONNX Runtime and OpenVINO."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.conftest import plan_by_hand, tiny_vit
from tests.engines.test_int8 import VARIANTS, changed, variant_of
from vitq_ray.base.config import InputError
from vitq_ray.engines.conditions import tensorrt_conditions
from vitq_ray.engines.execute import Engine, executed
from vitq_ray.engines.onnx import Encoding, onnx_model
from vitq_ray.engines.runtimes import METADATA, open_file, read_metadata
from vitq_ray.engines.targets import TARGETS, Shape, reduced_range, symmetric
from vitq_ray.quant.plan import Plan, SitePlan, SiteRule
from vitq_ray.quant.sites import MODES, WEIGHT
from vitq_ray.quant.vit import apply_plan, quantize_vit

EXACT = Encoding(TARGETS["ort"], unsigned_right=True)  # no kernel saturates, on any CPU
OTHERS: dict[str, dict[str, Any]] = {"largest": {"global_pool": "max"}, "larger images": {"img_size": 24}}


def save(model: nn.Module, plan: Plan, path: Path, encoding: Encoding = EXACT) -> str:
    path.write_bytes(onnx_model(model, plan, encoding, {METADATA: json.dumps({"a": 1})}).SerializeToString())
    return str(path)


def here(model: nn.Module, images: Tensor) -> Tensor:
    with executed(model, Engine("int8")) as run, torch.inference_mode():
        return run(images)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """But for a rounding that fell to the other side, in an image here and there."""
    off = (found - expected).abs().amax(1) / expected.std()
    assert (off < 1e-4).float().mean() >= 0.9, off


@pytest.fixture
def ort_plan(quant_vit: nn.Module, images: Tensor) -> Plan:
    plan = plan_by_hand(quant_vit.eval(), images, "ort")
    apply_plan(quant_vit, plan)
    return plan


@pytest.mark.parametrize("kind", [*(name for name in VARIANTS if name != "hybrid"), *OTHERS])
def test_every_kind_of_vit(kind: str, tmp_path: Path) -> None:
    model = quantize_vit(tiny_vit(**OTHERS[kind]) if kind in OTHERS else variant_of(kind)).eval()
    images = torch.randn(12, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    plan = plan_by_hand(model, images, "ort")
    apply_plan(model, plan)
    path, expected = save(model, plan, tmp_path / "m.onnx"), here(model, images)
    assert_same(open_file(path, "ort")(images), expected)
    assert_same(open_file(path, "ort", integers=False)(images), expected)


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch32_384",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_384",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_siglip_gap_384",
    ],
)
def test_families_of_timm(name: str, tmp_path: Path) -> None:
    """As timm builds them, but for width and depth."""
    torch.manual_seed(0)
    size = {} if name[-3:] in ("224", "384") else {"img_size": 224}
    model = timm.create_model(name, embed_dim=32, depth=2, num_heads=4, num_classes=7, **size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    model = quantize_vit(model).eval()
    plan = plan_by_hand(model, images, "ort")
    apply_plan(model, plan)
    path, expected = save(model, plan, tmp_path / "m.onnx"), here(model, images)
    for integers in (True, False):
        off = (open_file(path, "ort", integers)(images) - expected).abs().mean() / expected.std()
        assert off < 0.02, off


def test_a_hybrid_is_refused(images: Tensor) -> None:
    model = quantize_vit(variant_of("hybrid")).eval()
    with pytest.raises(InputError, match="export: HybridEmbed has no translation; expected a convolution of patches"):
        onnx_model(model, plan_by_hand(model, images, "ort"), EXACT, {})


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str, bits: int, quant_vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """What Q/DQ say is the plan, also where the target would refuse it."""
    plan = plan_by_hand(quant_vit.eval(), images, mode, bits)
    apply_plan(quant_vit, plan)
    target = TARGETS.get(mode, TARGETS["ort"])
    path = save(quant_vit, plan, tmp_path / "m.onnx", Encoding(target))
    assert_same(open_file(path, "ort", integers=False)(images), here(quant_vit, images))


@pytest.mark.parametrize("mode", ["ort", "openvino", "tensorrt"])
def test_quantizers_stand_at_the_sites_of_the_plan(mode: str, quant_vit: nn.Module, images: Tensor) -> None:
    plan = plan_by_hand(quant_vit.eval(), images, mode)
    apply_plan(quant_vit, plan)
    made = onnx_model(quant_vit, plan, Encoding(TARGETS[mode]), {})
    nodes = Counter(node.op_type for node in made.graph.node)
    quantized = {node.name for node in made.graph.node if node.op_type == "QuantizeLinear"}
    on = {key.replace("transformer.encoder.layer", "blocks") for key, site in plan.sites.items() if site.rule.on}
    names = {name for name in on if "_weight_" not in name}
    same = {f"blocks.{i}.attn.{name}._input_quantizer" for i in (0, 1) for name in ("key", "value")}  # one quantizer
    assert quantized == names - same
    assert nodes["DequantizeLinear"] == len(quantized) + 12
    constants = {row.name: numpy_helper.to_array(row) for row in made.graph.initializer}
    weight = dict(quant_vit.named_parameters())["blocks.0.mlp.fc1.weight"].detach()
    site = plan.sites["transformer.encoder.layer.0.ffn.fc1._weight_quantizer"]
    levels = constants["blocks.0.ffn.fc1.weight.levels"]
    assert levels.dtype == np.int8
    expected = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round().t().numpy()
    assert np.array_equal(levels, expected)
    np.testing.assert_allclose(constants["blocks.0.ffn.fc1.weight.scale"], site.amax.flatten() / 127, rtol=1e-6)
    assert made.opset_import[0].version >= 19
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    before_softmax = [node.input[0] for node in made.graph.node if node.op_type == "Softmax"]
    assert before_softmax == ["blocks.0.attn.scores", "blocks.1.attn.scores"], "1/√d is in what makes q"
    inputs = constants["blocks.1.ffn.fc2._input_quantizer.zero_point"].dtype
    assert inputs == (np.int8 if mode == "tensorrt" else np.uint8)


def test_seven_bits_do_not_saturate(quant_vit: nn.Module, ort_plan: Plan, images: Tensor, tmp_path: Path) -> None:
    plan = reduced_range(ort_plan)
    apply_plan(quant_vit, plan)
    path = save(quant_vit, plan, tmp_path / "m.onnx", Encoding(TARGETS["ort"]))
    levels = [numpy_helper.to_array(row) for row in onnx.load(path).graph.initializer if row.name.endswith("levels")]
    assert len(levels) == 12
    assert max(np.abs(level).max() for level in levels) == 63
    assert_same(open_file(path, "ort")(images), here(quant_vit, images))


def test_symmetric_grids_have_the_same_ranges(ort_plan: Plan) -> None:
    """Of [-0.5, 2] in 0 to 255: the step is then 2 / 127; of [-3, 1]: 3 / 127. Of probabilities up to 1: 1 / 127."""
    names = ("ffn.fc1._input_quantizer", "ffn.fc2._input_quantizer", "attn.matmul_a_input_quantizer")
    keys = [f"transformer.encoder.layer.0.{name}" for name in names]
    rules = (SiteRule(signed=False, zero_point=51), SiteRule(signed=False, zero_point=191), SiteRule(signed=False))
    sites = {key: SitePlan(torch.tensor(a), r) for key, a, r in zip(keys, (2.0, 1.0, 1.0), rules, strict=True)}
    found = symmetric(dataclasses.replace(ort_plan, sites={**ort_plan.sites, **sites}))
    steps = [float(found.sites[key].scale) for key in keys]
    np.testing.assert_allclose(steps, [2 / 127, 191 / 64 / 127, 1 / 127], rtol=1e-6)
    assert all(site.rule.signed and not site.rule.zero_point for site in found.sites.values())
    key = "transformer.encoder.layer.0.attn.matmul_q_input_quantizer"
    assert found.sites[key] is ort_plan.sites[key]


def test_sixteen_bits(quant_vit: nn.Module, ort_plan: Plan, images: Tensor, tmp_path: Path) -> None:
    path = save(quant_vit, ort_plan, tmp_path / "m.onnx", dataclasses.replace(EXACT, float16=True))
    kinds = {row.data_type for row in onnx.load(path).graph.initializer}
    assert TensorProto.FLOAT not in kinds
    found, expected = open_file(path, "ort", integers=False)(images), here(quant_vit, images)
    assert ((found - expected).abs().mean() / expected.std()) < 0.05
    tiny = dataclasses.replace(ort_plan, sites=dict(ort_plan.sites))
    key = "transformer.encoder.layer.0.attn.matmul_k_input_quantizer"
    tiny.sites[key] = dataclasses.replace(tiny.sites[key], amax=torch.tensor(1e-4))  # type: ignore[index]
    with pytest.raises(InputError, match=r"float16: blocks\.0\.attn\.matmul_k_input_quantizer\.scale is 7\.\d*e-07"):
        save(quant_vit, tiny, tmp_path / "m.onnx", dataclasses.replace(EXACT, float16=True))
    with torch.no_grad():
        quant_vit.head.bias[0] = 1e6
    with pytest.raises(InputError, match=r"float16: head\.bias has values up to 1e\+06, which 16 bits do not hold"):
        save(quant_vit, ort_plan, tmp_path / "m.onnx", dataclasses.replace(EXACT, float16=True))


def test_products_are_counted(quant_vit: nn.Module, ort_plan: Plan, tmp_path: Path) -> None:
    """By hand: 5 tokens of width 32, MLP 128, two blocks; 4 patches of 8 x 8; 7 classes."""
    census = open_file(save(quant_vit, ort_plan, tmp_path / "m.onnx"), "ort").census()
    blocks = 2 * (5 * (4 * 32 * 32 + 2 * 32 * 128) + 2 * 5 * 5 * 32)
    ends = {"patch_embed": 4 * 3 * 64 * 32, "head.matmul": 32 * 7}
    assert census.floating == ends
    assert census.share == pytest.approx(blocks / (blocks + sum(ends.values())))
    assert len(census.integer) == 16
    assert census.kinds["MatMulIntegerToFloat"] + census.kinds["QLinearMatMul"] == 16
    plain = open_file(str(tmp_path / "m.onnx"), "ort", integers=False).census()
    assert plain.integer == {}


def test_openvino(quant_vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="no OpenVINO")
    plan = reduced_range(plan_by_hand(quant_vit.eval(), images, "openvino"))
    apply_plan(quant_vit, plan)
    model = open_file(save(quant_vit, plan, tmp_path / "m.onnx", Encoding(TARGETS["openvino"])), "openvino")
    assert_same(model(images), here(quant_vit, images))
    census = model.census()
    assert len(census.integer) >= 12
    everything = open_file(str(tmp_path / "m.onnx"), "ort", integers=False).census().floating
    assert census.integer | census.floating == everything
    assert {"patch_embed", "head.matmul"} <= set(census.floating)
    plan = plan.without([key for key in plan.sites if ".attn.matmul_" in key])
    apply_plan(quant_vit, plan)
    path = save(quant_vit, plan, tmp_path / "attention.onnx", Encoding(TARGETS["openvino"]))
    floating = open_file(path, "openvino").census().floating
    assert floating.keys() == open_file(path, "ort").census().floating.keys()
    assert len([name for name in floating if name.endswith((".scores", ".mixed"))]) == 4


# What a target refuses ----------------------------------------------------------------------------------------------

SMALL = Shape(tokens=5, head_width=16)


@pytest.mark.parametrize("mode", ["ort", "openvino", "tensorrt"])
def test_its_own_mode_is_not_refused(mode: str, quant_vit: nn.Module, images: Tensor) -> None:
    assert list(TARGETS[mode].problems(plan_by_hand(quant_vit, images, mode), SMALL, 2)) == []


@pytest.mark.parametrize(
    ("target", "mode", "rule", "shape", "problem"),
    [
        ("ort", "ft1", {"bits": 4}, SMALL, "0.ffn.fc1._input_quantizer and 19 more: not 8 bits"),
        ("ort", "ft2", {}, SMALL, "aftergemm_quantizer and 13 more: ort fuses no quantizer there"),
        ("tensorrt", "ort", {}, SMALL, "and 13 more: tensorrt takes signed integers without zero point only"),
        ("tensorrt", "tensorrt", {}, dataclasses.replace(SMALL, head_width=80), "heads of 16, 32 or 64, here 80"),
        ("tensorrt", "tensorrt", {}, dataclasses.replace(SMALL, tokens=577), "at most 512 tokens, here 577"),
    ],
)
def test_refused(
    target: str, mode: str, rule: dict[str, Any], shape: Shape, problem: str, quant_vit: nn.Module, images: Tensor
) -> None:
    plan = plan_by_hand(quant_vit, images, mode)
    plan = changed(plan, lambda family: family != WEIGHT, **rule) if rule else plan
    assert problem in "\n".join(TARGETS[target].problems(plan, shape, 2))


def test_half_an_attention_and_dead_sites_are_refused(quant_vit: nn.Module, images: Tensor) -> None:
    half = changed(plan_by_hand(quant_vit, images, "tensorrt"), lambda family: family == "probabilities", on=False)
    found = list(TARGETS["tensorrt"].problems(half, SMALL, 2))
    assert len(found) == 1
    assert "matmul_q_input_quantizer and 1 more: tensorrt fuses both products of attention in integers" in found[0]
    plan = plan_by_hand(quant_vit, images, "ort")
    half = changed(plan, lambda family: family == "probabilities", on=False)
    assert list(TARGETS["ort"].problems(half, SMALL, 2)) == [], "as fast as both in float (benchmarks/peers.py)"
    key = "transformer.encoder.layer.1.ffn.fc2._input_quantizer"
    dead = dataclasses.replace(plan.sites[key], amax=torch.tensor(0.0))
    plan = dataclasses.replace(plan, sites={**plan.sites, key: dead})
    assert list(TARGETS["ort"].problems(plan, SMALL, 2)) == [f"{key}: amax 0"]


@pytest.mark.parametrize(
    ("mode", "off", "not_met"),
    [
        ("tensorrt", None, []),
        ("ort", None, ["int8, zero points 0"]),
        ("tensorrt", "probabilities", ["attention: both products of a block with Q/DQ on both sides, or none"]),
        ("tensorrt", "attention of one block", []),
        ("tensorrt", "weight", ["Q/DQ on both inputs of every linear layer of the blocks"]),
        ("trt", None, ["no Q/DQ on the branch of a residual addition"]),
        (
            "ft2",
            None,
            [
                "no Q/DQ behind a linear layer before its bias",
                "attention: nothing between q·kᵀ and softmax",
            ],
        ),
    ],
)
def test_conditions_of_tensorrt_are_looked_up_in_the_file(
    mode: str, off: str | None, not_met: list[str], quant_vit: nn.Module, images: Tensor
) -> None:
    plan = changed(plan_by_hand(quant_vit.eval(), images, mode), lambda family: family == off, on=False)
    if off == "attention of one block":
        plan = plan.without([key for key in plan.sites if ".layer.0.attn.matmul_" in key])
    apply_plan(quant_vit, plan)
    found = tensorrt_conditions(onnx_model(quant_vit, plan, Encoding(TARGETS["tensorrt"]), {}), SMALL)
    assert [text for text, met in found.items() if not met] == not_met
    unsigned = onnx_model(quant_vit, plan, Encoding(TARGETS["tensorrt"], unsigned_right=True), {})
    assert not tensorrt_conditions(unsigned, SMALL)["int8, zero points 0"]
    wide = tensorrt_conditions(onnx_model(quant_vit, plan, Encoding(TARGETS["tensorrt"]), {}), Shape(577, 80))
    assert [wide[text] for text in wide if "fuses attention" in text] == [False, False]


# Files of others ----------------------------------------------------------------------------------------------------


def hand_made(path: Path, batch: int | str = "n", shape: tuple[Any, ...] = (3, 16, 16)) -> str:
    """Means of the channels as logits."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return str(path)


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_a_file_that_takes_so_many_images_at_once(runtime: str, images: Tensor, tmp_path: Path) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="no OpenVINO")
    model = open_file(hand_made(tmp_path / "m.onnx", 5), runtime)
    assert model.img_size == 16
    torch.testing.assert_close(model(images), images.mean((2, 3)))  # 24 images


def test_what_is_no_file_of_a_classifier(tmp_path: Path, images: Tensor) -> None:
    path = tmp_path / "m.onnx"
    assert read_metadata(hand_made(path)) == {}
    with pytest.raises(InputError, match=r"takes x .*; expected one input, images of \(batch, 3, S, S\)"):
        open_file(hand_made(path, shape=(4, 16, 16)), "ort")
    with pytest.raises(InputError, match=r"m\.onnx: cannot be run: "):
        open_file(hand_made(path), "ort")(images[:, :, :8])
    path.write_bytes(path.read_bytes()[:100])
    for read in (read_metadata, lambda p: open_file(p, "ort")):
        with pytest.raises(InputError, match=r"m\.onnx: (not an ONNX file|ONNX Runtime cannot load it): "):
            read(str(path))
    with pytest.raises(InputError, match="not found; expected an ONNX file"):
        read_metadata(str(tmp_path / "none.onnx"))


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_package_that_is_not_there(package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}: is not installed; pip install 'vitq_ray\[{extra}\]'"):
        open_file(hand_made(tmp_path / "m.onnx"), "ort" if extra == "onnx" else "openvino")
