"""Files that version 0.2.0 wrote in format 2 (tests/data/format2; model and images are those of format1): they load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import DATA
from vitq_ray.calibration.planner import Look, Planner
from vitq_ray.commands.options import TrainOptions, TuneOptions
from vitq_ray.commands.resume import stored_run, with_stored
from vitq_ray.commands.screen import SILENT
from vitq_ray.commands.train import train
from vitq_ray.commands.tune import open_folder, tune
from vitq_ray.commands.tune_job import FREE_OPTIONS, TuneJob, prepare
from vitq_ray.commands.tune_looks import read_statistics
from vitq_ray.measure.racing import Race
from vitq_ray.run.folder import RunFolder
from vitq_ray.run.results import SEARCH
from vitq_ray.search.contest import Contest, Listeners, race_rules
from vitq_ray.search.space import SearchSpace


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder with model and images in it, which the process then stands in: all paths are relative."""
    folder = tmp_path / "old"
    shutil.copytree(DATA / "format2", folder)
    for name in ("vit.npz", "train.zip", "val.zip", "train_map.txt", "val_map.txt"):
        shutil.copy(DATA / "format1" / name, folder)
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_finished_search_is_recognised(old: Path) -> None:
    """Its space file is no longer there, and is not needed."""
    before = files(old / "search")
    result = tune(TuneOptions.of({"resume": "search"}))
    assert result.winner.label == "ft2 percentile 99 n=1 w8a6"
    assert files(old / "search") == before


def test_a_finished_training_is_recognised(old: Path) -> None:
    before = files(old / "qat")
    assert train(TrainOptions.of({"resume": "qat"})).best_epoch == 0
    assert files(old / "qat") == before


def job_of(folder: str) -> TuneJob:
    stored = stored_run(folder, SEARCH)
    options = with_stored(TuneOptions.of({"resume": folder}), stored["options"], FREE_OPTIONS)
    return prepare(options, SILENT, SearchSpace.from_dict(stored["search_space"], "run.json"))


def contest_of(job: TuneJob, folder: RunFolder) -> Contest:
    options = job.options
    rules = race_rules(30, options.chunk_images, options.batch_size, options.alpha, options.tie_margin, "top1")
    planner = Planner(job.model, {(): Look({}, read_statistics(job, folder), None)})
    return Contest(planner, job.proposals(), Race(rules), folder, Listeners())


def test_a_killed_search_goes_on(old: Path) -> None:
    """Its log has half of the chunks; what is appended proves itself."""
    outcome = json.loads((old / "search" / "result.json").read_text())
    (old / "search" / "result.json").unlink()
    with open_folder(job := job_of("search"), SILENT) as folder:
        whole = contest_of(job, folder)
        assert whole.next() is None
        assert whole.race.leader() == outcome["winner"]["name"]
        assert {n: c.noise for n, c in whole.candidates.items()} == pytest.approx(
            {n: c["predicted_noise"] for n, c in outcome["candidates"].items()}
        )
    log = old / "search" / "trials.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert b'"resumed"' in lines[-1]
    assert b'"check"' in lines[-1]
    log.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-2][:20])
    with open_folder(job, SILENT) as folder:
        half = contest_of(job, folder)
        assert half.next() is not None
        assert set(half.candidates) == set(whole.candidates)
