"""The folder of a search: what survives it, readable months later without the code at hand.

run.json          all options, fingerprints, versions, splits
statistics.npz    the histograms
trials.jsonl      one line per event, appended and synced: the record of truth that survives a kill
correct.parquet   what every image came to with each candidate: classified correctly, …
result.json       the outcome
best/             the winner: setting.json, calibrated checkpoint and sidecar
qat/              of a search that trains: a folder for every training run
bad_images.jsonl  with `--on-bad-image skip`: what was skipped; training runs have one of their own

A search is resumed by replaying trials.jsonl. Its events: `float` (results of the float model), `candidate` (name,
setting, predicted noise), `chunk` (results of a candidate on images `start` … of the race's order; every metric of
`measure.metrics` packed, in base64), `decision`, `resumed`, `winner`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitq_ray.base.config import InputError
from vitq_ray.base.files import atomic_file, write_json
from vitq_ray.measure.evaluation import Evaluation


class RunFolder:
    """The files of one run: made by `create`, or found by `resume`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path) -> RunFolder:
        """A new run; InputError where the folder already holds one."""
        if (path / "run.json").exists():
            raise InputError(f"{path}: already holds a run; choose another folder for --output, or --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        return RunFolder(path)

    @staticmethod
    def resume(path: Path) -> RunFolder:
        """A run that was begun; InputError where there is none. Half a line at the end of its log is cut off."""
        if not (path / "run.json").is_file():
            raise InputError(f"--resume: {path} holds no run (no run.json); expected the folder of a search")
        folder = RunFolder(path)
        folder._cut_half_line()
        return folder

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def finished(self) -> bool:
        """The run has come to its result."""
        return (self.path / "result.json").is_file()

    @property
    def statistics(self) -> Path:
        return self.path / "statistics.npz"

    @property
    def log(self) -> Path:
        return self.path / "trials.jsonl"

    def write_run(self, description: Mapping[str, Any]) -> None:
        write_json(self.path / "run.json", description)

    def read_run(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "run.json").read_bytes()))
        except ValueError as error:
            raise InputError(f"{self.path / 'run.json'}: not JSON: {error}") from None

    def write_statistics(self, data: bytes) -> None:
        with atomic_file(self.statistics) as stream:
            stream.write(data)

    def append(self, event: str, **values: Any) -> None:
        """One line of trials.jsonl, on disk when this returns."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, allow_nan=False)
        with open(self.log, "ab") as stream:
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All events so far, in order."""
        if not self.log.exists():
            return []
        result = []
        for number, line in enumerate(self.log.read_bytes().splitlines(), start=1):
            try:
                result.append(dict(json.loads(line)))
            except ValueError:
                raise InputError(f"{self.log}: line {number}: not an event: {line[:80]!r}") from None
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
        write_json(self.path / "result.json", result)


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
