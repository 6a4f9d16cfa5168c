"""qat.py from the command line, on a tiny model: outputs, resuming after a kill, refusals, old options."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, RUN_DESCRIPTION, Project, hears_ctrl_c, load_script, make_project, tiny_vit
from vitq_ray.base.config import InputError
from vitq_ray.commands import train
from vitq_ray.commands.options import TrainOptions
from vitq_ray.commands.parser import parse
from vitq_ray.commands.screen import SILENT
from vitq_ray.data.samples import open_split
from vitq_ray.data.splits import make_splits
from vitq_ray.models.checkpoint import sidecar_fingerprint
from vitq_ray.models.google import google_arrays
from vitq_ray.run.folder import RunFolder, read_bad_images
from vitq_ray.run.results import TRAINING, Stopwatch

calib, evaluate, qat = load_script("calib"), load_script("evaluate"), load_script("qat")
SCRIPT = ROOT / "scripts" / "qat.py"
SMALL = ("--num-calib-batch", "2", "--calib-batchsz", "4", "--batch-size", "8", "--no-dashboard", "--wprec", "4")
QUICK = (*SMALL, "--aprec", "4", "--num-epochs", "2", "--qat-lr", "1e-3", "--augment", "light")


def run(script: Any, *argv: object) -> int:
    return script.main([str(a) for a in argv])


def result(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return values


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "vit_qat.pth", weights_only=True)
    return state


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"), train=40, val=150)


def test_a_float_checkpoint_is_calibrated_trained_and_evaluates_to_the_reported_counts(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(qat, *project.options, *QUICK, "--distill", "--learn-amax", "--output", folder, "--name", "test") == 0
    values, printed = result(folder), capsys.readouterr().out
    assert (values["images"], values["name"], len(values["epochs"])) == (75, "test", 3)
    assert values["float"]["val"]["top1_correct"] == 150
    assert values["images_also_calibrated_on"] == 0
    for name in ("float", "ptq", "qat"):
        assert values[name]["selection"]["images"] + values[name]["report"]["images"] == 150
    assert values["top1_correct"] == values["qat"]["report"]["top1_correct"]
    assert "start (PTQ)" in printed
    assert "epoch 2/2: loss" in printed
    assert {"run.json", "result.json", "state.pt", "steps.jsonl", "epochs.jsonl", "vit_qat.pth", "vit_qat.json"} <= {
        p.name for p in folder.iterdir()
    }
    again = ("--pretrained_dir", folder / "vit_qat.pth", "--data-path", project.folder, "--output", tmp_path / "again")
    assert run(evaluate, *again) == 0
    for key in ("images", "top1_correct", "top5_correct"):
        assert result(tmp_path / "again")[key] == values["qat"]["val"][key], key


def test_the_old_toolkits_command_line(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--num-calib-batch", 2, "--calib-split", "val", "--calib-output-path", tmp_path)
    assert run(calib, *project.options, *small) == 0
    old = (
        f"--train --name vit --pretrained_dir {tmp_path}/vit_calib.pth --data-path {project.folder} --model_type auto "
        f"--quant-mode ft2 --img_size 16 --distill --teacher {project.checkpoint} --output {tmp_path}/out "
        "--batch-size 32 --num-epochs 1 --qat-lr 1e-4"
    )
    assert run(qat, *old.split(), "--no-dashboard") == 0
    values = result(tmp_path / "out")
    assert values["config"]["global_batch"] == 32
    assert values["config"]["distillation"] == {"temperature": 3.0, "scale": None}
    assert (tmp_path / "out" / "vit_calib_qat.pth").exists()  # with --model_type auto, the stem of the file
    assert values["images_also_calibrated_on"] == 16
    assert "16 of the images of this val were calibrated on" in capsys.readouterr().err


def test_old_options_parse_with_a_google_name() -> None:
    old = (
        "--train --name vit --pretrained_dir X_calib.pth --data-path D --model_type ViT-B_16 --quant-mode ft2 "
        "--img_size 384 --distill --teacher X.npz --output O --batch-size 32 --num-epochs 5 --qat-lr 1e-4"
    )
    options = parse(TrainOptions, old.split(), "qat.py")
    assert (options.model_type, options.img_size, options.teacher) == ("ViT-B_16", 384, "X.npz")
    config = train.config_of(options)
    assert (config.lr, config.global_batch) == (1e-4, 32)
    assert config.distillation is not None


def start_process(folder: Path, project: Project, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *project.options, *QUICK, "--distill", "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        steps = folder / "steps.jsonl"
        if steps.exists() and len(steps.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} steps: {process.communicate()}")


LONG = ("--num-epochs", "30", "--checkpoint-steps", "3")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    how: signal.Signals, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cut"
    process = start_process(folder, project, *LONG)
    wait_for_steps(folder, 20, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=240)
    assert not (folder / "result.json").exists(), "the run was over before it could be stopped"
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert f"Go on with: python scripts/qat.py --resume {folder}" in errors
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process had
    try:
        assert run(qat, "--resume", folder) == 0
        assert run(qat, *project.options, *QUICK, *LONG, "--distill", "--output", tmp_path / "whole") == 0
    finally:
        torch.set_num_threads(threads)
    assert same(folder, tmp_path / "whole")
    assert result(folder)["epochs"] == result(tmp_path / "whole")["epochs"]
    assert run(qat, "--resume", folder) == 0  # a finished run has nothing left to do
    assert same(folder, tmp_path / "whole")


def test_resuming_with_other_options_is_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(qat, *project.options, *QUICK, "--output", folder) == 0
    assert run(qat, "--resume", folder, "--qat-lr", "0.5") == 2
    assert f"--qat-lr: 0.5 given, but {folder} was started with 0.001" in capsys.readouterr().err
    assert run(qat, "--resume", tmp_path / "nothing") == 2
    assert "has no run.json" in capsys.readouterr().err
    assert run(qat, *project.options, *QUICK, "--output", folder) == 2
    assert "already holds a run; resume it" in capsys.readouterr().err


def test_data_may_move_but_not_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    project = make_project(tmp_path / "data", train=40, val=22)
    assert run(qat, *project.options, *QUICK, "--output", tmp_path / "run") == 0
    project.folder.rename(tmp_path / "moved")  # the checkpoint, too
    assert run(qat, "--resume", tmp_path / "run") == 2
    assert f"{project.folder}: has no train split" in capsys.readouterr().err
    moved = ("--resume", tmp_path / "run", "--data-path", tmp_path / "moved")
    assert run(qat, *moved, "--pretrained_dir", tmp_path / "moved" / "vit.npz") == 0
    assert "this training is finished" in capsys.readouterr().out
    lines = (tmp_path / "moved" / "train_map.txt").read_text().splitlines()
    (tmp_path / "moved" / "train_map.txt").write_text("\n".join(lines[::-1]) + "\n")
    assert run(qat, *moved) == 2
    assert "this is another training: train_fingerprint: " in capsys.readouterr().err


def test_a_start_is_compared_before_anything_was_trained(tmp_path: Path) -> None:
    run_json = {**RUN_DESCRIPTION, "start": {"checkpoint_fingerprint": "a"}}
    for now, given, state in (("a", "pretrained_dir", ""), ("b", "split_seed", ""), ("a", "teacher", "state.pt")):
        folder = RunFolder.create(tmp_path / f"{now} {given}", TRAINING)
        folder.write_run(run_json)
        sidecar = SimpleNamespace(checkpoint_fingerprint=now)
        options = replace(TrainOptions.of({"pretrained_dir": "x.pth"}), given=frozenset((given,)))
        job = SimpleNamespace(
            folder=folder, options=options, task=SimpleNamespace(start=SimpleNamespace(sidecar=sidecar))
        )
        (folder.path / "teacher_logits.npy").touch()
        if state:
            (folder.path / state).touch()
        train.require_same_start(job)
        assert (folder.path / "teacher_logits.npy").exists()
        sidecar.checkpoint_fingerprint = "b"
        if given == "pretrained_dir":
            with pytest.raises(InputError, match=r"another training: .*x\.pth has other weights or scales"):
                train.require_same_start(job)
        if given == "teacher":
            (folder.path / state).unlink()
            train.require_same_start(job)
            assert not (folder.path / "teacher_logits.npy").exists(), "of whichever teacher that was"


def test_a_diverging_run_says_so_in_one_line(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(qat, *project.options, *QUICK, "--qat-lr", "1e38", "--output", tmp_path / "run") == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert "not finite at step 2 (epoch 1) with learning rate 1e+38" in errors[0]
    assert (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "64"), "64 is more than the 40 training images"),
        (("--global-batch-size", "10", "--num-workers", "4"), "10 is not a multiple of 4 workers x 1 forward passes"),
        (
            ("--teacher", "x.npz", "--no-distill"),
            "--teacher: x.npz given, but nothing is learned from it without --distill",
        ),
        (("--qat-lr", "0"), "learning rate: expected a number > 0"),
        (("--augment", "heavy"), "invalid choice: 'heavy'"),
        (("--num-workers", "0"), "expected an integer from 1 to 10000, or a range such as 2-8, got '0'"),
    ],
)
def test_impossible_options(
    options: tuple[str, ...], message: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(qat, *project.options, *QUICK, *options, "--output", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_a_teacher_that_does_not_fit_is_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "other.npz", **google_arrays(tiny_vit(num_classes=9)))
    assert run(qat, *project.options, *QUICK, "--teacher", tmp_path / "other.npz", "--output", tmp_path / "o") == 2
    assert "has 9 classes, the student 7" in capsys.readouterr().err


def test_a_contradicted_sidecar_is_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(calib, *project.options, "--num-calib-batch", 2, "--calib-output-path", tmp_path) == 0
    options = (
        "--pretrained_dir",
        tmp_path / "vit_calib.pth",
        "--data-path",
        project.folder,
        "--output",
        tmp_path / "o",
    )
    assert run(qat, *options, "--quant-mode", "ft1") == 2
    assert "--quant-mode: ft1 given, but" in capsys.readouterr().err
    assert run(qat, *options, "--model_type", "ViT-B_16") == 2
    assert re.search(r"--model_type ViT-B_16: its \w+: \d+ given, but", capsys.readouterr().err), "as evaluate has it"


def test_the_splits_of_a_search_are_taken_over(project: Project, tmp_path: Path) -> None:
    best = tmp_path / "search" / "best"
    assert run(calib, *project.options, "--num-calib-batch", 2, "--calib-output-path", best) == 0
    fingerprint = result(best)["data_fingerprint"]
    splits = {**RUN_DESCRIPTION["splits"], "selection": list(range(60)), "report": list(range(60, 150))}
    description = {**RUN_DESCRIPTION, "splits": splits, "data_fingerprint": fingerprint}
    (tmp_path / "search" / "run.json").write_text(json.dumps(description))
    found = train.splits_of_search_run(str(best / "vit_calib.pth"), fingerprint)
    assert found is not None
    assert [ids.tolist() for ids in (found.splits.selection, found.splits.report)] == [
        splits["selection"],
        splits["report"],
    ]
    assert train.splits_of_search_run(str(best / "vit_calib.pth"), "other data") is None
    assert train.splits_of_search_run(str(tmp_path / "search" / "vit_calib.pth"), fingerprint) is None
    options = ("--pretrained_dir", best / "vit_calib.pth", "--data-path", project.folder, "--num-epochs", "1")
    assert run(qat, *options, "--batch-size", 8, "--no-dashboard", "--output", tmp_path / "o") == 0
    assert result(tmp_path / "o")["images"] == 90


def test_a_trained_checkpoint_keeps_the_halves_it_was_selected_by(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert run(qat, *project.options, *QUICK, "--split-seed", 3, "--output", first) == 0
    options = ("--pretrained_dir", first / "vit_qat.pth", "--data-path", project.folder, "--num-epochs", 1)
    options = (*options, "--batch-size", 8, "--no-dashboard", "--output")
    assert run(qat, *options, second, "--split-seed", 4) == 2
    assert "was selected with 3" in capsys.readouterr().err
    assert run(qat, *options, second) == 0
    splits = [json.loads((folder / "run.json").read_text())["splits"] for folder in (first, second)]
    assert splits[0] == splits[1]


def test_a_given_option_is_known_from_a_default() -> None:
    options = parse(TrainOptions, ["--qat-lr", "1e-4", "--no-distill"], "qat.py")
    assert options.given == {"qat_lr", "distill"}
    assert options.only(options.given) == {"qat_lr": 1e-4, "distill": False}
    with pytest.raises(InputError, match="unrecognized arguments: --lr"):
        parse(TrainOptions, ["--lr", "1"], "qat.py")


def break_images(folder: Path, split: str, indices: list[int]) -> None:
    """Replace some images of a zip by what is none."""
    with zipfile.ZipFile(folder / f"{split}.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
        for i, (name, data) in enumerate(members.items()):
            archive.writestr(name, b"not an image" if i in indices else data)


def test_a_start_is_calibrated_as_calib_does_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same images and scales; broken ones are replaced and listed, too few are an error, chance is warned of."""
    (tmp_path / "data").mkdir()
    project = make_project(tmp_path / "data", train=40, val=30)
    first = np.random.default_rng(42).permutation(40)[:8].tolist()
    break_images(project.folder, "train", first[:3])
    skip = ("--on-bad-image", "skip")
    small = ("--num-calib-batch", 2, "--calib-batchsz", 4, "--wprec", 4, "--aprec", 4, *skip)
    assert run(calib, *project.options, *small, "--calib-output-path", tmp_path / "calib") == 0
    assert run(qat, *project.options, *QUICK, *skip, "--output", tmp_path / "run") == 0
    ours = torch.load(tmp_path / "run" / "start" / "vit_calib.pth", weights_only=True)
    theirs = torch.load(tmp_path / "calib" / "vit_calib.pth", weights_only=True)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    listed = [row["image"] for row in result(tmp_path / "calib")["bad_images"]]
    assert set(listed) <= {row["image"] for row in result(tmp_path / "run")["bad_images"]}
    argv = [str(a) for a in (*project.options, *QUICK, *skip, "--output", tmp_path / "prepared")]
    options = train.complete(parse(TrainOptions, argv, "qat.py"), SILENT)
    with train.run_folder(options) as folder:
        train.prepare(options, folder, train.device_of(options), train.config_of(options), Stopwatch(), SILENT)
    assert [name for name, _ in read_bad_images(tmp_path / "prepared")] == listed, "those of calibration alone"
    assert len(listed) >= 3

    others = [i for i in range(40) if i not in first[:3]]
    break_images(project.folder, "train", [*first[:3], *others[:30]])
    capsys.readouterr()
    assert run(qat, *project.options, *QUICK, *skip, "--output", tmp_path / "few") == 2
    assert (
        "2 batches of 4 asked for, the readable images make 1; 33 broken ones were skipped" in capsys.readouterr().err
    )


def test_a_start_at_chance_level_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(tmp_path, train=40, val=30)
    lines = [line.split("\t") for line in (tmp_path / "train_map.txt").read_text().splitlines()]
    (tmp_path / "train_map.txt").write_text("".join(f"{n}\t{(int(label) + 1) % 7}\n" for n, label in lines))
    assert run(qat, *project.options, *QUICK, "--num-epochs", 1, "--output", tmp_path / "run") == 0
    assert "not above chance level" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["best", "elsewhere"])
def test_a_split_seed_that_contradicts_the_checkpoint_is_refused_wherever_it_lies(
    place: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a search with split seed 3 leaves it; without a given seed, its halves are taken."""
    best = tmp_path / "search" / "best"
    options = ("--pretrained_dir", best / "vit_calib.pth", "--data-path", project.folder, "--num-epochs", "1")
    options = (*options, "--batch-size", 8, "--no-dashboard")
    assert run(calib, *project.options, "--num-calib-batch", 2, "--calib-output-path", best) == 0
    sidecar = json.loads((best / "vit_calib.json").read_text())
    sidecar["calibration"]["split_seed"] = 3
    sidecar["sidecar_fingerprint"] = sidecar_fingerprint(sidecar)
    (best / "vit_calib.json").write_text(json.dumps(sidecar))
    fingerprint = result(best)["data_fingerprint"]
    val = open_split(str(project.folder), "val", 7)
    splits = make_splits("train", open_split(str(project.folder), "train", 7), val, 3)
    run_json = {**RUN_DESCRIPTION, "splits": splits.to_dict(), "data_fingerprint": fingerprint}
    run_json["options"] = {**run_json["options"], "split_seed": 3}
    (tmp_path / "search" / "run.json").write_text(json.dumps(run_json))
    if place == "elsewhere":
        (tmp_path / "search").rename(tmp_path / "other")
        (tmp_path / "other" / "best").rename(tmp_path / "moved")
        options = ("--pretrained_dir", tmp_path / "moved" / "vit_calib.pth", *options[2:])
    assert run(qat, *options, "--split-seed", 4, "--output", tmp_path / "a") == 2
    assert "--split-seed: 4 given, but" in capsys.readouterr().err
    for name, given in (("b", ()), ("c", ("--split-seed", 3))):
        assert run(qat, *options, *given, "--output", tmp_path / name) == 0
        values = json.loads((tmp_path / name / "run.json").read_text())
        assert values["options"]["split_seed"] == 3
        assert values["splits"]["report"] == splits.report.tolist()


def test_decode_threads_do_nothing_where_ray_data_reads(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(calib, *project.options, "--num-calib-batch", 2, "--calib-output-path", tmp_path) == 0
    options = ("--pretrained_dir", tmp_path / "vit_calib.pth", "--data-path", project.folder, "--batch-size", 8)
    assert run(qat, *options, "--num-workers", 2, "--decode-threads", 4, "--output", tmp_path / "o") == 2
    assert "--decode-threads: 4 given, but several workers (--num-workers)" in capsys.readouterr().err


def test_a_batch_size_that_is_overridden_is_said(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(qat, *project.options, *QUICK, "--global-batch-size", 10, "--output", tmp_path / "o") == 0
    assert "--batch-size 8 does nothing: --global-batch-size 10 says how many" in capsys.readouterr().err
    assert result(tmp_path / "o")["config"]["global_batch"] == 10
