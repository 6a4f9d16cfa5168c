"""The bundled sample: complete, small enough, and equal to the data that it says it comes from."""

from __future__ import annotations

import gzip
import io
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, load_script

SAMPLE = ROOT / "vitq_ray" / "sample"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEGABYTE = 1_000_000
SPLITS = {"train": "train", "val": "t10k"}  # our name -> the name in the idx files

OUTSIDE_BLOCKS = {
    "embedding/kernel",
    "embedding/bias",
    "cls",
    "Transformer/posembed_input/pos_embedding",
    "Transformer/encoder_norm/scale",
    "Transformer/encoder_norm/bias",
    "head/kernel",
    "head/bias",
}
ATTENTION = "MultiHeadDotProductAttention_1"
INSIDE_BLOCK = (
    {f"LayerNorm_{i}/{part}" for i in (0, 2) for part in ("scale", "bias")}
    | {f"{ATTENTION}/{x}/{part}" for x in ("query", "key", "value", "out") for part in ("kernel", "bias")}
    | {f"MlpBlock_3/Dense_{i}/{part}" for i in (0, 1) for part in ("kernel", "bias")}
)


def read_map(split: str) -> list[tuple[str, int]]:
    lines = (SAMPLE / f"{split}_map.txt").read_text().splitlines()
    return [(name, int(label)) for name, label in (line.split("\t") for line in lines)]


def read_idx(path: Path, rank: int) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def debian_images(prefix: str) -> np.ndarray:
    path = DEBIAN / f"{prefix}-images-idx3-ubyte.gz"
    if not path.is_file():
        pytest.skip(f"Debian's package dataset-fashion-mnist is not installed ({path})")
    return read_idx(path, rank=3)


def load_arrays() -> dict[str, np.ndarray]:
    with np.load(SAMPLE / "vit.npz", allow_pickle=False) as file:
        return dict(file)


def test_all_files_are_there_and_nothing_else() -> None:
    expected = {"train.zip", "val.zip", "train_map.txt", "val_map.txt", "vit.npz", "README.md"}
    assert {path.name for path in SAMPLE.iterdir()} == expected | {"LICENSE-fashion-mnist.txt"}


def test_sizes() -> None:
    sizes = {path.name: path.stat().st_size for path in SAMPLE.iterdir()}
    assert max(sizes.values()) < 10 * MEGABYTE
    assert sum(sizes.values()) <= 16 * MEGABYTE
    assert sizes["vit.npz"] <= 3.5 * MEGABYTE


def test_licence_names_its_owner() -> None:
    text = (SAMPLE / "LICENSE-fashion-mnist.txt").read_text()
    assert "MIT License" in text
    assert "Copyright (c) 2017 Zalando SE" in text


@pytest.mark.parametrize("split", SPLITS)
def test_map_is_balanced_and_its_names_are_the_zip_members(split: str) -> None:
    rows = read_map(split)
    names = [name for name, _ in rows]
    assert len(rows) == len(set(names)) == 10_000
    assert Counter(label for _, label in rows) == dict.fromkeys(range(10), 1000)
    with zipfile.ZipFile(SAMPLE / f"{split}.zip") as archive:
        assert archive.namelist() == names
        assert archive.testzip() is None


def test_every_ten_training_images_in_a_row_hold_every_class() -> None:
    labels = np.array([label for _, label in read_map("train")]).reshape(-1, 10)
    assert (np.sort(labels, axis=1) == np.arange(10)).all()


def test_the_order_of_classes_is_not_periodic() -> None:
    labels = np.array([label for _, label in read_map("train")]).reshape(-1, 10)
    assert len(np.unique(labels, axis=0)) > 900


def test_test_images_keep_their_order() -> None:
    assert [name for name, _ in read_map("val")] == [f"{i:05d}.png" for i in range(10_000)]


@pytest.mark.parametrize("split", SPLITS)
def test_zip_has_no_build_time_in_it(split: str) -> None:
    with zipfile.ZipFile(SAMPLE / f"{split}.zip") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_grey_28_by_28_png(split: str) -> None:
    with zipfile.ZipFile(SAMPLE / f"{split}.zip") as archive:
        for name in archive.namelist()[::100]:
            image = Image.open(io.BytesIO(archive.read(name)))
            assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))


@pytest.mark.parametrize(("split", "prefix"), SPLITS.items())
def test_pixels_equal_debians(split: str, prefix: str) -> None:
    """A member is named after its index in the original file; 1,000 of the 10,000 are compared."""
    source = debian_images(prefix)
    with zipfile.ZipFile(SAMPLE / f"{split}.zip") as archive:
        for name in archive.namelist()[::10]:
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))))
            assert np.array_equal(pixels, source[int(Path(name).stem)]), name


@pytest.mark.parametrize(("split", "prefix"), SPLITS.items())
def test_labels_equal_debians(split: str, prefix: str) -> None:
    debian_images(prefix)
    source = read_idx(DEBIAN / f"{prefix}-labels-idx1-ubyte.gz", rank=1)
    rows = read_map(split)
    assert [label for _, label in rows] == [source[int(Path(name).stem)] for name, _ in rows]


def test_model_has_googles_names_and_at_least_six_blocks() -> None:
    arrays = load_arrays()
    matches = [re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", name) for name in arrays]
    blocks = {(int(m[1]), m[2]) for m in matches if m}
    depth = len({i for i, _ in blocks})
    assert depth >= 6
    assert blocks == {(i, name) for i in range(depth) for name in INSIDE_BLOCK}
    assert {name for name in arrays if "encoderblock" not in name} == OUTSIDE_BLOCKS


def test_model_arrays_have_googles_shapes() -> None:
    arrays = load_arrays()
    patch, _, channels, width = arrays["embedding/kernel"].shape
    block = "Transformer/encoderblock_0"
    _, heads, head_width = arrays[f"{block}/{ATTENTION}/query/kernel"].shape
    assert channels == 3
    assert heads * head_width == width
    assert arrays["cls"].shape == (1, 1, width)
    assert arrays["Transformer/posembed_input/pos_embedding"].shape == (1, 1 + (28 // patch) ** 2, width)
    assert arrays[f"{block}/{ATTENTION}/out/kernel"].shape == (heads, head_width, width)
    assert arrays[f"{block}/MlpBlock_3/Dense_0/kernel"].shape == (width, 4 * width)
    assert arrays[f"{block}/MlpBlock_3/Dense_1/kernel"].shape == (4 * width, width)
    assert arrays["head/kernel"].shape == (width, 10)


def test_model_is_float32_and_finite() -> None:
    for name, array in load_arrays().items():
        assert array.dtype == np.float32, name
        assert np.isfinite(array).all(), name


def test_missing_dataset_is_one_line_that_names_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(tmp_path / "none")
    assert load_script("build_sample").main(["--skip-training", "--source", source, "--output", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "dataset-fashion-mnist" in printed.err
    assert source in printed.err
