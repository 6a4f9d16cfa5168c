from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from vitq_ray.config import InputError
from vitq_ray.evaluate import Evaluation
from vitq_ray.live import LiveTable, ranked
from vitq_ray.run_folder import RunFolder


def evaluation(correct: int, correct5: int, images: int = 10) -> Evaluation:
    ids = np.arange(images)
    return Evaluation(ids + 100, ids % 3, ids < correct, ids < correct5)


def test_events_are_appended_line_by_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.append("candidate", name="c0", setting={"mode": "ft1"})
    folder.append("result", name="c0", images=3)
    first, second = map(json.loads, (tmp_path / "run" / "trials.jsonl").read_text().splitlines())
    assert (first["event"], first["setting"]) == ("candidate", {"mode": "ft1"})
    assert (second["event"], second["images"]) == ("result", 3)
    assert second["time"] >= first["time"] > 1e9


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_run({"options": {}})
    with pytest.raises(InputError, match="already holds a run; choose another folder"):
        RunFolder(tmp_path)


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


def test_ranking_is_by_top1_then_top5_then_order() -> None:
    results = {"a": evaluation(3, 5), "b": evaluation(4, 4), "c": evaluation(3, 6), "d": evaluation(3, 5)}
    assert ranked(results) == ["b", "c", "a", "d"]


def shown(count: int) -> str:
    """The live table with `count` results, as text."""
    labels = {f"c{i}": f"setting number {i}" for i in range(count)}
    table = LiveTable(labels, evaluation(9, 10), Console(file=io.StringIO(), force_terminal=False))
    for i, name in enumerate(labels):
        table._results[name] = evaluation(i % 9, 10)
    console = Console(file=io.StringIO(), width=120)
    console.print(table.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_shows_all_of_a_few() -> None:
    text = shown(3)
    assert "3 of 3 distinct settings" in text
    assert [text.index(f"setting number {i}") for i in (2, 1, 0)] == sorted(
        text.index(f"setting number {i}") for i in range(3)
    )
    assert "90.00 % (59.58 to 98.21)" in text


def test_table_shows_best_and_worst_of_many() -> None:
    text = shown(40)
    assert "… 26 more …" in text, "13 best, the worst, and 26 between them"
    assert "setting number 36" in text, "the last of the worst"


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with LiveTable({"c0": "ft1 max"}, evaluation(9, 10), console) as table:
        table.add("c0", evaluation(5, 10), 1.25)
    assert capsys.readouterr().out == "[1/1] ft1 max: 50.00 % (23.66 to 76.34), 1.2 s\n"
