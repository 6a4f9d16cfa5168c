"""Bit for bit against Pillow and torchvision; broken images become one named error."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms as tv

from vitq_ray.base.config import InputError
from vitq_ray.data.samples import BadImageError
from vitq_ray.data.transforms import INTERPOLATIONS, EvalTransform, load_rgb, timm_eval_transform, train_transform

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIZES = [(37, 53), (64, 31), (16, 16), (17, 16), (200, 11)]
MODES = ["nearest", "bilinear", "bicubic", "lanczos"]


def noise(mode: str, size: tuple[int, int] = (37, 53), seed: int = 0) -> Image.Image:
    """Random pixels in one of Pillow's modes."""
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    channels = {"L": 1, "1": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if mode == "P":
        image = Image.fromarray(pixels[..., 0], "L").convert("P")
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        return image
    if mode == "1":
        return Image.fromarray(pixels[..., 0] > 127)
    return Image.frombytes(mode, size, pixels.tobytes())


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def to_rgb(data: bytes) -> Image.Image:
    """Pillow's own conversion."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data)).convert("RGB")


def interpolation(name: str) -> tv.InterpolationMode:
    return tv.InterpolationMode(name)


FORMATS = {
    "rgb.png": encode(noise("RGB")),
    "rgb.jpg": encode(noise("RGB"), "JPEG", quality=90),
    "progressive.jpg": encode(noise("RGB"), "JPEG", progressive=True),
    "grey.jpg": encode(noise("L"), "JPEG"),
    "cmyk.jpg": encode(noise("CMYK"), "JPEG"),
    "grey.png": encode(noise("L")),
    "palette.png": encode(noise("P")),
    "palette transparent in one colour.png": encode(noise("P"), transparency=7),
    "palette transparent by degrees.png": encode(noise("P"), transparency=bytes(range(256))),
    "grey transparent in one colour.png": encode(noise("L"), transparency=7),
    "rgba.png": encode(noise("RGBA")),
    "grey and alpha.png": encode(noise("LA")),
    "one bit.png": encode(noise("1")),
    "bmp.bmp": encode(noise("RGB"), "BMP"),
    "gif.gif": encode(noise("P"), "GIF"),
    "lossless.webp": encode(noise("RGBA"), "WEBP", lossless=True),
    "cmyk.tif": encode(noise("CMYK"), "TIFF"),
    "ppm.ppm": encode(noise("RGB"), "PPM"),
}


# Decoding and resizing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", FORMATS.values(), ids=FORMATS)
def test_decode_equals_pillow_and_torchvision(data: bytes) -> None:
    expected = np.asarray(tv.Resize((24, 24))(to_rgb(data)))
    pixels = EvalTransform(24).decode(data, "x")
    assert (pixels.shape, pixels.dtype) == ((24, 24, 3), np.uint8)
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(np.asarray(load_rgb(data)), np.asarray(to_rgb(data)))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_greys_lose_their_low_byte(form: str) -> None:
    image = noise("I;16")
    pixels = np.asarray(load_rgb(encode(image, form)))
    high_byte = (np.asarray(image) // 256).astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.repeat(high_byte[..., None], 3, axis=2))


def test_32_bit_greys_are_read_as_16_bit_ones() -> None:
    values = np.array([[0, 255, 256, 65535, 65536, 2**31 - 1, -5]], np.int32)
    pixels = np.asarray(load_rgb(encode(Image.fromarray(values), "TIFF")))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 255, 255, 255, 0]


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resize_equals_torchvision(name: str, size: tuple[int, int]) -> None:
    image = noise("RGB", size)
    expected = tv.Resize((16, 16), interpolation(name))(image)
    pixels = EvalTransform(16, interpolation=name).decode(encode(image), "x")
    np.testing.assert_array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("name", MODES)
def test_an_image_of_the_right_size_is_not_touched(name: str) -> None:
    image = noise("RGB", (16, 16))
    np.testing.assert_array_equal(EvalTransform(16, interpolation=name).decode(encode(image), "x"), np.asarray(image))


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("size", [*SIZES, (15, 15), (18, 300), (3, 2)], ids=str)
@pytest.mark.parametrize("wanted", [16, 17])
def test_crop_equals_torchvision(crop_pct: float, size: tuple[int, int], wanted: int) -> None:
    image = noise("RGB", size)
    theirs = tv.Compose([tv.Resize(int(wanted / crop_pct), interpolation("bicubic")), tv.CenterCrop(wanted)])
    ours = EvalTransform(wanted, interpolation="bicubic", crop_pct=crop_pct).decode(encode(image), "x")
    np.testing.assert_array_equal(ours, np.asarray(theirs(image)))


def test_crop_equals_timm() -> None:
    image = noise("RGB", (211, 157))
    theirs = timm.data.create_transform(32, crop_pct=0.9, interpolation="bicubic", mean=IMAGENET[0], std=IMAGENET[1])
    ours = EvalTransform(32, *IMAGENET, "bicubic", 0.9)
    pixels = torch.from_numpy(ours.decode(encode(image), "x").copy())[None]
    assert torch.equal(ours.normalize(pixels)[0], theirs(image))


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = noise("RGB", (40, 20))
    plain, turned = encode(image, "JPEG"), encode(image, "JPEG", exif=exif)
    assert b"Exif" in turned
    assert load_rgb(turned).size == (40, 20)
    np.testing.assert_array_equal(EvalTransform(16).decode(turned, "x"), EvalTransform(16).decode(plain, "x"))


# Normalising --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 3, (0.5,) * 3), IMAGENET, ((0, 0, 0), (1, 1, 1))])
def test_normalize_equals_torchvision(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every value that there is
    images = np.stack([noise("RGB", (16, 16), seed) for seed in range(3)] + [np.stack([ramp] * 3, axis=-1)])
    theirs = tv.Compose([tv.ToTensor(), tv.Normalize(mean, std)])
    ours = EvalTransform(16, mean, std).normalize(torch.from_numpy(images))
    assert (ours.shape, ours.dtype, ours.is_contiguous()) == ((4, 3, 16, 16), torch.float32, True)
    assert torch.equal(ours, torch.stack([theirs(image) for image in images]))


def test_normalize_leaves_its_input_alone() -> None:
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    before = images.clone()
    EvalTransform(4).normalize(images)
    assert torch.equal(images, before)


# Broken images ------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(100))
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, pixels, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


JPEG = encode(noise("RGB", (200, 200)), "JPEG")
BROKEN = {
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "image file is truncated"),
    "truncated PNG": (FORMATS["rgb.png"][:2000], "image file is truncated"),
    "corrupt PNG": (FORMATS["rgb.png"][:60] + b"\0" * 50 + FORMATS["rgb.png"][110:], "broken data stream"),
    "text": (b"<html>404 Not Found</html>\n", "cannot identify image file"),
    "empty": (b"", "cannot identify image file"),
    "zeros": (bytes(1000), "cannot identify image file"),
    "bomb": (png_header(20000, 20000), "400000000 pixels.*bomb"),
    "bomb of one line": (png_header(2**31 - 1, 1), "2147483647 pixels.*bomb"),
    "no pixels": (png_header(0, 5), ""),
}


@pytest.mark.parametrize(("data", "reason"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("crop_pct", [None, 0.9], ids=["whole", "cropped"])
def test_broken_images_are_named(data: bytes, reason: str, crop_pct: float | None) -> None:
    with pytest.raises(BadImageError, match=rf"^train\.zip!cat/1\.jpg: not a readable image: .*{reason}") as caught:
        EvalTransform(16, crop_pct=crop_pct).decode(data, "train.zip!cat/1.jpg")
    assert "\n" not in str(caught.value)


def test_a_jpeg_cut_anywhere_is_refused_or_whole() -> None:
    """Nothing is filled in with grey; only the end marker may be missing."""
    data = encode(noise("RGB", (24, 24)), "JPEG")
    whole, transform = np.asarray(to_rgb(data)), EvalTransform(24)
    for cut in range(len(data) - 2):
        with pytest.raises(BadImageError, match=r"^x: not a readable image: "):
            transform.decode(data[:cut], "x")
    np.testing.assert_array_equal(transform.decode(data, "x"), whole)


def test_a_thread_of_an_image_is_not_blown_up_by_cropping() -> None:
    """1 x 60000 pixels whose short side becomes 224 would be three billion pixels."""
    data = encode(Image.new("L", (1, 60_000)))
    with pytest.raises(BadImageError, match=r"^x: not a readable image: 224x13440000 pixels, more than the 178956970"):
        EvalTransform(224, crop_pct=1.0).decode(data, "x")
    assert EvalTransform(224).decode(data, "x").shape == (224, 224, 3)


WARN_ABOUT = {
    "could be decompression bomb": encode(Image.new("RGB", (150, 150))),
    "Transparency": FORMATS["palette transparent by degrees.png"],
    "Corrupt EXIF": encode(Image.new("RGB", (9, 9)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12"),
}
DECODE = """
import pathlib, sys
from PIL import Image
from vitq_ray.data.transforms import EvalTransform
Image.MAX_IMAGE_PIXELS = 20_000
print([EvalTransform(8).decode(pathlib.Path(path).read_bytes(), path).shape for path in sys.argv[1:]])
"""


def test_no_warning_of_pillow_s_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh process, since pytest sets filters of its own; here Pillow does warn of the same images."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    for warning, data in WARN_ABOUT.items():
        (tmp_path / warning).write_bytes(data)
        with pytest.warns(Warning, match=warning):
            Image.open(io.BytesIO(data)).convert("RGB")
    command = [sys.executable, "-W", "always", "-c", DECODE, *(str(tmp_path / warning) for warning in WARN_ABOUT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[(8, 8, 3), (8, 8, 3), (8, 8, 3)]\n", "")


@pytest.mark.parametrize("action", ["error", "always", "default"])
def test_remarks_of_pillow_s_do_not_depend_on_later_filters(action: Any) -> None:
    data = encode(
        noise("RGB", (9, 9)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0\0\0"
    )
    with pytest.warns(UserWarning, match="Truncated File Read"):
        Image.open(io.BytesIO(data)).load()
    with warnings.catch_warnings(record=True) as seen, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter(action)
        assert {pixels.shape for pixels in pool.map(EvalTransform(8).decode, [data] * 100, "x" * 100)} == {(8, 8, 3)}
        filters = list(warnings.filters)
        load_rgb(data)
        assert list(warnings.filters) == filters  # set once
    assert seen == []
    with pytest.raises(UserWarning, match="mine"):  # an error, as pytest is set up: other warnings stay
        warnings.warn("mine", stacklevel=1)


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "image size: expected an integer >= 1, got 0"),
        ({"size": 224.0}, "image size: expected an integer >= 1, got 224.0"),
        ({"interpolation": "cubic"}, "interpolation: 'cubic' is not one of nearest, bilinear, bicubic, lanczos"),
        ({"mean": (0.5, 0.5)}, "mean, std: expected three numbers each, std > 0, got (0.5, 0.5) and (0.5, 0.5, 0.5)"),
        ({"std": (1, 0, 1)}, "mean, std: expected three numbers each, std > 0, got (0.5, 0.5, 0.5) and (1, 0, 1)"),
        (
            {"mean": (0.5, float("nan"), 0)},
            "mean, std: expected three numbers each, std > 0, got (0.5, nan, 0) and (0.5, 0.5, 0.5)",
        ),
        ({"crop_pct": 0}, "crop_pct: expected a number in (0, 1], got 0"),
        ({"crop_pct": 1.1}, "crop_pct: expected a number in (0, 1], got 1.1"),
        ({"crop_pct": float("nan")}, "crop_pct: expected a number in (0, 1], got nan"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(message) + "$"):
        EvalTransform(**{"size": 224, **values})


def test_settings_survive_json() -> None:
    transform = EvalTransform(224, *IMAGENET, "bicubic", 0.9)
    again = EvalTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert again == transform
    assert hash(again) == hash(transform)


def test_names_of_interpolations_are_torchvision_s() -> None:
    assert all(tv.functional.pil_modes_mapping[interpolation(name)] == mode for name, mode in INTERPOLATIONS.items())


def test_a_timm_model_s_transform() -> None:
    known = timm.get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k_ft_in1k").to_dict()
    config = timm.data.resolve_data_config(pretrained_cfg=known)
    assert timm_eval_transform(config, 384) == EvalTransform(384, (0.5,) * 3, (0.5,) * 3, "bicubic", None)
    clip = {**config, "mean": IMAGENET[0], "std": IMAGENET[1], "interpolation": "bilinear"}
    assert timm_eval_transform(clip, 224) == EvalTransform(224, *IMAGENET)


# Training -----------------------------------------------------------------------------------------------------------

EVALUATION = EvalTransform(32, *IMAGENET, "bicubic")


def set_seeds() -> None:
    """timm draws from all three."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["none", "light", "toolkit"])
@pytest.mark.parametrize("name", MODES)
def test_training_images_have_the_model_s_form(kind: str, name: str) -> None:
    set_seeds()
    augment = train_transform(EvalTransform(32, interpolation=name), kind)
    for _ in range(20):  # enough to meet every operation of RandAugment
        x = augment(noise("RGB", (50, 41)))
        assert (x.shape, x.dtype) == ((3, 32, 32), torch.float32)


@pytest.mark.parametrize(("name", "levels"), [("nearest", {0.0, 1.0}), ("bilinear", None)])
def test_light_interpolates_as_evaluation_does(name: str, levels: set[float] | None) -> None:
    set_seeds()
    x = train_transform(EvalTransform(32, (0, 0, 0), (1, 1, 1), name), "light")(noise("1", (50, 41)).convert("RGB"))
    found = set(x.unique().tolist())
    assert found == levels if levels else len(found) > 10


def test_toolkit_at_the_largest_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn once in dozens of images: every operation at magnitude 10, posterizing among them."""
    set_seeds()
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: 99.0)
    augment = train_transform(EVALUATION, "toolkit")
    assert all(augment(noise("RGB", (50, 41), seed)).isfinite().all() for seed in range(100))


@pytest.mark.parametrize("evaluation", [EVALUATION, EvalTransform(32, crop_pct=0.875)], ids=["whole", "cropped"])
def test_none_is_the_evaluation_transform(evaluation: EvalTransform) -> None:
    image = noise("RGB", (50, 41))
    pixels = torch.from_numpy(evaluation.decode(encode(image), "x").copy())
    assert torch.equal(train_transform(evaluation, "none")(image), evaluation.normalize(pixels[None])[0])


def test_light_normalises_as_evaluation_does() -> None:
    image = Image.new("RGB", (50, 41), (200, 100, 3))
    expected = EVALUATION.normalize(torch.tensor([200, 100, 3], dtype=torch.uint8).expand(1, 32, 32, 3))[0]
    set_seeds()
    augment = train_transform(EVALUATION, "light")
    for _ in range(5):
        torch.testing.assert_close(augment(image), expected, rtol=0, atol=0)


def test_light_crops_and_flips() -> None:
    column = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    image = Image.fromarray(np.stack([column] * 3, axis=-1))
    set_seeds()
    augment = train_transform(EvalTransform(32, (0, 0, 0), (1, 1, 1)), "light")
    rises, widths = [], []
    for _ in range(60):
        row = augment(image)[0, 16]
        rises.append(bool(row[-1] > row[0]))
        widths.append(abs(float(row[-1] - row[0])) * 255 / 252)  # share of the image's width
    assert 10 < sum(rises) < 50
    assert 0.6 < min(widths) < max(widths) <= 1.0  # an area of 0.8 at 3:4 keeps 0.77 of the width


def test_toolkit_normalises_as_evaluation_does() -> None:
    """Undone with evaluation's mean and std, every value is one of 256, but for the zeros of random erasing."""
    set_seeds()
    augment = train_transform(EVALUATION, "toolkit")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    erased = changed = 0
    image = noise("RGB", (50, 41))
    for _ in range(40):
        x = augment(image)
        kept = x != 0
        levels = ((x * std + mean) * 255)[kept]
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert levels.min() > -0.5
        assert levels.max() < 255.5
        erased += int((~kept).any())
        changed += int(not torch.equal(x, train_transform(EVALUATION, "none")(image)))
    assert 1 <= erased <= 25  # a quarter of forty is expected
    assert changed == 40


@pytest.mark.parametrize("kind", ["none", "light", "toolkit"])
def test_training_transforms_can_be_sent_to_workers(kind: str) -> None:
    transform = train_transform(EVALUATION, kind)
    copy = pickle.loads(pickle.dumps(transform))
    image = Image.new("RGB", (50, 41), (200, 100, 3))
    if kind == "toolkit":  # random colours: only the form can be compared
        assert copy(image).shape == transform(image).shape
    else:
        assert torch.equal(copy(image), transform(image))


def test_unknown_augmentation() -> None:
    with pytest.raises(InputError, match=r"^augmentation: 'heavy' is not one of none, light, toolkit$"):
        train_transform(EVALUATION, "heavy")
