"""Which timm model a timm file is taken for, and how its images are then prepared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer

from tests.models.test_models import images, logits, random_timm
from vitq_ray.base.config import InputError
from vitq_ray.models.architecture import timm_architecture
from vitq_ray.models.geometry import auto_geometry
from vitq_ray.models.load import HALF, load_model
from vitq_ray.models.weights import TIMM, Checkpoint

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bicubic")


@pytest.fixture(scope="module")
def deit() -> VisionTransformer:
    return random_timm("deit_tiny_patch16_224", num_classes=4)


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224-a1311bcf.pth", "deit_tiny_patch16_224.pth", "deit_tiny_patch16_224_mine_e3.pth.tar"]
)
def test_a_released_file_is_known_by_its_name(
    name: str, deit: VisionTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": deit.state_dict()}, tmp_path / name)
    loaded = load_model("auto", tmp_path / name)
    assert (loaded.mean, loaded.std, loaded.interpolation) == IMAGENET
    assert loaded.geometry.timm_name == "deit_tiny_patch16_224"
    assert (
        "taken for timm's deit_tiny_patch16_224 (after the name of the file): mean 0.485 0.456 0.406, "
        "std 0.229 0.224 0.225, bicubic, no crop without --crop-pct"
    ) in caplog.text
    x = images(1, 224)
    assert torch.equal(logits(loaded.model, x), logits(deit, x))


@pytest.mark.parametrize("name", ["best.pth", "deit3_small_patch16_224.pth", "resnet50.pth"])
def test_what_is_not_known_is_assumed_aloud(
    name: str, deit: VisionTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DeiT, DINO and Google's ViT have the same arrays; a name that does not fit these says nothing."""
    torch.save({"model": deit.state_dict()}, tmp_path / name)
    loaded = load_model("auto", tmp_path / name)
    assert (loaded.mean, loaded.std, loaded.interpolation) == (HALF, HALF, "bilinear")
    assert "do not tell its heads, 3 of width 64 assumed" in caplog.text
    assert (
        "a timm file of unknown family: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bilinear, no crop without --crop-pct "
        "assumed; --model_type with a timm name settles it"
    ) in caplog.text


def test_a_timm_file_under_googles_name_is_prepared_as_googles_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DeiT-B and Google's ViT-B_32 have the same arrays, too."""
    torch.save(random_timm("vit_base_patch32_224", num_classes=4).state_dict(), tmp_path / "best.pth")
    loaded = load_model("ViT-B_32-224", tmp_path / "best.pth")
    assert (loaded.mean, loaded.std, loaded.interpolation) == (HALF, HALF, "bilinear")
    assert "a timm file read as Google's ViT-B_32-224: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bilinear" in caplog.text


def test_what_training_scripts_write_is_known(tmp_path: Path) -> None:
    """Heads of 32 that no shape tells."""
    model = random_timm("test_vit", num_classes=4)
    torch.save({"arch": "test_vit", "state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    loaded = load_model("auto", tmp_path / "last.pth.tar")
    assert (loaded.geometry.heads, loaded.geometry.img_size, loaded.interpolation) == (2, 160, "bicubic")
    x = images(1, 160)
    assert torch.equal(logits(loaded.model, x), logits(model, x))
    at_64 = load_model("auto", tmp_path / "last.pth.tar", img_size=64)
    assert torch.equal(at_64.model.pos_embed, load_model("test_vit", tmp_path / "last.pth.tar", 64).model.pos_embed)


def test_config_json_of_the_hub(deit: VisionTransformer, tmp_path: Path) -> None:
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    safetensors.torch.save_file(deit.state_dict(), path)
    said = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear", "crop_pct": 0.9}
    config.write_text(json.dumps({"architecture": "deit_tiny_patch16_224", "pretrained_cfg": said}))
    loaded = load_model("auto", path)
    assert (loaded.mean, loaded.std, loaded.interpolation) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.2), "bilinear")
    config.write_text(json.dumps({"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"std": [0, 0, 0]}}))
    with pytest.raises(InputError, match=r"model\.safetensors: how its images are prepared: .* std > 0"):
        load_model("auto", path)
    for other in ("{", "[]", '{"architectures": ["ViTModel"]}', '{"architecture": "resnet50"}'):
        config.write_text(other)
        assert load_model("auto", path).geometry.timm_name is None


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("deit_tiny_distilled_patch16_224", "head_dist.weight"),
        ("deit3_small_patch16_224", "blocks.0.ls1.gamma"),
        ("vit_small_patch14_dinov2", "blocks.0.ls1.gamma"),
        ("vit_small_patch14_reg4_dinov2", "reg_token"),
    ],
)
def test_arrays_that_only_some_families_have(
    name: str, sign: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_timm(name, num_classes=4, img_size=224)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_model("auto", tmp_path / "w.pth")
    assert (loaded.geometry.timm_name, loaded.geometry.img_size) == (name, 224)
    assert (loaded.mean, loaded.std, loaded.interpolation) == IMAGENET
    assert f"taken for timm's {name} (it has the array {sign})" in caplog.text
    x = images(1, 224)
    assert torch.equal(logits(loaded.model, x), logits(model, x))


@pytest.mark.parametrize("name", ["vit_huge_patch14_224", "vit_base_patch16_224", "vit_large_patch16_224"])
def test_assumed_heads_are_those_that_were_published(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    checkpoint = Checkpoint("w.pth", TIMM, model.state_dict())
    assert auto_geometry(checkpoint, timm_architecture(checkpoint)).heads == model.blocks[0].attn.num_heads


def test_heads_given_by_hand(tmp_path: Path) -> None:
    model = VisionTransformer(img_size=32, embed_dim=96, depth=1, num_heads=3, num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "narrow.pth")
    x = images(2, 32)
    assert torch.equal(logits(load_model("auto", tmp_path / "narrow.pth", heads=3).model, x), logits(model, x))
    with pytest.raises(InputError, match="heads: 5 does not divide the width 96"):
        load_model("auto", tmp_path / "narrow.pth", heads=5)
