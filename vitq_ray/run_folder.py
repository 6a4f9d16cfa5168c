"""The folder of a search: what survives it, readable months later without the code at hand.

run.json          all options, fingerprints, versions, splits
statistics.npz    the histograms
trials.jsonl      one line per event, appended and synced: the record of truth that survives a kill
correct.parquet   which images each candidate classified correctly
result.json       the outcome
best/             the winner: setting.json, calibrated checkpoint and sidecar
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitq_ray.config import InputError
from vitq_ray.evaluate import Evaluation
from vitq_ray.files import atomic_file, write_json


class RunFolder:
    """Writes the files of one run; refuses a folder that already holds one."""

    def __init__(self, path: Path) -> None:
        if (path / "run.json").exists():
            raise InputError(f"{path}: already holds a run; choose another folder for --output")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    @property
    def best(self) -> Path:
        return self.path / "best"

    def write_run(self, description: Mapping[str, Any]) -> None:
        write_json(self.path / "run.json", description)

    def write_statistics(self, data: bytes) -> None:
        with atomic_file(self.path / "statistics.npz") as stream:
            stream.write(data)

    def append(self, event: str, **values: Any) -> None:
        """One line of trials.jsonl, on disk when this returns."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, allow_nan=False)
        with open(self.path / "trials.jsonl", "ab") as stream:
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def write_correct(self, evaluations: Mapping[str, Evaluation]) -> None:
        """correct.parquet: one row per candidate and image, sorted by candidate as given."""
        tables = [_table(name, evaluation) for name, evaluation in evaluations.items()]
        with atomic_file(self.path / "correct.parquet") as stream:
            pq.write_table(pa.concat_tables(tables), stream, compression="zstd")

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_json(self.path / "result.json", result)


def _table(name: str, evaluation: Evaluation) -> pa.Table:
    indices = pa.array(np.zeros(evaluation.images, np.int32))
    return pa.table(
        {
            "candidate": pa.DictionaryArray.from_arrays(indices, [name]).cast(pa.string()),
            "sample_id": evaluation.sample_ids,
            "correct": evaluation.correct,
            "correct5": evaluation.correct5,
        }
    )


def default_folder(script: str) -> Path:
    """`runs/<script>-<date>-<time>`: a new one for every run."""
    return Path("runs") / time.strftime(f"{script}-%Y%m%d-%H%M%S")
