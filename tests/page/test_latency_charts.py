"""Accuracy against time and integer work, of a search."""

from __future__ import annotations

from typing import Any

from vitq_ray.page.latency_charts import search_latency_charts


def row(top1: float) -> dict[str, Any]:
    return {"top1": top1, "top1_interval95": [top1 - 0.02, top1 + 0.02]}


def test_of_a_search() -> None:
    latency = [
        {"candidate": name, "runtime": runtime, "batch": batch, "threads": 2, "ms_per_image": ms * batch}
        for name, runtime, ms in (("float", None, 9.0), ("c001", None, 5.0), ("c001", "ort", 3.0), ("f01", None, 6.0))
        for batch in (1, 8)
    ]
    sets = [
        {"name": "c001", "by": "all in integers", "integer_share": 1.0, "selection": row(0.8)},
        {"name": "f01", "by": "measured", "integer_share": 0.95, "selection": row(0.81)},
    ]
    selection = {"float": row(0.82), "c001": row(0.8), "f01": row(0.81)}
    charts = search_latency_charts({"selection": selection, "latency": latency, "float_sets": sets})
    assert [chart.title for chart in charts] == [
        "Accuracy and latency, batch 1",
        "Accuracy and latency, batch 8",
        "Accuracy and INT8 work",
    ]
    assert "c001: 80.00 % at 40" in charts[1].alt
    assert "c001 in ort: 80.00 % at 24" in charts[1].alt
    assert "f01, measured: 81.00 % at 95" in charts[2].alt


def test_of_searches_without() -> None:
    assert search_latency_charts(None) == []
    assert search_latency_charts({"selection": {"float": {"kl": 0.1}}}) == []  # without labels
