"""The folder of a search or a training: what survives it, readable months later without the code at hand.

run.json          all options, fingerprints, versions, splits
statistics.npz    the histograms
trials.jsonl      one line per event, appended and synced: the record of truth that survives a kill
optuna-journal.log   trials.jsonl of a search as Optuna and its dashboard read it, made of it (`search.optuna_journal`)
correct.parquet   what every image came to with each candidate: classified correctly, …
sites.npz         what every candidate does at every site, and what is forecast to be lost there (`site_table`)
images.parquet    what float model and winner say of every report image (`image_table`)
scales.json       of what was trained: amax before and after (`site_table`)
result.json       the outcome
report.html       all of it, drawn
best/             the winner: setting.json, calibrated checkpoint and sidecar; where it has corrections,
                  without_corrections/ has the checkpoint without them
qat/              of a search that trains: a folder for every training run
bad_images.jsonl  with `--on-bad-image skip`: what was skipped; training runs have one of their own
.lock             while a process works in the folder: which one

Runs of searches and trainings are begun and resumed by one rule. A search is resumed by replaying trials.jsonl (`log`),
whose first line says which format it was begun in; without one that is format 1, and candidates that a later version
added say theirs. Its events: `float` (results of the float model), `engine` (what runs
candidates from here on: each start has its own), `candidate` (name, setting, predicted noise, key of its plan),
`chunk` (results of a candidate on images `start` … of the race's order; every metric of `measure.metrics` packed, in
base64), `decision`, `effect` (KL of one part of the winner alone), `float_set` (results of the winner with some of it
in float), `resumed`, `winner`.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitq_ray.base.config import InputError
from vitq_ray.base.files import append_whole, atomic_file, output_folder, remove_temporary
from vitq_ray.base.formats import FORMATS
from vitq_ray.base.records import Schema, checked, read_sealed, require_whole, write_sealed
from vitq_ray.calibration.statistics import CalibrationStatistics
from vitq_ray.measure.evaluation import Evaluation
from vitq_ray.run.lock import LOCK, Lock
from vitq_ray.run.log import Log
from vitq_ray.run.paths import absolute_paths, stored_paths
from vitq_ray.run.results import (
    RESULT,
    SEARCH,
    SENSITIVITY,
    TRAINING,
    read_result,
    versions,
    write_result,
)

RUN = "run.json"
TUNE_FOLDER, TRAIN_FOLDER = ".tune", ".train"  # what Ray writes for itself; stays where a run was killed
WITHOUT_CORRECTIONS = "without_corrections"  # below best/: the winner's plan on weights that no correction has changed
# What may differ between a run and its continuation, beside the options that a script names. The start of a training is
# compared by its fingerprint, with the state of the training.
_NOT_COMPARED = ("format", "script", "versions", "options", "start", "paths", "id", "space_sha256")
_RELATIVE_TO_RUN = "relative to this folder"
_STATISTICS_KNOWN_SINCE = 3
_KINDS = {SEARCH: "search", TRAINING: "training", SENSITIVITY: "scan"}
_HALVES: Schema = {"selection": [int], "report": [int]}
SCHEMAS: dict[str, Schema] = {
    SEARCH: {
        "options": {"split_seed": int, "calib_batchsz": int},
        "search_space": {"name": str, "choices": dict, "qat": (dict, type(None))},
        "splits": {**_HALVES, "calibration": {"split": str, "sample_ids": [int]}},
        "weights_fingerprint": str,
        "data_fingerprint": str,
        "geometry": dict,
    },
    TRAINING: {"options": dict, "config": dict, "splits": _HALVES, "start": dict, "data_fingerprint": str},
}


class RunFolder:
    """The files of one run of a script: made by `create`, or found by `resume`, both for one process at a time.

    A context manager: afterwards another process may work in it, and a new run in which nothing ran is gone.
    """

    def __init__(self, path: Path, script: str = SEARCH) -> None:
        self.path = path
        self.script = script
        self._lock: Lock | None = None
        self._log: Log | None = None
        self._is_new = self._made_folder = False

    @staticmethod
    def create(path: Path | None, script: str, option: str = "folder of the run") -> RunFolder:
        """A new run, for None in a new folder under `runs/`.

        Raises:
            InputError: where the folder holds a run or results already, another process is at work in it, or it cannot
                be written to.
        """
        made = path is None or not path.exists()
        folder = RunFolder(new_folder(script, option) if path is None else output_folder(str(path), option), script)
        folder.take()
        for name, what in ((RUN, "a run; resume it, or choose"), (RESULT, f"results ({RESULT}); choose")):
            if (folder.path / name).exists():
                folder._give_back()
                raise InputError(f"{folder.path}: already holds {what} another folder for the output")
        folder._is_new, folder._made_folder = True, made
        return folder

    @staticmethod
    def find(path: Path, script: str) -> RunFolder:
        """A run that was begun, to be read.

        Raises:
            InputError: where there is none, or one of another script or of a newer version.
        """
        if not (path / RUN).is_file():
            raise InputError(f"{path}: has no {RUN}; expected the folder of a run of {script}")
        folder = RunFolder(path, script)
        found = folder.read_run()["script"]
        if found != script:
            raise InputError(f"{path}: holds a run of {found}, expected one of {script}")
        return folder

    @staticmethod
    def resume(path: Path, script: str) -> RunFolder:
        """A run that was begun, to go on with; InputError as `find`.

        Half a line at the end of its log is cut off; half-written files and what Ray had written for itself are gone.
        """
        folder = RunFolder.find(path, script)
        if not folder.finished:
            folder.take()
            folder.log.cut_half_line()
            for own in (path, folder.best, folder.best / WITHOUT_CORRECTIONS, *path.glob("qat/*")):
                remove_temporary(own, is_own=True)
            folder._remove_rays_files()
        return folder

    def take(self) -> None:
        """Work in the folder, and nobody else does. InputError where another process does."""
        if self._lock is not None:
            return
        try:
            self._lock = Lock(self.path)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written to: {error.strerror}") from None

    def _remove_rays_files(self) -> None:
        for name in (TUNE_FOLDER, TRAIN_FOLDER):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _give_back(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._remove_rays_files()  # a Ray that was stopped may have written to the last
        if self._is_new and not self.has_work:
            (self.path / RUN).unlink(missing_ok=True)
        self._give_back()
        if self._made_folder:
            with suppress(OSError):  # of a folder with anything in it
                self.path.rmdir()

    @property
    def has_work(self) -> bool:
        """Something was computed: there is more in the folder than what was asked for."""
        return self.path.is_dir() and any(path.name not in (RUN, LOCK) for path in self.path.iterdir())

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def finished(self) -> bool:
        """The run has come to its result. A result.json of another script or run is none."""
        if not (self.path / RESULT).is_file():
            return False
        result = self.read_result()
        return result["script"] == self.script and result.get("run") == self.read_run().get("id")

    @property
    def statistics(self) -> Path:
        return self.path / "statistics.npz"

    @property
    def log(self) -> Log:
        if self._log is None:
            run = self.read_run().get("id") if (self.path / RUN).is_file() else None
            self._log = Log(self.path / "trials.jsonl", run)
        return self._log

    def write_run(self, description: Mapping[str, Any]) -> None:
        """run.json: everything that decides the outcome, and which version of which script began the run."""
        head = {"format": FORMATS["run"], "script": self.script, "id": uuid.uuid4().hex, "versions": versions()}
        options = stored_paths(description.get("options", {}), self.path)
        write_sealed(self.path / RUN, {**head, "paths": _RELATIVE_TO_RUN, **description, "options": options})

    def read_run(self) -> dict[str, Any]:
        """run.json with absolute paths, and with `format` and `script` also of searches of format 1. InputError where
        it is not whole."""
        values = {"script": SEARCH, **read_sealed(self.path / RUN, "run", {"options": dict})}
        if values["script"] == self.script:
            require_whole(self.path / RUN, "run", values, SCHEMAS.get(self.script, {}))
        beginning = self.path if values.get("paths") == _RELATIVE_TO_RUN else Path()  # earlier: working directory
        return {**values, "options": absolute_paths(values["options"], beginning)}

    def require_same(self, description: Mapping[str, Any], free_options: Collection[str] = ()) -> str | None:
        """Compare a run that goes on with what it was begun as; what differs in versions, for a warning, or None.

        `free_options` may differ: they decide where and how fast, not what. Options that an earlier version did not
        have are not compared.

        Raises:
            InputError: naming the first difference.
        """
        stored, now = self.read_run(), dict(json.loads(json.dumps(description)))
        options = {name: value for name, value in stored["options"].items() if name not in free_options}
        older = stored["format"] < FORMATS["run"]
        given = absolute_paths(now["options"])
        new = {n: v for n, v in given.items() if n not in free_options and (n in options or not older)}
        then = {"options": options, **_compared(stored)}
        if (difference := first_difference(then, {"options": new, **_compared(now)})) is not None:
            kind = _KINDS.get(self.script, "run")
            raise InputError(f"{self.path}: this is another {kind}: {difference}")
        return first_difference(stored.get("versions", {}), now.get("versions", versions()))

    def write_statistics(self, statistics: CalibrationStatistics, of: Mapping[str, str]) -> None:
        """statistics.npz; `of` says what they are statistics of."""
        with atomic_file(self.statistics) as stream:
            stream.write(statistics.to_bytes(of))

    def read_statistics(self, of: Mapping[str, str]) -> CalibrationStatistics:
        """InputError where they are damaged, or of something else; earlier versions did not write what they are of."""
        data = checked(self.statistics, "statistics", self.statistics.read_bytes)
        wanted = of if self.read_run()["format"] >= _STATISTICS_KNOWN_SINCE else None
        return CalibrationStatistics.from_bytes(data, str(self.statistics), wanted)

    def append(self, event: str, **values: Any) -> None:
        """As `Log.append`."""
        self.log.append(event, **values)

    def events(self) -> list[dict[str, Any]]:
        """As `Log.events`."""
        return self.log.events()

    def write_correct(self, evaluations: Mapping[str, Evaluation]) -> None:
        """correct.parquet: one row per candidate and image, sorted by candidate as given; a column for every metric,
        null where a candidate lacks it."""
        tables = [_table(name, evaluation) for name, evaluation in evaluations.items()]
        with atomic_file(self.path / "correct.parquet") as stream:
            pq.write_table(pa.concat_tables(tables, promote_options="default"), stream, compression="zstd")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """result.json, which names this run."""
        write_result(self.path, {**result, "run": self.read_run().get("id")})

    def read_result(self) -> dict[str, Any]:
        """As `results.read_result`."""
        return read_result(self.path)


def _compared(description: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in description.items() if key not in _NOT_COMPARED}
    if isinstance(splits := found.get("splits"), Mapping):  # which images, not how they were found
        found["splits"] = {key: value for key, value in splits.items() if key != "from"}
    return found


def _table(name: str, evaluation: Evaluation) -> pa.Table:
    indices = pa.array(np.zeros(evaluation.images, np.int32))
    return pa.table(
        {
            "candidate": pa.DictionaryArray.from_arrays(indices, [name]).cast(pa.string()),
            "sample_id": evaluation.sample_ids,
            **evaluation.results,
        }
    )


def run_around(path: Path) -> Path | None:
    """The folder of a run that `path` is or lies in; None where it lies in none."""
    for folder in (path, *path.parents):
        with suppress(OSError, ValueError):
            values = json.loads((folder / RUN).read_bytes())
            if isinstance(values, dict) and "options" in values:
                return folder
    return None


def new_folder(script: str, option: str) -> Path:
    """Makes `runs/<script>-<date>-<time>`, for one of several that begin in the same second with a number behind it."""
    name = time.strftime(f"{script}-%Y%m%d-%H%M%S")
    output_folder("runs", option)
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            path.mkdir()
            break
    return path


def first_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """`name: x there, y now` of the first entry that differs, nested names joined by dots; None where all agree."""
    for key in dict.fromkeys((*stored, *now)):
        then, new = stored.get(key), now.get(key)
        if isinstance(then, Mapping) and isinstance(new, Mapping):
            if (inner := first_difference(then, new)) is not None:
                return f"{key}.{inner}"
        elif then != new:
            return f"{key}: {_short(then)} there, {_short(new)} now"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def record_bad_images(folder: Path, bad_images: list[tuple[str, str]]) -> None:
    """Move what was found broken into bad_images.jsonl; lines of several ranks may alternate."""
    rows = dict(bad_images)
    bad_images.clear()
    if rows:  # a line feed first: the last line may be half a line
        lines = "".join("\n" + json.dumps([name, reason]) for name, reason in rows.items()) + "\n"
        append_whole(folder / "bad_images.jsonl", lines.encode(), sync=False)


def read_bad_images(folder: Path) -> list[tuple[str, str]]:
    """(address, reason) of every broken image a run has met, each once; half a line, after a kill, does not count."""
    path = folder / "bad_images.jsonl"
    found: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError):
            name, reason = json.loads(line)
            found[str(name)] = str(reason)
    return list(found.items())
