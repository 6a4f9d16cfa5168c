"""The whole command lines, on a tiny model and a few images: outputs, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Project, encode_png, load_script, tiny_vit, write_zip_split
from vitq_ray.base import files
from vitq_ray.base.config import InputError
from vitq_ray.commands.inputs import training_ids
from vitq_ray.commands.screen import SILENT
from vitq_ray.data.samples import open_split
from vitq_ray.models.google import google_arrays

calib, evaluate = load_script("calib"), load_script("evaluate")


def run(script: object, *argv: str) -> int:
    return script.main([str(a) for a in argv])  # type: ignore[attr-defined]


def run_calib(project: Project, tmp_path: Path, *argv: str) -> dict[str, object]:
    """Run calib.py on two batches of four; returns result.json."""
    small = ("--num-calib-batch", "2", "--calib-batchsz", "4", "--calib-output-path", str(tmp_path / "out"))
    assert run(calib, *project.options, *small, *argv) == 0
    return json.loads((tmp_path / "out" / "result.json").read_text())


def test_calib_writes_a_checkpoint_that_evaluates_to_the_same_counts(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_calib(project, tmp_path)
    printed = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["result.json", "vit_calib.json", "vit_calib.pth"]
    assert (result["images"], result["setting"]["mode"]) == (22, "ft2")
    assert 0 <= result["top1_correct"] <= result["top5_correct"] <= 22
    assert set(result["seconds"]) == {"load", "calibrate", "scales", "evaluate", "save"}
    assert "transformer.encoder.layer.1.attn.matmul_a_input_quantizer" in printed.out
    assert "quantizers: 46 of 58 on" in printed.out

    arguments = ("--pretrained_dir", tmp_path / "out" / "vit_calib.pth", "--data-path", project.folder)
    assert run(evaluate, *arguments, "--output", tmp_path / "again", "--save-logits", tmp_path / "l.npz") == 0
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    for key in ("images", "top1_correct", "top5_correct", "setting", "weights_fingerprint", "data_fingerprint"):
        assert again[key] == result[key], key
    saved = np.load(tmp_path / "l.npz")
    assert saved["logits"].shape == (22, 7)
    assert saved["sample_id"].tolist() == list(range(22))
    assert (saved["logits"].argmax(1) == saved["labels"]).sum() == result["top1_correct"]


def test_float_evaluation_is_perfect_by_construction(project: Project, tmp_path: Path) -> None:
    assert run(evaluate, *project.options, "--output", tmp_path) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["images"], result["top1_correct"], result["setting"]) == (22, 22, None)


@pytest.mark.parametrize("size", [1, 5, 22, 100])
def test_batch_size_does_not_change_the_counts(size: int, project: Project, tmp_path: Path) -> None:
    assert run(evaluate, *project.options, "--output", tmp_path, "--batch-size", size) == 0
    assert json.loads((tmp_path / "result.json").read_text())["top1_correct"] == 22


def test_limit(project: Project, tmp_path: Path) -> None:
    assert run(evaluate, *project.options, "--output", tmp_path, "--limit", 5) == 0
    assert json.loads((tmp_path / "result.json").read_text())["images"] == 5


def test_exactly_n_calibration_batches_in_map_order(project: Project, tmp_path: Path) -> None:
    result = run_calib(project, tmp_path, "--calib-order", "map")
    assert result["calibration"]["sample_ids"] == list(range(8))
    assert result["calibration"]["split"] == "train"
    assert result["calibration"]["images_also_evaluated"] == 0


def test_shuffled_calibration_depends_on_the_seed_only(project: Project, tmp_path: Path) -> None:
    ids = [run_calib(project, tmp_path, "--seed", seed)["calibration"]["sample_ids"] for seed in ("1", "1", "2")]
    assert ids[0] == ids[1] != ids[2]


def test_overlap_with_val_is_flagged(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_calib(project, tmp_path, "--calib-split", "val")
    assert result["calibration"]["images_also_evaluated"] == 8
    assert "warning: 8 calibration images are in val" in capsys.readouterr().err
    checkpoint = ("--pretrained_dir", tmp_path / "out" / "vit_calib.pth", "--data-path", project.folder)
    assert run(evaluate, *checkpoint, "--output", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "result.json").read_text())["images_also_calibrated_on"] == 8
    assert "8 of the images of this val were calibrated on" in capsys.readouterr().err


def test_images_of_train_that_are_in_val_too(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    val = open_split(str(project.folder), "val")
    own = [encode_png(np.full((16, 16, 3), shade, np.uint8)) for shade in range(3)]
    images = [*(val.read(i) for i in range(22)), *own]
    write_zip_split(project.folder, "train", images, [*val.labels.tolist(), 0, 1, 2])
    assert run_calib(project, tmp_path, "--calib-order", "map")["calibration"]["images_also_evaluated"] == 8
    assert "warning: 8 calibration images are in val" in capsys.readouterr().err
    checkpoint = ("--pretrained_dir", tmp_path / "out" / "vit_calib.pth", "--data-path", project.folder)
    assert run(evaluate, *checkpoint, "--output", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "result.json").read_text())["images_also_calibrated_on"] == 8
    assert "8 of the images of this val were calibrated on" in capsys.readouterr().err
    train = open_split(str(project.folder), "train")
    assert training_ids(train, val, SILENT).tolist() == [22, 23, 24]
    assert "22 of 25 images of train are in val too: they are not trained on" in caplog.text
    with pytest.raises(InputError, match=r"val\.zip: all 22 images are in val too; expected others to train on$"):
        training_ids(val, val, SILENT)


def test_old_toolkit_command_line(project: Project, tmp_path: Path) -> None:
    """README style of the toolkit this replaces, both spellings, `--quant-mode 2`."""
    line = (
        f"--calib --name vit --pretrained_dir {project.checkpoint} --data-path {project.folder} --model_type auto "
        "--img_size 16 --num-calib-batch 2 --calib-batchsz 8 --quant-mode ft2 --calibrator percentile "
        f"--percentile 99.99 --calib-output-path {tmp_path}"
    )
    assert run(calib, *line.split()) == 0
    assert json.loads((tmp_path / "result.json").read_text())["name"] == "vit"
    other = line.replace("calib-batchsz", "calib_batchsz").replace("data-path", "data_path").replace("ft2", "2")
    assert run(calib, *other.split()) == 0
    assert json.loads((tmp_path / "result.json").read_text())["setting"]["mode"] == "ft2"


@pytest.mark.parametrize("mode", ["ft1", "ft2", "ft3", "trt"])
@pytest.mark.parametrize("calibrator", ["max", "percentile", "mse", "entropy"])
def test_every_mode_and_calibrator(mode: str, calibrator: str, project: Project, tmp_path: Path) -> None:
    result = run_calib(project, tmp_path, "--quant-mode", mode, "--calibrator", calibrator)
    assert result["setting"]["calibrator"] == ("percentile 99.99" if calibrator == "percentile" else calibrator)
    assert result["top1_correct"] > 5  # of 22; chance is 3


def test_bits(project: Project, tmp_path: Path) -> None:
    result = run_calib(project, tmp_path, "--wprec", "4", "--aprec", "2")
    assert (result["setting"]["weight_bits"], result["setting"]["act_bits"]) == (4, 2)
    coarse = result["top1_correct"]
    assert run_calib(project, tmp_path)["top1_correct"] > coarse


def test_skipped_bad_images_are_counted_and_listed(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = encode_png(np.zeros((16, 16, 3), np.uint8))
    write_zip_split(project.folder, "val", [good, b"not an image", good], [0, 1, 2])
    assert run(evaluate, *project.options, "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert "c1/0001.png: not a readable image" in error
    assert run(evaluate, *project.options, "--output", tmp_path, "--on-bad-image", "skip") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 2
    assert [bad["image"].split("!")[1] for bad in result["bad_images"]] == ["c1/0001.png"]


def test_no_readable_image(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_zip_split(project.folder, "val", [b"broken", b"too"], [0, 1])
    small = ("--num-calib-batch", 2, "--calib-batchsz", 4, "--on-bad-image", "skip")
    assert run(calib, *project.options, *small, "--calib-output-path", tmp_path) == 2
    assert "no readable image in val" in capsys.readouterr().err


def test_bad_calibration_images_are_replaced(project: Project, tmp_path: Path) -> None:
    good = [encode_png(np.full((16, 16, 3), 10 * i, np.uint8)) for i in range(12)]
    write_zip_split(project.folder, "train", [*good[:3], b"broken", *good[3:]], [i % 7 for i in range(13)])
    result = run_calib(project, tmp_path, "--calib-order", "map", "--on-bad-image", "skip")
    assert result["calibration"]["sample_ids"] == [0, 1, 2, 4, 5, 6, 7, 8]


def test_checkpoint_at_chance_level_is_a_warning_only(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(project.folder / "vit.npz", **google_arrays(tiny_vit(seed=9)))
    assert run(evaluate, *project.options, "--output", tmp_path) == 0
    assert "not above chance level" in capsys.readouterr().err


def broken(project: Project, case: str) -> tuple[str, ...]:
    """Options of calib.py for one kind of bad input."""
    folder = project.folder
    if case == "pickle in npz":
        np.savez(folder / "vit.npz", a=np.array([{}], object))
    elif case == "NaN weights":
        arrays = google_arrays(tiny_vit())
        arrays["head/bias"][0] = np.nan
        np.savez(folder / "vit.npz", **arrays)
    elif case == "another architecture":
        return (*project.options, "--model_type", "ViT-B_16")
    elif case == "truncated zip":
        data = (folder / "val.zip").read_bytes()
        (folder / "val.zip").write_bytes(data[: len(data) // 2])
    elif case == "unlabelled map":
        (folder / "val_map.txt").write_text("c0/0000.png 0\n")
    elif case == "label out of range":
        lines = (folder / "val_map.txt").read_text().splitlines()
        lines[2] = lines[2].split("\t")[0] + "\t7"
        (folder / "val_map.txt").write_text("\n".join(lines))
    elif case == "file not in zip":
        (folder / "val_map.txt").write_text("nowhere.png\t0\n")
    elif case == "empty split":
        (folder / "val_map.txt").write_text("\n")
    elif case == "no val":
        (folder / "val.zip").unlink()
    return tuple(project.options)


BAD_INPUT = {
    "pickle in npz": "pickled",
    "NaN weights": "'head/bias' has NaN",
    "another architecture": "another architecture",
    "truncated zip": "val.zip: not a zip, or truncated",
    "unlabelled map": "val_map.txt: line 1: no tab in 'c0/0000.png 0'",
    "label out of range": "val_map.txt: line 3: label out of range",
    "file not in zip": "val_map.txt: line 1: 'nowhere.png' is not in",
    "empty split": "val_map.txt: lists no image",
    "no val": "has no val split",
}


def assert_one_line_error(capsys: pytest.CaptureFixture[str], message: str) -> None:
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    assert message in error[0]


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = broken(project, case)
    small = ("--num-calib-batch", "2", "--calib-batchsz", "4")
    assert run(calib, *options, *small, "--calib-output-path", tmp_path / "out") == 2
    assert_one_line_error(capsys, BAD_INPUT[case])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--percentile", "100.1"], "--percentile: expected a number from 0 to 100, got '100.1'"),
        (["--percentile", "nan"], "got 'nan'"),
        (["--num-calib-batch", "6"], "needs 48 images (batches x batch size), the split has 40"),
        (["--num-calib-batch", "0"], "expected an integer >= 1, got '0'"),
        (["--wprec", "9"], "expected an integer from 2 to 8, got '9'"),
        (["--aprec", "1"], "expected an integer from 2 to 8, got '1'"),
        (["--quant-mode", "ft5"], "'ft5' is not one of ft1, ft2, ft3, trt"),
        (["--calibrator", "median"], "invalid choice: 'median'"),
        (["--model_type", "ViT-B-16"], "ViT-B_16"),
        (["--img_size", "17"], "17"),
        (["--img_size", "8000000"], "expected an integer from 1 to 4096, got '8000000'"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--calib-batch", "3"], "unrecognized arguments: --calib-batch 3"),
        (["--data-path", "/nowhere"], "/nowhere: has no"),
        (["--pretrained_dir", "/nowhere.npz"], "/nowhere.npz"),
    ],
)
def test_impossible_options(
    options: list[str], message: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(calib, *project.options, *options) == 2
    assert_one_line_error(capsys, message)


def test_gpu_that_is_not_there(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(evaluate, *project.options, "--use-gpu") == 2
    assert_one_line_error(capsys, "--use-gpu: this PyTorch finds no CUDA GPU")


def test_only_data_given(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(calib, "--data-path", project.folder) == 2
    assert_one_line_error(capsys, "--pretrained_dir: needed, since --data-path is given")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant-mode", "ft1"], "--quant-mode: ft1 given, but"),
        (["--img_size", "32"], "was calibrated with 16"),
    ],
)
def test_options_that_contradict_the_sidecar(
    options: list[str], message: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_calib(project, tmp_path)
    capsys.readouterr()
    checkpoint = ("--pretrained_dir", tmp_path / "out" / "vit_calib.pth", "--data-path", project.folder)
    assert run(evaluate, *checkpoint, *options) == 2
    assert_one_line_error(capsys, message)


def test_quant_mode_of_a_float_checkpoint(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(evaluate, *project.options, "--quant-mode", "ft2") == 2
    assert_one_line_error(capsys, "is a float checkpoint; calibrate it first")


def test_output_that_cannot_be_written(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(evaluate, *project.options, "--output", tmp_path / "file") == 2
    assert_one_line_error(capsys, "expected a folder that can be written to")
    assert run(evaluate, *project.options, "--output", "s3://bucket/out") == 2
    assert_one_line_error(capsys, "--output: s3://bucket/out is a URI")
    assert run(evaluate, *project.options, "--output", tmp_path, "--save-logits", tmp_path) == 2
    assert_one_line_error(capsys, "expected the name of a file")


def test_disk_full(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(evaluate, *project.options, "--output", tmp_path / "out") == 1
    assert_one_line_error(capsys, "disk full")
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupt(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitq_ray.commands.evaluate.load", interrupted)
    assert run(evaluate, *project.options) == 130
    assert "interrupted" in capsys.readouterr().err


def test_folder_layout_gives_the_same_counts(project: Project, tmp_path: Path) -> None:
    folders = tmp_path / "folders"
    for split in ("train", "val"):
        shutil.unpack_archive(project.folder / f"{split}.zip", folders / split)
    for label in range(7):
        (folders / "train" / f"c{label}").mkdir(exist_ok=True)
    arguments = ("--pretrained_dir", project.checkpoint, "--data-path", folders, "--output", tmp_path / "out")
    assert run(evaluate, *arguments) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["images"], result["top1_correct"]) == (22, 22)


def test_what_is_left_out_is_counted_and_named(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(project.folder / "val_map.txt", "a") as lines:
        lines.write((project.folder / "val_map.txt").read_text())
    for script, output in ((evaluate, "--output"), (calib, "--calib-output-path")):
        few = ("--num-calib-batch", 1) if script is calib else ()
        assert run(script, *project.options, output, tmp_path / "out", *few) == 0
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        (row,) = result["left_out"]["val"]
        assert (result["images"], row["reason"], row["count"]) == (22, "were listed before", 22)
        assert f"warning: val: left out: 22 were listed before (first: {row['first']})" in capsys.readouterr().err


def test_numbered_class_folders(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(project.folder / "val.zip") as archive:
        for line in (project.folder / "val_map.txt").read_text().splitlines():
            name, label = line.split("\t")
            target = tmp_path / "val" / str(7 + int(label)) / name  # 7 to 13
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
        for label in range(7):
            (tmp_path / "val" / str(7 + label)).mkdir(exist_ok=True)
    options = ["--pretrained_dir", project.checkpoint, "--data-path", tmp_path, "--output", tmp_path / "out"]
    assert run(evaluate, *options) == 2
    assert_one_line_error(capsys, "whose order as text (10, 11, 12, …) is not their own (7, 8, 9, …)")
    assert run(evaluate, *options, "--class-order", "number") == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["top1_correct"] == 22


@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_workers_do_not_change_results(count: int, ray_cluster: None, project: Project, tmp_path: Path) -> None:
    """Statistics bit for bit, logits and counts; the same with 1, 2 and 4 workers, on two cores."""
    small = ("--num-calib-batch", 5, "--calib-batchsz", 4, "--batch-size", 5)
    folders = [tmp_path / "here", tmp_path / "workers"]
    for folder, more in zip(folders, ((), ("--num-workers", count)), strict=True):
        argv = (*project.options, *small, "--calib-output-path", folder, *more)
        assert calib.main([str(a) for a in argv]) == 0
        argv = ("--pretrained_dir", folder / "vit_calib.pth", "--data-path", project.folder, "--batch-size", 5, *more)
        files = ("--output", folder / "again", "--save-logits", folder / "logits.npz")
        assert evaluate.main([str(a) for a in (*argv, *files)]) == 0
    here, there = (torch.load(folder / "vit_calib.pth", weights_only=True) for folder in folders)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)
    results = [json.loads((folder / "again" / "result.json").read_text()) for folder in folders]
    for key in ("images", "top1_correct", "top5_correct"):
        assert results[0][key] == results[1][key]
    one, two = (np.load(folder / "logits.npz") for folder in folders)
    for key in ("logits", "labels", "sample_id"):
        np.testing.assert_array_equal(one[key], two[key])


@pytest.mark.parametrize("name", ["vit_calib.pth", "vit.npz"])
def test_a_checkpoint_is_read_once(
    name: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_calib(project, tmp_path)
    path = tmp_path / "out" / name if name.endswith("pth") else project.folder / name
    read: list[str] = []
    whole = files.read_bytes

    def counted(path: str, *more: object) -> bytes:
        read.append(path)
        return whole(path, *more)

    for module in ("weights", "checkpoint"):
        monkeypatch.setattr(f"vitq_ray.models.{module}.read_bytes", counted)
    argv = ("--pretrained_dir", path, "--data-path", project.folder, "--output", tmp_path / "again")
    assert run(evaluate, *argv) == 0
    assert [p for p in read if not p.endswith(".json")] == [str(path)]


def test_results_say_what_drew_the_calibration_images(project: Project, tmp_path: Path) -> None:
    assert run_calib(project, tmp_path, "--seed", "5")["calibration"]["drawn_by"] == "seed 5"
    assert run_calib(project, tmp_path, "--calib-order", "map")["calibration"]["drawn_by"] == "order of the map"
    sidecar = json.loads((tmp_path / "out" / "vit_calib.json").read_text())
    assert sidecar["calibration"]["drawn_by"] == "order of the map"
