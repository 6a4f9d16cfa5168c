"""The command: report.py, vitq-ray report, vitq_ray.report, and the page that runs draw at their end."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import vitq_ray
from tests.conftest import Project, load_script
from tests.made_runs import MadeSearch, made_training
from vitq_ray.base.config import InputError
from vitq_ray.base.records import write_sealed
from vitq_ray.commands.main import main
from vitq_ray.commands.options import TuneOptions
from vitq_ray.commands.parser import parse
from vitq_ray.commands.report import _commands, _given, report_at_end
from vitq_ray.commands.screen import Screen
from vitq_ray.run.results import read_result

pytestmark = pytest.mark.draws


@pytest.fixture(autouse=True)
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("search_charts", "histogram_charts", "training_charts"):
        monkeypatch.setattr(f"vitq_ray.page.page.{name}", lambda *_: [])


def test_script_console_command_and_python_do_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = MadeSearch().write(tmp_path / "search")
    assert load_script("report").main([str(folder), "--table"]) == 0
    assert capsys.readouterr().out == (
        f"wrote {folder}/report.html, {folder}/candidates.csv, {folder}/candidates.parquet\n"
    )
    first = (folder / "report.html").read_text()
    assert main(["report", str(folder)]) == 0
    result = vitq_ray.report(run=folder)
    assert (result.page, result.tables) == (folder / "report.html", ())
    assert result.page.read_text() == first
    assert callable(vitq_ray.report), "also when pages were drawn"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "DIR: needed, the folder of a run"),
        (["{folder}/nothing"], "{folder}/nothing: no such folder; expected that of a run"),
        (["{folder}"], "{folder}: has neither run.json nor result.json; expected the folder of a run"),
        (["{folder}/t", "--table"], "--table: {folder}/t is no search (qat), which has candidates"),
        (["{folder}/broken"], "{folder}/broken/run.json: truncated or damaged; expected what a run writes"),
    ],
)
def test_what_is_no_run(argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_training(tmp_path / "t")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert main(["report", *(word.format(folder=tmp_path) for word in argv)]) == 2
    assert capsys.readouterr().err == f"error: {message.format(folder=tmp_path)}\n"


def test_a_log_that_was_changed_is_an_error(tmp_path: Path) -> None:
    folder = MadeSearch().write(tmp_path)
    text = (folder / "trials.jsonl").read_text()
    (folder / "trials.jsonl").write_text(text.replace('"images": 60', '"images": 61', 1))
    with pytest.raises(InputError, match=r"trials\.jsonl: line \d+: was changed"):
        vitq_ray.report(run=folder)


class Heard(Screen):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, message: str) -> None:
        self.warned.append(message)


def test_a_run_does_not_fail_with_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, heard = MadeSearch().write(tmp_path), Heard()
    report_at_end(folder, "tune_calib", heard)
    assert (heard.said, heard.warned) == ([f"drew {folder}/report.html"], [])

    def fail(*_: object) -> None:
        raise ZeroDivisionError("no\nluck")

    monkeypatch.setattr("vitq_ray.page.page.search_page", fail)
    monkeypatch.setattr("vitq_ray.page.page.PAGES", {"tune_calib": fail})
    report_at_end(folder, "tune_calib", heard)
    assert heard.warned == [f"{folder}: its report could not be drawn (ZeroDivisionError: no luck)"]


def test_a_calibration_draws_its_page(project: Project, tmp_path: Path) -> None:
    few = ["--num-calib-batch", "2", "--calib-batchsz", "4", "--calib-output-path", str(tmp_path / "c")]
    assert load_script("calib").main([*project.options, *few]) == 0
    html = (tmp_path / "c" / "report.html").read_text()
    assert "ft2 percentile 99.99 n=2 w8a8: " in html
    assert html.count('<td class="off">off</td>') == 2 * 7 - 2, "local, residual and layernorm_input, in two blocks"
    assert f"--data-path {project.folder}" in html


def test_commands_can_be_typed(tmp_path: Path) -> None:
    """What reproduces a run is read back as its options."""
    folder = MadeSearch().write(tmp_path / "a search")
    commands = dict(_commands(folder, "tune_calib"))
    words = shlex.split(commands["Do it again"])
    assert words[:2] == ["python", "scripts/tune_calib.py"]
    options = parse(TuneOptions, words[2:], "x")
    assert options.data_path == "/data/<b>x</b>"
    outlets = ("mlflow:sqlite:///a.db", "tensorboard")
    again = _given(TuneOptions, {"log_to": list(outlets), "latency": [1, 8], "dashboard": False})
    options = parse(TuneOptions, again, "x")
    assert (options.log_to, options.latency, options.dashboard) == (outlets, (1, 8), False)
    assert set(commands) == {"Do it again", "Every candidate as a table"}, "no runtime has the mode of the winner"
    result = read_result(folder)
    result["winner"]["setting"]["mode"] = "openvino"
    write_sealed(folder / "result.json", result)
    words = shlex.split(dict(_commands(folder, "tune_calib"))["Export it"])
    assert words[2:] == ["--run", str(folder), "--target", "openvino"]
    killed = MadeSearch(finished=False).write(tmp_path / "killed")
    assert list(dict(_commands(killed, "tune_calib"))) == ["Do it again", "Go on with it"]
