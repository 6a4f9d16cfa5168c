"""The folder of a search or a training: what survives it, readable months later without the code at hand.

run.json          all options, fingerprints, versions, splits
statistics.npz    the histograms
trials.jsonl      one line per event, appended and synced: the record of truth that survives a kill
correct.parquet   what every image came to with each candidate: classified correctly, …
result.json       the outcome
best/             the winner: setting.json, calibrated checkpoint and sidecar
qat/              of a search that trains: a folder for every training run
bad_images.jsonl  with `--on-bad-image skip`: what was skipped; training runs have one of their own

Runs of searches and trainings are begun and resumed by one rule. A search is resumed by replaying trials.jsonl, whose
first line says which format it was begun in; without one that is format 1, and candidates that a later version added
say theirs. Its events: `float` (results of the float model),
`candidate` (name, setting, predicted noise), `chunk` (results of a candidate on images `start` … of the race's order;
every metric of `measure.metrics` packed, in base64), `decision`, `resumed`, `winner`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitq_ray.base.config import InputError
from vitq_ray.base.files import atomic_file, output_folder, write_json
from vitq_ray.base.formats import FORMATS, require_format, stamp
from vitq_ray.measure.evaluation import Evaluation
from vitq_ray.run.paths import absolute_paths, stored_paths
from vitq_ray.run.results import (
    RESULT,
    SEARCH,
    TRAINING,
    read_own_json,
    read_result,
    versions,
    write_result,
)

# What may differ between a run and its continuation, beside the options that a script names. The start of a training is
# compared by its fingerprint, with the state of the training.
_NOT_COMPARED = ("format", "script", "versions", "options", "start", "paths")
_RELATIVE_TO_RUN = "relative to this folder"
_KINDS = {SEARCH: "search", TRAINING: "training"}


class RunFolder:
    """The files of one run of a script: made by `create`, or found by `resume`."""

    def __init__(self, path: Path, script: str = SEARCH) -> None:
        self.path = path
        self.script = script

    @staticmethod
    def create(path: Path, script: str) -> RunFolder:
        """A new run; InputError where the folder already holds one, or cannot be written to."""
        if (path / "run.json").exists():
            raise InputError(f"{path}: already holds a run; resume it, or choose another folder for the output")
        output_folder(str(path), "folder of the run")
        return RunFolder(path, script)

    @staticmethod
    def resume(path: Path, script: str) -> RunFolder:
        """A run that was begun. Half a line at the end of its log is cut off.

        Raises:
            InputError: where there is none, or one of another script or of a newer version.
        """
        if not (path / "run.json").is_file():
            raise InputError(f"{path}: has no run.json; expected the folder of a run of {script}")
        folder = RunFolder(path, script)
        found = folder.read_run()["script"]
        if found != script:
            raise InputError(f"{path}: holds a run of {found}, expected one of {script}")
        folder._cut_half_line()
        return folder

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def finished(self) -> bool:
        """The run has come to its result. A result.json that another script wrote into the folder is none."""
        return (self.path / RESULT).is_file() and self.read_result()["script"] == self.script

    @property
    def statistics(self) -> Path:
        return self.path / "statistics.npz"

    @property
    def log(self) -> Path:
        return self.path / "trials.jsonl"

    def write_run(self, description: Mapping[str, Any]) -> None:
        """run.json: everything that decides the outcome, and which version of which script began the run."""
        head = {"format": FORMATS["run"], "script": self.script, "versions": versions(), "paths": _RELATIVE_TO_RUN}
        options = stored_paths(description.get("options", {}), self.path)
        write_json(self.path / "run.json", {**head, **description, "options": options})

    def read_run(self) -> dict[str, Any]:
        """run.json with absolute paths, and with `format` and `script` also of searches of format 1. InputError as
        `read_own_json`."""
        values = {"script": SEARCH, **read_own_json(self.path / "run.json", "run")}
        beginning = self.path if values.get("paths") == _RELATIVE_TO_RUN else Path()  # earlier: working directory
        return {**values, "options": absolute_paths(values.get("options", {}), beginning)}

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

    def write_statistics(self, data: bytes) -> None:
        with atomic_file(self.statistics) as stream:
            stream.write(data)

    def append(self, event: str, **values: Any) -> None:
        """One line of trials.jsonl, on disk when this returns. The first one says which version began the log."""
        lines = [{"event": event, "time": round(time.time(), 3), **values}]
        if not self.log.exists() or not self.log.stat().st_size:
            lines.insert(0, {"event": "begun", **stamp("log")})
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with open(self.log, "ab") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All events so far, in order, without the first line. InputError where a newer version began the log."""
        if not self.log.exists():
            return []
        result = []
        for number, line in enumerate(self.log.read_bytes().splitlines(), start=1):
            try:
                result.append(dict(json.loads(line)))
            except ValueError:
                raise InputError(f"{self.log}: line {number}: not an event: {line[:80]!r}") from None
        if result and result[0]["event"] == "begun":
            require_format("log", str(self.log), result.pop(0))
        return result

    def _cut_half_line(self) -> None:
        if not self.log.exists():
            return
        data = self.log.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.log, whole)

    def write_correct(self, evaluations: Mapping[str, Evaluation]) -> None:
        """correct.parquet: one row per candidate and image, sorted by candidate as given; a column for every metric,
        null where a candidate lacks it."""
        tables = [_table(name, evaluation) for name, evaluation in evaluations.items()]
        with atomic_file(self.path / "correct.parquet") as stream:
            pq.write_table(pa.concat_tables(tables, promote_options="default"), stream, compression="zstd")

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_result(self.path, result)

    def read_result(self) -> dict[str, Any]:
        """As `results.read_result`."""
        return read_result(self.path)


def _compared(description: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in description.items() if key not in _NOT_COMPARED}


def _table(name: str, evaluation: Evaluation) -> pa.Table:
    indices = pa.array(np.zeros(evaluation.images, np.int32))
    return pa.table(
        {
            "candidate": pa.DictionaryArray.from_arrays(indices, [name]).cast(pa.string()),
            "sample_id": evaluation.sample_ids,
            **evaluation.results,
        }
    )


def default_folder(script: str) -> Path:
    """`runs/<script>-<date>-<time>`: a new one for every run."""
    return Path("runs") / time.strftime(f"{script}-%Y%m%d-%H%M%S")


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
    if rows:
        with open(folder / "bad_images.jsonl", "a") as stream:  # a line feed first: the last line may be half a line
            stream.write("".join("\n" + json.dumps([name, reason]) for name, reason in rows.items()) + "\n")


def read_bad_images(folder: Path) -> list[tuple[str, str]]:
    """(address, reason) of every broken image a run has met, each once; half a line, after a kill, does not count."""
    path = folder / "bad_images.jsonl"
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            name, reason = json.loads(line)
            found[name] = reason
    return list(found.items())
