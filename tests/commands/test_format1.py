"""Files that version 0.1.0 wrote before files carried format numbers (tests/data/format1): they load, and runs go on.

The folder holds a checkpoint, images, two calibrated checkpoints, a finished search, a finished training, and the
logits that the code of then gave for every calibrated or trained checkpoint on all of val.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import DATA, load_script
from vitq_ray.commands.tune_qat import save_starts
from vitq_ray.measure.racing import OBJECTIVES
from vitq_ray.models.checkpoint import load_calibrated

CHECKPOINTS = ("calib/vit_calib", "calib-mse/vit_calib", "search/best/vit_calib", "qat/vit_qat")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, which the process then stands in: all paths in those files are relative."""
    folder = tmp_path / "old"
    shutil.copytree(DATA / "format1", folder)
    monkeypatch.chdir(folder)
    return folder


def run(script: str, *argv: object) -> int:
    return int(load_script(script).main([str(a) for a in argv]))


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def counts_of(values: dict[str, Any]) -> list[int]:
    return [values[key] for key in ("images", "top1_correct", "top5_correct")]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_old_checkpoints_give_the_logits_of_then(name: str, old: Path) -> None:
    logits = old / "now.npz"
    argv = ("--pretrained_dir", f"{name}.pth", "--data-path", ".", "--output", "again", "--save-logits", logits)
    assert run("evaluate", *argv) == 0
    now, then = np.load(logits)["logits"], np.load("logits.npz")[name.replace("/", ".")]
    # Another processor may round a value that sits between two integers to the other one; that image then differs.
    difference = np.abs(now - then).max(axis=1)
    assert (difference > 1e-4).sum() <= 3
    assert (now.argmax(axis=1) == then.argmax(axis=1)).sum() >= 59


@pytest.mark.parametrize("folder", ["calib", "calib-mse"])
def test_old_checkpoints_have_the_counts_of_their_result(folder: str, old: Path) -> None:
    assert run("evaluate", "--pretrained_dir", f"{folder}/vit_calib.pth", "--data-path", ".", "--output", "again") == 0
    assert counts_of(read(old / "again" / "result.json")) == counts_of(read(old / folder / "result.json"))


def test_an_old_training_is_as_good_as_its_result_says(old: Path) -> None:
    assert run("evaluate", "--pretrained_dir", "qat/vit_qat.pth", "--data-path", ".", "--output", "again") == 0
    assert counts_of(read(old / "again" / "result.json")) == counts_of(read(old / "qat" / "result.json")["qat"]["val"])


def test_an_old_finished_search_is_recognised(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (old / "search").iterdir() if path.is_file()}
    assert run("tune_calib", "--resume", "search") == 0
    assert "this search is finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (old / "search").iterdir() if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_old_killed_search_comes_to_the_same_end(old: Path) -> None:
    """Killed in the middle of writing a line, with 80 of 144 chunks known."""
    search = old / "search"
    whole, outcome = (search / "trials.jsonl").read_bytes(), read(search / "result.json")
    chunks = [line for line in whole.splitlines(keepends=True) if b'"chunk"' in line]
    kept = whole[: whole.index(chunks[80]) + len(chunks[80]) // 2]
    (search / "trials.jsonl").write_bytes(kept)
    for name in ("result.json", "correct.parquet"):
        (search / name).unlink()
    shutil.rmtree(search / "best")
    assert run("tune_calib", "--resume", "search") == 0
    again = read(search / "result.json")
    assert counts_of(again) == counts_of(outcome)
    assert again["winner"]["name"] == outcome["winner"]["name"]
    assert {n: c["outcome"] for n, c in again["candidates"].items()} == {
        n: c["outcome"] for n, c in outcome["candidates"].items()
    }
    for name, values in outcome["selection"].items():
        assert counts_of(again["selection"][name]) == counts_of(values), name
    assert (search / "trials.jsonl").read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    old_keys = np.load("logits.npz")["search.best.vit_calib"]
    argv = ("--pretrained_dir", "search/best/vit_calib.pth", "--data-path", ".", "--save-logits", "now.npz")
    assert run("evaluate", *argv, "--output", "again") == 0
    assert (np.abs(np.load("now.npz")["logits"] - old_keys).max(axis=1) > 1e-4).sum() <= 3


def test_an_old_finished_training_is_recognised(old: Path) -> None:
    folder = old / "qat"
    files = ("state.pt", "steps.jsonl", "epochs.jsonl", "judgement.json", "best-1.pt")
    before, outcome = [(folder / name).read_bytes() for name in files], read(folder / "result.json")
    assert run("qat", "--resume", "qat") == 0
    assert [(folder / name).read_bytes() for name in files] == before
    again = read(folder / "result.json")
    for key in ("images", "top1_correct", "float", "ptq", "qat", "epochs", "best_epoch"):
        assert again[key] == outcome[key], key
    assert not (folder / "teacher_logits.npy").exists()


@pytest.mark.parametrize("name", ["search", "qat"])
def test_an_old_run_with_other_options_is_refused(name: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, option, value = {"search": ("tune_calib", "--alpha", 0.1), "qat": ("qat", "--qat-lr", 0.5)}[name]
    assert run(script, "--resume", name, option, value) == 2
    assert option.strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


def test_no_path_of_a_machine_is_in_them() -> None:
    files = list((DATA / "format1").rglob("*.json"))
    assert len(files) > 10
    for path in files:
        assert '"/' not in path.read_text(), path


def test_starts_of_an_old_training_are_kept(old: Path) -> None:
    """The states of trainings name their start by its fingerprint: a search that goes on must not write it anew."""
    home, start = old / "search" / "qat" / "starts", load_calibrated("search/best/vit_calib.pth")
    home.mkdir(parents=True)
    for ending in ("pth", "json"):
        shutil.copy(f"search/best/vit_calib.{ending}", home / f"c000_calib.{ending}")
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    race = SimpleNamespace(names=("c000",), mean=lambda name: 1.0, objective=OBJECTIVES["top1"])
    candidate = SimpleNamespace(setting=start.sidecar.setting, plan=start.plan)
    contest: Any = SimpleNamespace(race=race, outcome=lambda: {"c000": "best"}, candidates={"c000": candidate})
    job: Any = SimpleNamespace(model=start.loaded.model)
    assert save_starts(job, home, contest, 3) == {"c000": str((home / "c000_calib.pth").absolute())}
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
