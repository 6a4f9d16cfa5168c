"""candidates.csv and candidates.parquet: every candidate of a search with every field of its setting, to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from vitq_ray.base.files import atomic_file
from vitq_ray.measure.metrics import METRICS, total_of
from vitq_ray.run.report_search import RaceEntry, SearchRun

CSV, PARQUET = "candidates.csv", "candidates.parquet"


def candidate_rows(search: SearchRun, forecasts: str) -> pa.Table:
    """One row a candidate: its name, all fields of its setting, how it ended, and every metric, summed and in the mean.

    Lists of rules and techniques are texts, with `; ` between them, as in a search space.
    """
    rows = [_row(entry, forecasts) for entry in search.entries]
    schema = pa.schema([(name, kind) for name, kind in _kinds(search, forecasts).items()])
    return pa.Table.from_pylist(rows, schema=schema)


def _kinds(search: SearchRun, forecasts: str) -> dict[str, pa.DataType]:
    numbers = ("num_batches", "batch_size", "weight_bits", "act_bits")
    fields = list(search.entries[0].setting.to_dict()) if search.entries else []
    kinds = {"name": pa.string(), **{name: pa.int64() if name in numbers else pa.string() for name in fields}}
    kinds |= {"parameter": pa.float64(), "outcome": pa.string(), "same_as": pa.string(), "images": pa.int64()}
    for metric in METRICS.values():
        kinds |= {metric.total: pa.int64() if metric.dtype is bool else pa.float64(), metric.mean: pa.float64()}
    kinds |= {forecasts: pa.float64(), "verdict": pa.string(), "against": pa.string()}
    return kinds | {"wins": pa.int64(), "losses": pa.int64(), "evidence": pa.float64(), "seconds": pa.float64()}


def _row(entry: RaceEntry, forecasts: str) -> dict[str, Any]:
    setting = {name: "; ".join(v) if isinstance(v, list) else v for name, v in entry.setting.to_dict().items()}
    values = entry.setting.calibrator.values
    measured: dict[str, Any] = {}
    for name, metric in METRICS.items():
        if name in entry.results and entry.images:
            total = total_of(entry.results[name])
            measured |= {metric.total: total, metric.mean: total / entry.images}
    return {
        "name": entry.name,
        **setting,
        "calibrator": entry.setting.calibrator.name,
        "parameter": values[0] if values else None,
        "outcome": entry.outcome,
        "same_as": entry.same_as,
        "images": entry.images,
        **measured,
        forecasts: entry.forecast,
        **{name: (entry.decision or {}).get(name) for name in ("verdict", "against", "wins", "losses", "evidence")},
        "seconds": entry.seconds,
    }


def write_candidates(search: SearchRun, forecasts: str) -> tuple[Path, Path]:
    """Both files, atomically, in the folder of the search. OSError where they cannot be written."""
    table, paths = candidate_rows(search, forecasts), (search.path / CSV, search.path / PARQUET)
    with atomic_file(paths[0]) as stream:
        pyarrow.csv.write_csv(table, stream)
    with atomic_file(paths[1]) as stream:
        pq.write_table(table, stream, compression="zstd")
    return paths
