"""Images without labels, and what the float model tells of those with labels: every command."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import Project, load_script
from vitq_ray.commands.screen import result_table
from vitq_ray.measure.evaluation import Counts

ACCURACY = ("top1", "top1_correct", "top5", "top5_correct", "top1_interval95")


def run(script: str, *argv: object) -> int:
    return int(load_script(script).main([str(a) for a in argv]))


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "result.json").read_text())
    return values


def without_labels(project: Project) -> Project:
    for split in ("train", "val"):
        (project.folder / f"{split}_map.txt").unlink()
    return project


@pytest.fixture
def bare(project: Project) -> Project:
    """The project without its maps."""
    return without_labels(project)


@pytest.fixture
def photos(project: Project, tmp_path: Path) -> Path:
    """The images of val, in one folder and nothing else."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with zipfile.ZipFile(project.folder / "val.zip") as archive:
        for i, name in enumerate(archive.namelist()):
            (folder / f"{i:03d}.png").write_bytes(archive.read(name))
    return folder


SMALL = ("--num-calib-batch", 2, "--calib-batchsz", 4)


def test_kl_and_agreement_are_those_of_the_logits(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """calib --fidelity, and evaluate --reference of what it wrote, with labels: as NumPy says of saved logits."""
    assert run("calib", *project.options, *SMALL, "--aprec", 5, "--calib-output-path", tmp_path / "out") == 0
    assert "kl" not in read(tmp_path / "out"), "the float model is run where that was asked for"
    argv = (*project.options, *SMALL, "--aprec", 5, "--fidelity", "--calib-output-path", tmp_path / "both")
    assert run("calib", *argv) == 0
    calibrated = ("--pretrained_dir", tmp_path / "both" / "vit_calib.pth", "--data-path", project.folder)
    for name, argv in (("float", project.options), ("ours", (*calibrated, "--reference", project.checkpoint))):
        assert run("evaluate", *argv, "--output", tmp_path / name, "--save-logits", tmp_path / f"{name}.npz") == 0
    p, q = (
        torch.from_numpy(np.load(tmp_path / f"{name}.npz")["logits"]).double().softmax(1) for name in ("float", "ours")
    )
    kl = (p * (p / q).log()).sum(1)
    for name in ("both", "ours"):
        result = read(tmp_path / name)
        assert result["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
        assert result["agreed"] == (p.argmax(1) == q.argmax(1)).sum()
        assert result["top1_correct"] == read(tmp_path / "out")["top1_correct"]
    assert f"KL to float {kl.mean():.5f} nats, agreement " in capsys.readouterr().out


def test_calib_and_evaluate(bare: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert run("calib", *bare.options, *SMALL, "--calib-output-path", out) == 0
    calibrated = ("--pretrained_dir", out / "vit_calib.pth", "--data-path", bare.folder, "--output", again)
    assert run("evaluate", *calibrated, "--reference", bare.checkpoint) == 0
    printed = capsys.readouterr()
    assert "val.zip has no labels, since it has no map beside it" in printed.err
    assert "top-1" not in printed.out
    assert "agreement" in printed.out
    first, second = read(out), read(again)
    assert first["kl"] == pytest.approx(second["kl"], rel=1e-5)
    assert (first["images"], first["agreed"]) == (22, second["agreed"])
    for result in (first, second):
        assert not set(ACCURACY) & set(result)
    assert "top1" not in (out / "vit_calib.json").read_text()


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_of_images_is_searched(
    photos: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All three splits come from it; no word of accuracy, and the finished run is read again."""
    space = tmp_path / "space.py"
    space.write_text('SPACE = {"calibrator": ("max", "percentile"), "percentile": (50.0, 100.0), "num_batches": (2,)}')
    model = ("--pretrained_dir", project.checkpoint, "--data-path", photos)
    argv = (*model, "--search-space", space, "--calib-batchsz", 2, "--chunk-images", 3, "--no-dashboard")
    assert run("tune_calib", *argv, "--output", tmp_path / "run") == 0
    printed = capsys.readouterr()
    assert "photos has no labels, since it has no class folders" in printed.err
    assert "top-1" not in printed.out
    assert "KL, agreement" in printed.out
    result = read(tmp_path / "run")
    assert result["race"]["objective"] == "fidelity"
    assert result["winner"]["setting"]["calibrator"] != "percentile 50"
    parts = [result, *result["selection"].values(), result["float"]]
    assert not any(set(ACCURACY) & set(part) for part in parts)
    assert result["selection"][result["winner"]["name"]]["kl"] == min(
        part["kl"] for name, part in result["selection"].items() if name != "float"
    )
    table = pq.read_table(tmp_path / "run" / "correct.parquet").to_pydict()
    assert set(table) == {"candidate", "sample_id", "kl", "agree"}
    log = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert {"kl", "agree"} <= set(next(event for event in log if event["event"] == "chunk"))
    assert run("tune_calib", "--resume", tmp_path / "run") == 0
    assert "this search is finished" in capsys.readouterr().out


REFUSED: dict[str, tuple[str, tuple[object, ...], str]] = {
    "top-1": ("tune_calib", ("--objective", "top1"), "--objective: top1 given, but "),
    "a least accuracy": ("tune_calib", ("--min-float-top1", 0.5), "--min-float-top1: 0.5 given, but "),
    "a margin of top-1": ("tune_calib", ("--tie-margin", 0.1), "--tie-margin: 0.1 given, but there is no top-1"),
    "QAT in a search": ("tune_calib", ("--search-space", "qat"), "the QAT of"),
    "training": ("qat", (), "train.zip has no labels, since it has no map beside it; which training needs"),
    "the float model alone": ("evaluate", (), "expected a float checkpoint to compare with, --reference"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_labels_is_refused(
    case: str, bare: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, argv, message = REFUSED[case]
    small = () if script == "evaluate" else ("--calib-batchsz", 2)
    assert run(script, *bare.options, *small, *argv, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_reference_that_does_not_fit_is_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("calib", *project.options, *SMALL, "--calib-output-path", tmp_path) == 0
    argv = ("--output", tmp_path / "again", "--reference", tmp_path / "vit_calib.pth")
    assert run("evaluate", *project.options, *argv) == 2
    assert "vit_calib.pth is a calibrated checkpoint; expected a float one" in capsys.readouterr().err


def test_the_table_of_results_has_what_there_is() -> None:
    labelled = Counts(10, {"top1_correct": 9})
    both = Counts(10, {"top1_correct": 8, "kl_total": 0.125, "agreed": 7})
    bare = Counts(10, {"kl_total": 0.125, "agreed": 7})
    text = result_table([("float", labelled, labelled, ""), ("winner", both, None, "ft1")])
    assert text.splitlines() == [
        "selection   images      top-1 (95 % interval)      KL, agreement",
        "float           10   90.00 % (59.58 to 98.21)",
        "winner          10   80.00 % (49.02 to 94.33)   0.01250, 70.00 %",
        "",
        "report      images      top-1 (95 % interval)",
        "float           10   90.00 % (59.58 to 98.21)",
        "",
        "winner: ft1",
    ]
    assert "top-1" not in result_table([("float", Counts(10, {}), None, ""), ("winner", bare, bare, "ft1")])
