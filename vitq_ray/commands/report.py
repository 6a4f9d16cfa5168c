"""Draw what a run found as one page, from its folder alone: also of one that was killed, or is still at work.

run folder ──► page/page ──► report.html        with `table`: candidates.csv, candidates.parquet
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line
from vitq_ray.commands.declare import Flag, Options
from vitq_ray.commands.options import (
    CalibrateOptions,
    EvaluateOptions,
    ExportOptions,
    ReportOptions,
    SensitivityOptions,
    TrainOptions,
    TuneOptions,
)
from vitq_ray.commands.screen import SILENT, Screen
from vitq_ray.engines.targets import TARGETS
from vitq_ray.run.candidate_table import write_candidates
from vitq_ray.run.folder import RUN, RunFolder
from vitq_ray.run.report_parts import checkpoints, tolerant
from vitq_ray.run.report_search import read_search
from vitq_ray.run.results import CALIBRATION, EVALUATION, EXPORT, RESULT, SEARCH, SENSITIVITY, TRAINING, read_result
from vitq_ray.run.site_table import read_sites

_OPTIONS: Mapping[str, type[Options]] = {
    SEARCH: TuneOptions,
    TRAINING: TrainOptions,
    CALIBRATION: CalibrateOptions,
    EVALUATION: EvaluateOptions,
    EXPORT: ExportOptions,
    SENSITIVITY: SensitivityOptions,
}
_PLACES = ("output", "calib_output_path", "resume")  # of this run: another one has its own


@dataclass(frozen=True)
class ReportResult:
    """What `report` wrote.

    Attributes:
        page: path of report.html.
        tables: candidates.csv and candidates.parquet, where they were asked for.
    """

    page: Path
    tables: tuple[Path, ...]


def report(options: ReportOptions, screen: Screen = SILENT) -> ReportResult:
    """Write the page, and with `table` the tables, into the run's folder.

    Raises InputError where there is no run, or its files are damaged.
    """
    if options.run is None:
        raise InputError(f"{options.name_of('run')}: needed, the folder of a run")
    folder = Path(options.run)
    script = script_of_folder(folder)
    if options.table and script != SEARCH:
        raise InputError(f"{options.name_of('table')}: {folder} is no search ({script}), which has candidates")
    try:
        tables = _write_tables(folder, screen) if options.table else ()
        page = draw(folder, script)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror}") from None
    screen.say(f"wrote {', '.join(str(path) for path in (page, *tables))}")
    return ReportResult(page, tables)


def report_at_end(folder: Path, script: str, screen: Screen) -> None:
    """The page of a run that has just finished. Whatever goes wrong is a warning: the run itself is done."""
    try:
        screen.say(f"drew {draw(folder, script)}")
    except Exception as error:
        screen.warn(f"{folder}: its report could not be drawn ({type(error).__name__}: {one_line(error)})")


def draw(folder: Path, script: str) -> Path:
    """Write report.html of a run of a script. Returns its path."""
    from vitq_ray.page.page import REPORT, page_of, write_page  # matplotlib: slow to load, and at the end only

    if script not in _OPTIONS:
        raise InputError(f"{folder}: holds a run of {script!r}; expected one of {', '.join(_OPTIONS)}")
    write_page(page_of(folder, script, list(_commands(folder, script))), folder / REPORT)
    return folder / REPORT


def script_of_folder(folder: Path) -> str:
    """Which script has written a folder. InputError where none has."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected that of a run")
    if (folder / RUN).is_file():
        return str(_described(folder).get("script", SEARCH))
    if (folder / RESULT).is_file():
        return str(read_result(folder)["script"])
    raise InputError(f"{folder}: has neither {RUN} nor {RESULT}; expected the folder of a run")


def _described(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / RUN).read_bytes())
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{folder / RUN}: truncated or damaged; expected what a run writes")
    return values


def _write_tables(folder: Path, screen: Screen) -> tuple[Path, Path]:
    search, notes = read_search(folder), list[str]()
    table = tolerant(partial(read_sites, folder), notes)
    for note in notes:
        screen.warn(note)
    return write_candidates(search, search.forecasts if table is None else table.forecasts)


# Commands of the page -------------------------------------------------------------------------------------------------


def _commands(folder: Path, script: str) -> Iterator[tuple[str, str]]:
    """(what for, command line) that reproduce a run, and go on from it."""
    home, is_run = str(folder.absolute()), (folder / RUN).is_file()
    options = RunFolder(folder, script).read_run()["options"] if is_run else read_result(folder)["options"]
    yield "Do it again", _line(script, _given(_OPTIONS[script], options))
    finished = (folder / RESULT).is_file()
    if is_run and not finished:
        yield "Go on with it", _line(script, ["--resume", home])
    if is_run and finished and (mode := _mode(read_result(folder))) in TARGETS:
        yield "Export it", _line(EXPORT, ["--run", home, "--target", mode])
    if script == SEARCH and finished:
        yield from _training(folder, options)
        yield "Every candidate as a table", _line("report", [home, "--table"])


def _mode(result: Mapping[str, Any]) -> str:
    mode: str = result.get("winner", result)["setting"]["mode"]
    return mode


def _training(folder: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    calibrated = [path for path in checkpoints(folder) if path.stem.endswith("_calib")]
    source, data = options.get("pretrained_dir"), options.get("data_path")
    if calibrated and source and data:
        given = ["--pretrained_dir", str(calibrated[0].absolute()), "--data-path", data, "--teacher", source]
        output = f"{folder.absolute()}-qat"
        yield (
            "Train the winner",
            _line(TRAINING, [*given, "--model_type", options.get("model_type", "auto"), "--output", output]),
        )


def _line(script: str, arguments: list[str]) -> str:
    return shlex.join(["python", f"scripts/{script}.py", *arguments])


def _given(kind: type[Options], options: Mapping[str, Any]) -> list[str]:
    """Arguments of the options that are not as they are by default."""
    arguments: list[str] = []
    for name, row in kind.declared().items():
        value = options.get(name)
        if name in _PLACES or value is None or value == row.default:
            continue
        if isinstance(row.kind, Flag):
            arguments.append(row.spelling if value else row.spelling.replace("--", "--no-", 1))
        elif getattr(row.kind, "repeated", False):
            arguments += [part for one in value for part in (row.spelling, str(one))]
        else:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            arguments += [row.spelling, text]
    return arguments
