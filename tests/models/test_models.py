"""Loading of float checkpoints against timm's own loader, hand computations and the reference numbers."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.layers import HybridEmbed, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from tests.conftest import REFERENCE
from vitq_ray.base.config import InputError
from vitq_ray.models.geometry import GOOGLE_MODEL_TYPES, Geometry, build_model, geometry_of, named_geometry
from vitq_ray.models.google import google_arrays
from vitq_ray.models.load import load_model
from vitq_ray.models.weights import read_checkpoint, weights_fingerprint
from vitq_ray.quant.vit import require_supported

Arrays = dict[str, np.ndarray]

TINY = {"width": 32, "depth": 2, "heads": 4, "mlp": 48, "patch": 8, "grid": 4, "classes": 5}


def google_file(
    seed: int,
    width: int,
    depth: int,
    heads: int,
    mlp: int,
    patch: int,
    grid: int,
    classes: int,
    channels: int = 3,
) -> Arrays:
    """Random arrays under Google's names, written down from its files and not from the code under test."""
    random = np.random.default_rng(seed)

    def new(*shape: int, mean: float = 0.0) -> np.ndarray:
        return (random.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(0.2) + np.float32(mean)

    arrays = {
        "cls": new(1, 1, width),
        "embedding/kernel": new(patch, patch, channels, width),
        "embedding/bias": new(width),
        "Transformer/posembed_input/pos_embedding": new(1, grid * grid + 1, width),
        "Transformer/encoder_norm/scale": new(width, mean=1.0),
        "Transformer/encoder_norm/bias": new(width),
        "head/kernel": new(width, classes),
        "head/bias": new(classes),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}/{norm}/scale"] = new(width, mean=1.0)
            arrays[f"{block}/{norm}/bias"] = new(width)
        for part in ("query", "key", "value"):
            arrays[f"{block}/MultiHeadDotProductAttention_1/{part}/kernel"] = new(width, heads, width // heads)
            arrays[f"{block}/MultiHeadDotProductAttention_1/{part}/bias"] = new(heads, width // heads)
        arrays[f"{block}/MultiHeadDotProductAttention_1/out/kernel"] = new(heads, width // heads, width)
        arrays[f"{block}/MultiHeadDotProductAttention_1/out/bias"] = new(width)
        arrays[f"{block}/MlpBlock_3/Dense_0/kernel"] = new(width, mlp)
        arrays[f"{block}/MlpBlock_3/Dense_0/bias"] = new(mlp)
        arrays[f"{block}/MlpBlock_3/Dense_1/kernel"] = new(mlp, width)
        arrays[f"{block}/MlpBlock_3/Dense_1/bias"] = new(width)
    return arrays


def resnet_file(seed: int, stages: tuple[int, ...], widths: tuple[int, ...]) -> Arrays:
    """Random arrays of a hybrid's ResNet; GroupNorm vectors are (1, 1, 1, channels) as Google wrote them."""
    random = np.random.default_rng(seed)
    arrays: Arrays = {}

    def layer(conv: str, norm: str, side: int, inside: int, outside: int) -> None:
        arrays[f"{conv}/kernel"] = random.standard_normal((side, side, inside, outside), dtype=np.float32)
        arrays[f"{norm}/scale"] = 1 + 0.1 * random.standard_normal((1, 1, 1, outside), dtype=np.float32)
        arrays[f"{norm}/bias"] = 0.1 * random.standard_normal((1, 1, 1, outside), dtype=np.float32)

    layer("conv_root", "gn_root", 7, 3, widths[0])
    inside = widths[0]
    for stage, (units, outside) in enumerate(zip(stages, widths[1:], strict=True), start=1):
        for unit in range(1, units + 1):
            prefix = f"block{stage}/unit{unit}"
            layer(f"{prefix}/conv1", f"{prefix}/gn1", 1, inside, outside // 4)
            layer(f"{prefix}/conv2", f"{prefix}/gn2", 3, outside // 4, outside // 4)
            layer(f"{prefix}/conv3", f"{prefix}/gn3", 1, outside // 4, outside)
            if unit == 1:
                layer(f"{prefix}/conv_proj", f"{prefix}/gn_proj", 1, inside, outside)
            inside = outside
    return arrays


def save_npz(path: Path, arrays: Arrays) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)


def random_timm(name: str, **options: Any) -> VisionTransformer:
    """timm's own model with quickly drawn weights: timm's take seconds to draw, and leave biases at 0."""
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.to_empty(device="cpu").parameters():
        nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)
    return model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_npz(tmp_path / "tiny.npz", google_file(0, **TINY))


# ---- names and geometry ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "millions"),
    [
        ("ViT-B_16-224", 85.80),
        ("R50-ViT-B_16-224", 97.89),
        ("ViT-B_32-224", 87.46),
        ("ViT-L_16-224", 303.30),
        ("ViT-L_32-224", 305.51),
        ("ViT-H_14-224", 630.77),
    ],
)
def test_parameter_counts_of_the_paper(model_type: str, millions: float) -> None:
    geometry = named_geometry(model_type)
    assert geometry is not None
    with torch.device("meta"):
        model = build_model(geometry)
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("model_type", GOOGLE_MODEL_TYPES)
def test_default_resolutions(model_type: str) -> None:
    geometry = named_geometry(model_type)
    assert geometry is not None
    # 384 is no multiple of ViT-H_14's patch of 14 pixels: 378 is the nearest below.
    expected = 224 if model_type.endswith("-224") else 378 if model_type == "ViT-H_14" else 384
    assert (geometry.img_size, geometry.model_type) == (expected, model_type)


@pytest.mark.parametrize("model_type", ["ViT-L_32", "R50-ViT-B_16-224", "test_vit2", "vit_tiny_patch16_384"])
def test_geometry_survives_json(model_type: str) -> None:
    geometry = named_geometry(model_type)
    assert geometry is not None
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_geometry_of_timm_names_is_that_of_the_model() -> None:
    geometry = named_geometry("vit_base_r50_s16_384")
    assert geometry is not None
    assert geometry.timm_name == "vit_base_r50_s16_384"
    assert (geometry.patch_size, geometry.patch_kernel, geometry.grid, geometry.num_tokens) == (
        16,
        1,
        24,
        577,
    )
    assert (geometry.hybrid_stages, geometry.hybrid_widths) == ((3, 4, 9), (64, 256, 512, 1024))
    registers = named_geometry("test_vit2")
    assert registers is not None
    assert (registers.heads, registers.num_prefix_tokens, registers.num_tokens) == (2, 1, 101)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads: 5 does not divide the width 32"),
        (
            {"img_size": 30},
            "img_size: 30 is not a multiple of the patch size 8; expected for example 24 or 32",
        ),
        ({"depth": 0}, "depth: expected an integer from 1 to 1000, got 0"),
        ({"pre_logits": -1}, "pre_logits: expected an integer from 1 to 1048576, got -1"),
        ({"hybrid_stages": (1,)}, r"hybrid: expected stages and one width more, got \(1,\) and None"),
        (
            {"hybrid_stages": (1,), "hybrid_widths": (32, 64)},
            "hybrid_widths: expected multiples of 128, got 64",
        ),
        (
            {"hybrid_stages": (1, 1, 1), "hybrid_widths": (32, 128, 128, 128)},
            "patch_size: 8 is no multiple of the ResNet's stride 16",
        ),
    ],
)
def test_impossible_geometries(change: dict[str, Any], message: str) -> None:
    values = {"model_type": "x", "patch_size": 8, "width": 32, "depth": 2, "heads": 4, "mlp_width": 48}
    values |= {"img_size": 32, "num_classes": 5}
    assert Geometry(**values).grid == 4
    with pytest.raises(InputError, match=message):
        Geometry(**(values | change))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B16", "'ViT-B16' is neither auto, nor one of ViT-B_16, .*closest: ViT-B_16"),
        ("vit_bse_patch16_224", "closest: .*vit_base_patch16_224"),
        ("vit_base_patch16_224.nosuchtag", "timm cannot build .*nosuchtag"),
        ("resnet50", "timm's 'resnet50' is not a VisionTransformer"),
        ("vit_base_patch16_rpn_224", "blocks.0 is a ResPostBlock, which cannot be quantized; expected Block"),
        ("vit_small_patch16_18x2_224", "blocks.0 is a ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "blocks.0.attn is a DiffAttention"),
        ("aimv2_large_patch14_224", "blocks.0.mlp is a SwiGLU"),
        ("beit3_base_patch16_224", "blocks.0.attn.norm is a LayerNorm"),
    ],
)
def test_names_that_cannot_be_used(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(name, "/the/file/is/not/even/looked/at.npz")


def test_only_plain_blocks_are_supported() -> None:
    class Subclass(Block):
        pass

    new = partial(VisionTransformer, img_size=32, embed_dim=32, depth=2, num_heads=4, num_classes=3)
    require_supported(new(init_values=1e-5, qk_norm=True, reg_tokens=2))
    for change, message in (
        ({"block_fn": Subclass}, "blocks.0 is a Subclass"),
        ({"scale_mlp_norm": True}, "blocks.0.mlp.norm is a LayerNorm"),
    ):
        with pytest.raises(InputError, match=message):
            require_supported(new(**change))
    gated = new()
    gated.blocks[1].attn.gate = nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.gate is a Linear"):
        require_supported(gated)
    with pytest.raises(InputError, match="Linear is not a timm VisionTransformer"):
        require_supported(nn.Linear(2, 2))


# ---- Google's .npz ---------------------------------------------------------------------------------------


def test_vit_b_16_equals_timms_own_loader(tmp_path: Path) -> None:
    arrays = google_file(1, width=768, depth=12, heads=12, mlp=3072, patch=16, grid=14, classes=7)
    path = save_npz(tmp_path / "ViT-B_16.npz", arrays)
    loaded = load_model("ViT-B_16-224", str(path))
    with torch.device("meta"):
        expected = timm.create_model("vit_base_patch16_224", num_classes=7)
    expected.to_empty(device="cpu").load_pretrained(str(path))
    x = images(1, 224)
    assert torch.equal(logits(loaded.model, x), logits(expected, x))
    assert (loaded.geometry.num_classes, loaded.mean, loaded.interpolation) == (
        7,
        (0.5, 0.5, 0.5),
        "bilinear",
    )
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.fingerprint == weights_fingerprint(expected.state_dict())


def test_small_hybrid_equals_timms_own_loader(tmp_path: Path) -> None:
    stages, widths = (1, 2), (32, 128, 256)
    arrays = google_file(2, **(TINY | {"patch": 1}), channels=256) | resnet_file(3, stages, widths)
    path = save_npz(tmp_path / "hybrid.npz", arrays)
    loaded = load_model("auto", path)
    assert (loaded.geometry.hybrid_stages, loaded.geometry.hybrid_widths) == (stages, widths)
    assert (loaded.geometry.patch_size, loaded.geometry.img_size) == (8, 32)

    resnet = ResNetV2(
        layers=stages, channels=widths[1:], stem_chs=32, num_classes=0, global_pool="", preact=False,
        stem_type="same", conv_layer=partial(StdConv2dSame, eps=1e-8),
    )  # fmt: skip
    expected = VisionTransformer(
        img_size=32, patch_size=1, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5, num_classes=5,
        embed_layer=partial(HybridEmbed, backbone=resnet),
    )  # fmt: skip
    expected.load_pretrained(str(path))
    x = images(3, 32)
    assert torch.equal(logits(loaded.model, x), logits(expected, x))


def test_auto_reads_the_geometry_of_the_file(tiny: Path) -> None:
    loaded = load_model("auto", tiny)
    assert loaded.geometry == Geometry("auto", 8, 32, 2, 4, 48, img_size=32, num_classes=5)
    assert load_model("auto", f"file://{tiny}").fingerprint == loaded.fingerprint


@pytest.mark.parametrize("width", [32, 20])
def test_pre_logits_equals_a_hand_computation(tmp_path: Path, width: int) -> None:
    arrays = google_file(4, **TINY)
    random = np.random.default_rng(5)
    arrays["pre_logits/kernel"] = random.standard_normal((32, width)).astype(np.float32)
    arrays["pre_logits/bias"] = random.standard_normal(width).astype(np.float32)
    arrays["head/kernel"] = random.standard_normal((width, 5)).astype(np.float32)
    loaded = load_model("auto", save_npz(tmp_path / "in21k.npz", arrays))
    assert loaded.geometry.pre_logits == width
    x = images(3, 32)
    with torch.no_grad():
        token = loaded.model.forward_features(x)[:, 0].double().numpy()
    hidden = np.tanh(token @ arrays["pre_logits/kernel"] + arrays["pre_logits/bias"])
    expected = hidden @ arrays["head/kernel"] + arrays["head/bias"]
    np.testing.assert_allclose(logits(loaded.model, x), expected, rtol=1e-5, atol=1e-5)


def align_corners(grid: np.ndarray, side: int) -> np.ndarray:
    """Bilinear interpolation of (old, old, C), corner to corner, one axis after the other."""
    for axis in (0, 1):
        old = grid.shape[axis]
        at = np.linspace(0, old - 1, side)
        low = np.minimum(at.astype(int), max(old - 2, 0))
        weight = np.expand_dims(at - low, (1, 2) if axis == 0 else (0, 2))
        high = np.minimum(low + 1, old - 1)
        grid = np.take(grid, low, axis) * (1 - weight) + np.take(grid, high, axis) * weight
    return grid


@pytest.mark.parametrize("side", [2, 3, 7, 12])
def test_positions_of_npz_are_resized_with_aligned_corners(tiny: Path, side: int) -> None:
    positions = dict(np.load(tiny))["Transformer/posembed_input/pos_embedding"]
    resized = load_model("auto", tiny, img_size=8 * side).model.pos_embed.detach().numpy()
    grid = positions[0, 1:].reshape(4, 4, 32).astype(np.float64)
    assert np.array_equal(resized[:, :1], positions[:, :1])
    np.testing.assert_allclose(resized[0, 1:], align_corners(grid, side).reshape(-1, 32), atol=1e-7)
    corners = resized[0, 1:].reshape(side, side, 32)[[0, -1]][:, [0, -1]]
    np.testing.assert_allclose(corners, grid[[0, -1]][:, [0, -1]], atol=1e-7)


@pytest.mark.parametrize("side", [3, 9])
def test_positions_of_npz_are_resized_as_google_does(tiny: Path, side: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    positions = dict(np.load(tiny))["Transformer/posembed_input/pos_embedding"]
    zoomed = ndimage.zoom(positions[0, 1:].reshape(4, 4, 32), (side / 4, side / 4, 1), order=1)
    resized = load_model("auto", tiny, img_size=8 * side).model.pos_embed.detach().numpy()
    np.testing.assert_allclose(resized[0, 1:], zoomed.reshape(-1, 32), atol=1e-7)


@pytest.mark.parametrize("hybrid", [False, True])
def test_google_arrays_is_the_inverse_of_loading(tmp_path: Path, hybrid: bool) -> None:
    arrays = google_file(6, **(TINY | ({"patch": 1} if hybrid else {})), channels=128 if hybrid else 3)
    arrays |= resnet_file(7, (2,), (64, 128)) if hybrid else {}
    arrays["pre_logits/kernel"], arrays["pre_logits/bias"] = (
        np.eye(32, dtype=np.float32),
        np.ones(32, np.float32),
    )
    loaded = load_model("auto", save_npz(tmp_path / "a.npz", arrays))
    for written in (google_arrays(loaded.model, loaded.geometry), google_arrays(loaded.model)):
        assert set(written) == set(arrays)
        for name, array in arrays.items():
            expected = array.reshape(-1) if "gn" in name else array
            assert written[name].flags.c_contiguous
            np.testing.assert_array_equal(written[name], expected, err_msg=name)


def test_google_arrays_names_what_does_not_fit() -> None:
    model = VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=4, num_classes=3, init_values=1.0)
    with pytest.raises(InputError, match=r"does not fit Google's .npz layout, it has 'blocks.0.ls1.gamma'"):
        google_arrays(model)


def test_half_precision_becomes_float32(tmp_path: Path, tiny: Path) -> None:
    arrays = {name: array.astype(np.float16) for name, array in dict(np.load(tiny)).items()}
    loaded = load_model("auto", save_npz(tmp_path / "half.npz", arrays))
    assert loaded.model.head.weight.dtype == torch.float32
    np.testing.assert_array_equal(loaded.model.head.bias.detach(), arrays["head/bias"].astype(np.float32))
    # NumPy has no bfloat16: such arrays arrive as two opaque bytes, the upper half of a float32.
    upper = {k: (v.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for k, v in arrays.items()}
    path = save_npz(tmp_path / "bf16.npz", {k: v.view("V2") for k, v in upper.items()})
    state = read_checkpoint(str(path)).arrays
    expected = (upper["cls"].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(state["cls"], expected)


def test_zero_head_and_class_counts(tmp_path: Path, tiny: Path) -> None:
    arrays = dict(np.load(tiny))
    arrays["head/kernel"] *= 0
    loaded = load_model("auto", save_npz(tmp_path / "zero.npz", arrays), num_classes=5)
    np.testing.assert_array_equal(logits(loaded.model, images(1, 32))[0], arrays["head/bias"])
    with pytest.raises(InputError, match=r"num_classes: 1000, but .*tiny.npz has 5 classes"):
        load_model("auto", tiny, num_classes=1000)


def test_fingerprint_covers_names_values_and_shapes(tiny: Path) -> None:
    first, second = load_model("auto", tiny), load_model("auto", tiny)
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64
    assert load_model("auto", tiny, img_size=64).fingerprint != first.fingerprint
    state = {"a": torch.zeros(2, 3)}
    variants = [{"b": state["a"]}, {"a": torch.zeros(3, 2)}, {"a": -state["a"]}, {"a": state["a"].half()}]
    assert len({weights_fingerprint(s) for s in [state, *variants]}) == 5
    ordered, reordered = {"a": state["a"], "b": state["a"]}, {"b": state["a"], "a": state["a"]}
    assert weights_fingerprint(ordered) == weights_fingerprint(reordered)


# ---- timm's files ----------------------------------------------------------------------------------------


def save_pth(path: Path, model: nn.Module) -> None:
    torch.save(model.state_dict(), path)


def save_legacy_pth(path: Path, model: nn.Module) -> None:
    torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=False)


def save_ddp_pth(path: Path, model: nn.Module) -> None:
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, path)


def save_safetensors(path: Path, model: nn.Module) -> None:
    safetensors.torch.save_file(model.state_dict(), path)


@pytest.mark.parametrize("save", [save_pth, save_legacy_pth, save_ddp_pth, save_safetensors])
def test_timm_files_by_content(tmp_path: Path, save: Callable[[Path, nn.Module], None]) -> None:
    expected = random_timm("test_vit", num_classes=4)
    path = tmp_path / "weights.bin"  # the format is told by content
    save(path, expected)
    loaded = load_model("test_vit", path)
    assert (loaded.geometry.img_size, loaded.interpolation) == (160, "bicubic")
    x = images(2, 160)
    assert torch.equal(logits(loaded.model, x), logits(expected, x))


@pytest.mark.parametrize("name", ["test_vit2", "test_vit4", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224"])
def test_timm_variants(tmp_path: Path, name: str) -> None:
    """Registers with LayerScale, RMSNorm, a distillation token with its head, a ResNet stem."""
    expected = random_timm(name, num_classes=4)
    save_pth(tmp_path / "w.pth", expected)
    loaded = load_model(name, tmp_path / "w.pth")
    x = images(1, loaded.geometry.img_size)
    assert torch.equal(logits(loaded.model, x), logits(expected, x))
    assert geometry_of(loaded.model, name) == replace(loaded.geometry, timm_name=None)


def test_timm_preprocessing(tmp_path: Path) -> None:
    save_pth(tmp_path / "w.pth", random_timm("deit_tiny_patch16_224", num_classes=4))
    loaded = load_model("deit_tiny_patch16_224", tmp_path / "w.pth")
    assert loaded.mean == pytest.approx((0.485, 0.456, 0.406))
    assert loaded.std == pytest.approx((0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_positions_of_timm_files_are_resized_as_timm_does(tmp_path: Path, name: str) -> None:
    save_pth(tmp_path / "w.pth", random_timm(name, num_classes=4))
    loaded = load_model(name, tmp_path / "w.pth", img_size=64)
    expected = timm.create_model(name, num_classes=4, img_size=64)
    expected.load_state_dict(checkpoint_filter_fn(torch.load(tmp_path / "w.pth"), expected))
    assert torch.equal(loaded.model.pos_embed, expected.pos_embed)
    x = images(1, 64)
    assert torch.equal(logits(loaded.model, x), logits(expected, x))


def test_timm_name_with_a_google_file(tmp_path: Path) -> None:
    arrays = google_file(8, width=64, depth=6, heads=2, mlp=192, patch=16, grid=10, classes=3)
    path = save_npz(tmp_path / "w.npz", arrays)
    expected = timm.create_model("test_vit", num_classes=3)
    expected.load_pretrained(str(path))
    loaded = load_model("test_vit", path)
    x = images(1, 160)
    assert torch.equal(logits(loaded.model, x), logits(expected, x))


def test_google_name_and_auto_with_a_timm_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = random_timm("vit_tiny_patch16_224", num_classes=4)
    save_pth(tmp_path / "w.pth", expected)
    loaded = load_model("auto", tmp_path / "w.pth")
    assert (loaded.geometry.heads, loaded.geometry.img_size, loaded.geometry.timm_name) == (3, 224, None)
    assert "do not tell its heads, 3 of width 64 assumed" in caplog.text
    x = images(1, 224)
    assert torch.equal(logits(loaded.model, x), logits(expected, x))
    with pytest.raises(
        InputError,
        match=r"another architecture, patch kernel 16, width 192, depth 12, MLP width 768; "
        r"ViT-B_32-224 is patch kernel 32, width 768, depth 12, heads 12, MLP width 3072",
    ):
        load_model("ViT-B_32-224", tmp_path / "w.pth")


def test_auto_refuses_what_it_cannot_read_from_a_timm_file(tmp_path: Path) -> None:
    narrow = VisionTransformer(img_size=32, embed_dim=96, depth=1, num_heads=4, num_classes=3)
    save_pth(tmp_path / "narrow.pth", narrow)
    with pytest.raises(InputError, match=r"auto cannot read the heads .* its width 96 is no multiple of 64"):
        load_model("auto", tmp_path / "narrow.pth")
    scaled = VisionTransformer(img_size=32, embed_dim=64, depth=1, num_heads=1, num_classes=3, init_values=1.0)
    save_pth(tmp_path / "scaled.pth", scaled)
    with pytest.raises(InputError, match=r"2 of \d+ arrays have no place in the model, first 'blocks.0.ls1.gamma'"):
        load_model("auto", tmp_path / "scaled.pth")


def test_pre_logits_under_timms_old_name(tmp_path: Path) -> None:
    geometry = Geometry("x", 8, 64, 1, 1, 64, img_size=16, num_classes=3, pre_logits=24)
    expected = build_model(geometry)
    state = expected.state_dict()
    old = {k.replace("fc_norm.pre_logits", "pre_logits.fc"): v for k, v in state.items()}
    assert "pre_logits.fc.weight" in old
    for name, content in {"old.pth": old, "new.pth": state}.items():
        torch.save(content, tmp_path / name)
        loaded = load_model("auto", tmp_path / name)
        x = images(2, 16)
        assert torch.equal(logits(loaded.model, x), logits(expected, x))


# ---- bad input -------------------------------------------------------------------------------------------

Break = Callable[[Arrays], Any]
BLOCK = "Transformer/encoderblock_1"


def lose_a_block(arrays: Arrays) -> None:
    for name in [name for name in arrays if name.startswith("Transformer/encoderblock_0/LayerNorm")]:
        del arrays[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("cls"), r"1 of 40 arrays are missing, first 'cls'"),
        (lambda a: a.pop(f"{BLOCK}/LayerNorm_2/bias"), rf"missing, first '{BLOCK}/LayerNorm_2/bias'"),
        (lose_a_block, r"4 of 40 arrays are missing, first 'Transformer/encoderblock_0/LayerNorm_0/scale'"),
        (lambda a: a.pop("embedding/kernel"), r"'embedding/kernel' is missing; 39 found such as 'cls'"),
        (lambda a: a.update(more=np.zeros(2)), r"1 of 41 arrays have no place in the model, first 'more'"),
        (lambda a: a.update(cls=np.zeros((1, 1, 8))), r"'cls' has shape \(1, 1, 8\), expected \(1, 1, 32\)"),
        (
            lambda a: a.update(cls=np.zeros((1, 1, 32), int)),
            r"'cls' has dtype torch.int64, expected torch.float32",
        ),
        (lambda a: a.update(cls=np.array("text")), r"'cls' has dtype <U4, expected numbers"),
        (
            lambda a: a["embedding/bias"].__setitem__(3, np.nan),
            r"'embedding/bias' has NaN or infinite values",
        ),
        (lambda a: a["head/bias"].__setitem__(0, -np.inf), r"'head/bias' has NaN or infinite values"),
        (lambda a: a.update(cls=np.full((1, 1, 32), 1e300)), r"'cls' has NaN or infinite values"),
        (lambda a: [a.pop("head/kernel"), a.pop("head/bias")], r"has no classifier \(array 'head/kernel'"),
        (
            lambda a: a.update({"head/kernel": np.zeros(5)}),
            r"'head/kernel' has shape \(5,\), expected 2 axes",
        ),
        (
            lambda a: a.update({"Transformer/posembed_input/pos_embedding": np.zeros((1, 16, 32))}),
            r"positions of 15 patches found, expected a square grid",
        ),
        (
            lambda a: a.update(cls=np.array([{}], dtype=object)),
            r"holds a pickled object, which is never executed",
        ),
        (lambda a: a.update({"opt/step": np.zeros(1)}), r"training checkpoint with optimizer state .*'opt/'"),
        (
            lambda a: a.update({"params/img/cls": np.zeros(1)}),
            r"big_vision checkpoint \(names start with 'params/'",
        ),
    ],
)
def test_bad_arrays(tmp_path: Path, change: Break, message: str) -> None:
    arrays = google_file(9, **TINY)
    change(arrays)
    path = save_npz(tmp_path / "bad.npz", arrays)
    with pytest.raises(InputError, match=message) as caught:
        load_model("auto", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_architecture_says_what_was_found_and_asked(tiny: Path) -> None:
    expected = (
        f"{tiny}: another architecture, patch kernel 8, width 32, depth 2, heads 4, MLP width 48; "
        "R50-ViT-B_16 is patch kernel 1, width 768, depth 12, heads 12, MLP width 3072, "
        "ResNet stages (3, 4, 9)"
    )
    with pytest.raises(InputError) as caught:
        load_model("R50-ViT-B_16", tiny)
    assert str(caught.value) == expected


def test_resolution_that_the_patch_does_not_divide(tiny: Path) -> None:
    with pytest.raises(InputError, match="img_size: 36 is not a multiple of the patch size 8"):
        load_model("auto", tiny, img_size=36)
    with pytest.raises(InputError, match="img_size: expected an integer from 1 to 65536, got 0"):
        load_model("auto", tiny, img_size=0)


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def zip_bytes(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1", "not a checkpoint .*starts with b'version "),
        (npy_bytes(), "not a checkpoint .*NUMPY.*expected .npz, .pth or .safetensors"),
        (zip_bytes(readme__txt=b"hello"), "an archive of 1 files without arrays"),
        (zip_bytes(a__npy=npy_bytes(), b__bin=b"raw"), "member 'b.bin' is not an array"),
        (zip_bytes(a__npy=npy_bytes()[:-5]), "truncated or damaged "),
        (torch_bytes({"a": torch.zeros(9)})[:-40], "truncated or damaged"),
        (torch_bytes([torch.zeros(9)]), "holds a list, expected a state_dict"),
        (torch_bytes({"a": torch.zeros(9), "lr": 0.1}), "'lr' is a float, expected a named tensor"),
        (
            torch_bytes({"state_dict": {}, "args": argparse.Namespace()}),
            r"pickled object \(argparse.Namespace\)",
        ),
        (torch_bytes(nn.Linear(2, 2)), r"holds a pickled object \(torch.nn.modules.linear.Linear\)"),
        (pickle.dumps({"a": np.zeros(3)}), "holds a pickled object"),
        (torch_bytes({}), "array 'patch_embed.proj.weight' is missing; 0 found"),
        (torch_bytes({"conv1.weight": torch.zeros(9)}), "missing; 1 found such as 'conv1.weight'"),
        (torch_bytes({"a": torch.tensor([torch.nan])}), "array 'a' has NaN or infinite values"),
        (safetensors.torch.save({"a": torch.zeros(9)})[:-4], "truncated or damaged .*metadata"),
        (
            torch_bytes({"transformer.encoder.layer.0.attn.query.weight": torch.zeros(2, 2)}),
            "array 'transformer.embeddings.patch_embeddings.weight' is missing",
        ),
        (
            torch_bytes({"transformer.encoder.layer.0.ffn.fc1._input_quantizer._amax": torch.ones(())}),
            r"a calibrated checkpoint \(it has scales, ._amax\); expected the float weights",
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_model("auto", path)
    assert "\n" not in str(caught.value)


def test_truncated_npz_and_absent_files(tmp_path: Path, tiny: Path) -> None:
    short = tmp_path / "short.npz"
    short.write_bytes(tiny.read_bytes()[:-1000])
    for path, message in (
        (short, "truncated or damaged"),
        (tmp_path / "absent.npz", "absent.npz: no such file"),
        (tmp_path, "is a folder"),
        ("nosuchscheme://x/y.npz", "nosuchscheme://x/y.npz: "),
    ):
        with pytest.raises(InputError, match=message):
            load_model("auto", str(path))


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    bomb = Bomb()
    (tmp_path / "a.pth").write_bytes(torch_bytes({"a": bomb}))
    save_npz(tmp_path / "a.npz", google_file(10, **TINY) | {"cls": np.array([bomb], dtype=object)})
    for name in ("a.pth", "a.npz"):
        with pytest.raises(InputError, match="never executed"):
            load_model("auto", tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("blocks.5.attn.qkv.bias"),
            "1 of 80 arrays are missing, first 'blocks.5.attn.qkv.bias'",
        ),
        (
            lambda s: s.update(extra=torch.zeros(1)),
            "1 of 81 arrays have no place in the model, first 'extra'",
        ),
        (lambda s: s.pop("head.weight"), "has no classifier .array 'head.weight' is missing"),
        (
            lambda s: s.update(cls_token=torch.zeros(1, 64)),
            r"'cls_token' has shape \(1, 64\), expected \(1, 1, 64\)",
        ),
    ],
)
def test_bad_timm_arrays(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    state = timm.create_model("test_vit", num_classes=4).state_dict()
    change(state)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=message):
        load_model("test_vit", tmp_path / "bad.pth")


# ---- the reference ---------------------------------------------------------------------------------------


def test_float_logits_of_the_reference() -> None:
    loaded = load_model("auto", REFERENCE / "model.npz")
    meta = json.loads((REFERENCE / "meta.json").read_text())
    g = loaded.geometry
    assert (g.width, g.mlp_width, g.heads) == (meta["hidden"], meta["mlp"], meta["heads"])
    assert (g.depth, g.patch_size, g.img_size) == (meta["layers"], meta["patch"], meta["size"])
    assert g.num_classes == meta["classes"]
    assert geometry_of(loaded.model) == g
    names = [line.split("\t")[0] for line in (REFERENCE / "val_map.txt").read_text().splitlines()]
    with zipfile.ZipFile(REFERENCE / "val.zip") as archive:
        pixels = [np.asarray(Image.open(archive.open(name)).convert("RGB"), np.float32) for name in names]
    x = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = np.load(REFERENCE / "expected.npz")["logits/float"]
    np.testing.assert_allclose(logits(loaded.model, x), expected, atol=1e-4)
