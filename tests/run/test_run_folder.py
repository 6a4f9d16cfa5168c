from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.conftest import DATA, ROOT, RUN_DESCRIPTION
from vitq_ray.base.config import InputError
from vitq_ray.commands.live_race import LiveRace
from vitq_ray.commands.screen import SILENT, Terminal
from vitq_ray.measure.evaluation import Evaluation
from vitq_ray.measure.racing import Race, RaceRules, chunks_left
from vitq_ray.run.folder import RunFolder, first_difference
from vitq_ray.run.results import (
    CALIBRATION,
    EVALUATION,
    SEARCH,
    TRAINING,
    read_result,
    result_of,
    script_of,
    write_result,
)


def evaluation(correct: int, correct5: int, images: int = 10) -> Evaluation:
    ids = np.arange(images)
    return Evaluation(ids + 100, ids % 3, {"correct": ids < correct, "correct5": ids < correct5})


def test_events_are_appended_line_by_line(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", SEARCH)
    folder.write_run(RUN_DESCRIPTION)
    folder.append("candidate", name="c0", setting={"mode": "ft1"}, predicted_noise=0.5, same_as=None)
    folder.append("result", name="c0", images=3)
    begun, first, second = map(json.loads, (tmp_path / "run" / "trials.jsonl").read_text().splitlines())
    assert len(begun.pop("check")) == 8
    run = folder.read_run()["id"]
    assert begun == {"event": "begun", "format": 4, "vitq_ray": metadata.version("vitq_ray"), "run": run}
    assert all(len(line.pop("check")) == 8 for line in (first, second))
    assert folder.events() == [first, second]
    assert (first["event"], first["setting"]) == ("candidate", {"mode": "ft1"})
    assert (second["event"], second["images"]) == ("result", 3)
    assert second["time"] >= first["time"] > 1e9


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, SEARCH) as folder:
        folder.write_run(RUN_DESCRIPTION)
        folder.append("resumed")
    with pytest.raises(InputError, match="already holds a run; resume it, or choose another folder for the output"):
        RunFolder.create(tmp_path, SEARCH)
    assert RunFolder.resume(tmp_path, SEARCH).read_run()["options"] == RUN_DESCRIPTION["options"]


def test_half_a_line_is_cut_off_and_a_bad_one_named(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, SEARCH) as begun:
        begun.write_run(RUN_DESCRIPTION)
        begun.append("winner", name="a")
    with open(begun.log.path, "ab") as stream:
        stream.write(b'{"event": "chu')
    folder = RunFolder.resume(tmp_path, SEARCH)
    assert [e["name"] for e in folder.events()] == ["a"]
    folder.append("winner", name="b")
    assert [e["name"] for e in folder.events()] == ["a", "b"]
    with open(folder.log.path, "ab") as stream:
        stream.write(b"nonsense\n")
    with pytest.raises(InputError, match=r"trials\.jsonl: line 4: not an event: b'nonsense'; cut the log off .* -n 3"):
        folder.events()


def test_the_first_difference_is_named() -> None:
    stored = {"a": 1, "b": {"c": [1, 2], "d": "x"}}
    assert first_difference(stored, {"a": 1, "b": {"c": [1, 2], "d": "x"}}) is None
    assert first_difference(stored, {"a": 1, "b": {"c": [1, 3], "d": "x"}}) == "b.c: [1, 2] there, [1, 3] now"
    assert first_difference(stored, {"a": 1, "b": {"c": [1, 2]}}) == "b.d: 'x' there, None now"
    assert first_difference(stored, {**stored, "e": 5}) == "e: None there, 5 now"


def test_correct_parquet(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_correct({"float": evaluation(4, 6), "c1": evaluation(2, 3)})
    table = pq.read_table(tmp_path / "correct.parquet").to_pydict()
    assert table["candidate"] == ["float"] * 10 + ["c1"] * 10
    assert table["sample_id"] == [*range(100, 110)] * 2
    assert table["correct"] == [True] * 4 + [False] * 6 + [True] * 2 + [False] * 8
    assert sum(table["correct5"]) == 9


def test_nan_never_gets_into_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).append("result", top1=float("nan"))
    assert not (tmp_path / "trials.jsonl").exists()


def raced(shares: list[float], images: int = 400) -> tuple[Race, dict[str, str]]:
    """A race of candidates that get a share of all images right, the first ones; the last has not begun."""
    race = Race(RaceRules(images, 100, tie_margin=0.01))
    names = [f"c{i}" for i in range(len(shares) + 1)]
    for name in names:
        race.enter(name)
    for name, share in zip(names, shares, strict=False):
        correct = np.arange(images) % 100 < 100 * share
        for start, end in chunks_left(race.rules, 0):
            if race.decision(name) is None:
                race.record(name, start, {"correct": correct[start:end]})
                race.judge()
    return race, {name: f"setting number {name[1:]}" for name in names}


def shown(shares: list[float]) -> str:
    """The live table of a race, as text."""
    race, labels = raced(shares)
    live = LiveRace(race, evaluation(9, 10), SILENT)
    for name, label in labels.items():
        live.enter(name, label)
    console = Console(file=io.StringIO(), width=130)
    console.print(live.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_shows_states_and_why() -> None:
    text = shown([0.9, 0.9, 0.5])
    assert "3 of 4 candidates decided" in text
    assert "90.00 % (59.58 to 98.21)" in text, "float"
    rows = {line.split("setting number ")[1][0]: line for line in text.splitlines() if "setting number" in line}
    assert list(rows) == ["0", "1", "3", "2"], "finished ones, those that wait, those stopped"
    assert "finished" in rows["0"]
    assert "waiting" in rows["3"]
    assert "beaten" in rows["2"]
    assert "0:40 against c0" in rows["2"]
    assert "100" in rows["2"]


def test_table_of_many_says_how_many_are_left_out() -> None:
    text = shown([0.9] * 40)
    assert "… 24 more …" in text
    assert text.count("setting number") == 17


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    race, labels = raced([0.9, 0.5])
    with LiveRace(race, evaluation(9, 10), Terminal("tune")) as live:
        for name, label in labels.items():
            live.enter(name, label)
        decision = race.decision("c1")
        assert decision is not None
        live.decided(decision)
    line = "[2/3] c1 setting number 1: top-1 50.00 % (40.38 to 59.62) of 100 images, beaten 0:40 against c0\n"
    assert capsys.readouterr().out == line


# Resuming, and whose files they are ---------------------------------------------------------------------------------

NEWER = {"format": 99, "versions": {"vitq_ray": "9.1"}}
REFUSED = r"written by vitq_ray 9\.1 in format 99; this version reads formats up to [45]"


PARTS = {part: {"images": 10, "top1_correct": 4} for part in ("selection", "report", "val")}
OWN: dict[str, dict[str, Any]] = {
    SEARCH: {"winner": {"setting": {}}, "candidates": {}},
    TRAINING: {"best_epoch": 0, "float": PARTS, "ptq": PARTS, "qat": PARTS},
}


def a_result(script: str) -> dict[str, object]:
    return result_of(
        script,
        evaluation(4, 6),
        options={"seed": 1},
        setting=None,
        weights_fingerprint="w",
        data_fingerprint="d",
        bad_images=[("a.jpg", "broken"), ("a.jpg", "broken")],
        seconds={"load": 0.5},
        **OWN.get(script, {}),
        own=[1, 2],
    )


def test_the_schema_of_a_result(tmp_path: Path) -> None:
    write_result(tmp_path, a_result(EVALUATION))
    found = read_result(tmp_path)
    assert (found["format"], found["script"], found["images"], found["top1_correct"]) == (4, "evaluate", 10, 4)
    assert found["bad_images"] == [{"image": "a.jpg", "reason": "broken"}]
    assert {"options", "setting", "weights_fingerprint", "data_fingerprint", "versions", "seconds"} <= set(found)
    assert found["own"] == [1, 2]
    assert found["versions"]["vitq_ray"] == metadata.version("vitq_ray")


@pytest.mark.parametrize(
    ("folder", "script"), [("search", SEARCH), ("qat", TRAINING), ("calib", CALIBRATION), ("calib-mse", CALIBRATION)]
)
def test_results_of_format_1_are_read(folder: str, script: str) -> None:
    found = read_result(DATA / "format1" / folder)
    assert (found["format"], found["script"]) == (1, script)


def test_an_old_evaluation_is_told_by_what_it_evaluated() -> None:
    assert script_of({"images": 3, "checkpoint": "vit.npz", "calibration": None}) == EVALUATION


@pytest.mark.parametrize(("mine", "other"), [(SEARCH, CALIBRATION), (SEARCH, TRAINING), (TRAINING, EVALUATION)])
def test_a_result_of_another_script_does_not_finish_a_run(mine: str, other: str, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, mine) as folder:
        folder.write_run(RUN_DESCRIPTION)
        write_result(tmp_path, a_result(other))
    assert not RunFolder.find(tmp_path, mine).finished
    write_result(tmp_path, a_result(mine))
    assert not RunFolder.find(tmp_path, mine).finished, "nor does that of another run"
    folder.write_result(a_result(mine))
    assert RunFolder.find(tmp_path, mine).finished


@pytest.mark.parametrize(("mine", "other"), [(SEARCH, TRAINING), (TRAINING, SEARCH)])
def test_a_folder_of_another_script_is_refused(mine: str, other: str, tmp_path: Path) -> None:
    RunFolder(tmp_path, other).write_run(RUN_DESCRIPTION)
    with pytest.raises(InputError, match=f"holds a run of {other}, expected one of {mine}"):
        RunFolder.resume(tmp_path, mine)
    old = RUN_DESCRIPTION if other == SEARCH else {**RUN_DESCRIPTION, "script": "qat"}
    (tmp_path / "run.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match=f"holds a run of {other}, expected one of {mine}"):
        RunFolder.resume(tmp_path, mine)  # as format 1 has it


def test_files_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(NEWER))
    (tmp_path / "result.json").write_text(json.dumps(NEWER))
    (tmp_path / "trials.jsonl").write_text('{"event": "begun", "format": 99, "vitq_ray": "9.1"}\n')
    folder = RunFolder(tmp_path)
    with pytest.raises(InputError, match=rf"run\.json: {REFUSED}"):
        RunFolder.resume(tmp_path, SEARCH)
    with pytest.raises(InputError, match=rf"result\.json: {REFUSED}"):
        folder.read_result()
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match=rf"trials\.jsonl: {REFUSED}"):
        folder.events()


def test_a_log_without_a_first_line_is_of_format_1_and_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log.path.write_text('{"event": "winner", "name": "c0", "time": 1.5}\n')
    folder.append("resumed")
    assert [event["event"] for event in folder.events()] == ["winner", "resumed"]


@pytest.mark.parametrize("script", [SEARCH, TRAINING])
def test_one_rule_of_resuming(script: str, tmp_path: Path) -> None:
    options = {"seed": 1, "workers": 2, "output": "a", "split_seed": 0, "calib_batchsz": 8}
    begun = {**RUN_DESCRIPTION, "options": options, "sizes": (1, 2)}
    folder = RunFolder.create(tmp_path, script)
    folder.write_run(begun)
    free = {"workers", "output"}

    def now(**changes: object) -> dict[str, object]:
        return {**begun, **changes}

    assert folder.require_same(now(options={**options, "workers": 3, "output": None}), free) is None
    what = {SEARCH: "search", TRAINING: "training"}[script]
    for changed, message in (
        (now(options={**options, "seed": 2}), "options.seed: 1 there, 2 now"),
        (now(options={**options, "new": 0}), "options.new: None there, 0 now"),
        (now(data_fingerprint="e"), "data_fingerprint: 'd' there, 'e' now"),
    ):
        with pytest.raises(InputError, match=f"this is another {what}: {message}"):
            folder.require_same(changed, free)
    assert folder.require_same(now(versions={"torch": "0"}), free) is not None, "said, not refused"


def test_options_that_an_earlier_version_did_not_have_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN_DESCRIPTION))
    folder, options = RunFolder.resume(tmp_path, SEARCH), RUN_DESCRIPTION["options"]
    folder.require_same({**RUN_DESCRIPTION, "options": {**options, "new": 0}})
    with pytest.raises(InputError, match=r"options\.split_seed: 0 there, 2 now"):
        folder.require_same({**RUN_DESCRIPTION, "options": {**options, "split_seed": 2, "new": 0}})


def test_what_ray_left_of_a_killed_run_is_gone(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", SEARCH) as folder:
        folder.write_run(RUN_DESCRIPTION)
        folder.append("resumed")
    for name in (".tune", ".train"):
        (tmp_path / "run" / name / "trial").mkdir(parents=True)
    with RunFolder.resume(tmp_path / "run", SEARCH) as folder:
        assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "run.json", "trials.jsonl"]
        (folder.path / ".train" / "trial").mkdir(parents=True)  # a stopped Ray is not gone at once
    assert sorted(path.name for path in folder.path.iterdir()) == ["run.json", "trials.jsonl"]


KILLED = """
import os, signal, sys
from pathlib import Path
from vitq_ray.base.files import atomic_file

for name in sys.argv[1:]:
    if os.fork() == 0:
        with atomic_file(Path(name)) as stream:
            stream.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
"""


def test_what_was_being_written_when_a_run_was_killed_is_gone(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", SEARCH) as folder:
        folder.write_run(RUN_DESCRIPTION)
        folder.append("resumed")
    of_user = tmp_path / "run" / ".of the user.tmp"
    of_user.touch()
    names = ("result.json", "best/vit_calib.pth", "qat/c000/state.pt")
    subprocess.run([sys.executable, "-c", KILLED, *names], cwd=folder.path, env={"PYTHONPATH": str(ROOT)}, check=True)
    left = [path for path in folder.path.rglob(".*") if path != of_user]
    assert sorted(path.relative_to(folder.path).parts[0][:5] for path in left) == [".resu", "best", "qat"]
    with RunFolder.resume(tmp_path / "run", SEARCH) as folder:
        assert sorted(path.name for path in folder.path.rglob(".*")) == [".lock", of_user.name]


def test_how_images_were_found_is_not_compared(tmp_path: Path) -> None:
    """A checkpoint that has left its search's `best/` says the same halves of val by its sidecar."""
    halves = RUN_DESCRIPTION["splits"]
    with RunFolder.create(tmp_path / "run", SEARCH) as folder:
        folder.write_run({**RUN_DESCRIPTION, "splits": {**halves, "from": "search"}})
        assert folder.require_same({**RUN_DESCRIPTION, "splits": {**halves, "from": "split seed 3"}}) is None
        with pytest.raises(InputError, match=r"splits\.report: \[1\] there, \[0\] now"):
            folder.require_same({**RUN_DESCRIPTION, "splits": {**halves, "report": [0], "from": "search"}})


def test_paths_are_stored_so_that_a_run_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "one" / "run"
    paths = {"data_path": "one/run/data", "pretrained_dir": "vit.npz", "teacher": "s3://b/x", "from_run": None}
    own = {**RUN_DESCRIPTION["options"], "seed": 1}
    with RunFolder.create(path, SEARCH) as begun:
        begun.write_run({**RUN_DESCRIPTION, "options": {**paths, **own}})
        begun.append("resumed")
    stored = json.loads((path / "run.json").read_text())
    assert stored["options"] == {
        "data_path": "data",
        "pretrained_dir": f"{tmp_path}/vit.npz",
        "teacher": "s3://b/x",
        "from_run": None,
        **own,
    }
    (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.chdir("/")
    folder = RunFolder.resume(tmp_path / "two" / "run", SEARCH)
    options = folder.read_run()["options"]
    assert options == {**stored["options"], "data_path": f"{tmp_path}/two/run/data"}
    assert folder.require_same({**RUN_DESCRIPTION, "options": options}) is None
    monkeypatch.chdir(tmp_path)
    assert folder.require_same({**RUN_DESCRIPTION, "options": {**options, "pretrained_dir": "./vit.npz"}}) is None
    with pytest.raises(InputError, match=r"options\.data_path: "):
        folder.require_same({**RUN_DESCRIPTION, "options": {**options, "data_path": "one/run/data"}})


def test_relative_paths_of_earlier_versions_begin_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    options = RUN_DESCRIPTION["options"]
    old = {**RUN_DESCRIPTION, "options": {**options, "data_path": "data"}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(old))
    assert RunFolder(tmp_path / "run").read_run()["options"] == {**options, "data_path": f"{tmp_path}/data"}
