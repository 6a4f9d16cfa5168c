"""Accuracy against time, and against the share of work that is done in integers: of an exported file, of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitq_ray.page.figures import MARKERS, SERIES, Chart, drawing, plain_numbers

Variant = tuple[str, float, Sequence[float], float]  # name, top-1, its interval, x


def latency_charts(verification: Mapping[str, Any] | None) -> list[Chart]:
    """What verification.json has the numbers for."""
    variants = {n: v for n, v in (verification or {}).get("variants", {}).items() if "top1_interval95" in v}
    charts = []
    latency = [row for row in (verification or {}).get("latency") or () if row["variant"] in variants]
    for batch in sorted({row["batch"] for row in latency}):
        rows = [_variant(row["variant"], variants, row["ms_per_image"]) for row in latency if row["batch"] == batch]
        charts.append(_chart(f"Accuracy and latency, batch {batch}", rows, "milliseconds an image", log=True))
    shares = [_variant(n, variants, 100 * v["integer_share"]) for n, v in variants.items() if "integer_share" in v]
    if shares:
        shares += [_variant("float", variants, 0.0)] if "float" in variants else []
        charts.append(_chart("Accuracy and INT8 work", shares, "share of multiply-accumulates in integers, %"))
    return charts


_SELECTION = "On the selection images."


def search_latency_charts(result: Mapping[str, Any] | None) -> list[Chart]:
    """Of a search that left parts of its winner in float, or measured latency: accuracy on the selection images."""
    selection = {n: row for n, row in (result or {}).get("selection", {}).items() if "top1_interval95" in row}
    charts = []
    latency = [row for row in (result or {}).get("latency", ()) if row["candidate"] in selection]
    for batch in sorted({row["batch"] for row in latency}):
        rows = [_candidate(row, selection) for row in latency if row["batch"] == batch]
        charts.append(
            _chart(f"Accuracy and latency, batch {batch}", rows, "milliseconds an image", log=True, caption=_SELECTION)
        )
    sets = [row for row in (result or {}).get("float_sets", ()) if "top1_interval95" in row["selection"]]
    shares = [
        (f"{row['name']}, {row['by']}", row["selection"]["top1"], row["selection"]["top1_interval95"], share)
        for row in sets
        for share in [100 * row["integer_share"]]
    ]
    if shares:
        label = "share of multiply-accumulates in integers, %"
        charts.append(_chart("Accuracy and INT8 work", shares, label, caption=_SELECTION))
    return charts


def _candidate(row: Mapping[str, Any], selection: Mapping[str, Any]) -> Variant:
    name, top1, interval, ms = _variant(row["candidate"], selection, row["ms_per_image"])
    return f"{name} in {row['runtime']}" if row.get("runtime") else name, top1, interval, ms


def _variant(name: str, variants: Mapping[str, Any], x: float) -> Variant:
    return name, variants[name]["top1"], variants[name]["top1_interval95"], x


def _chart(
    title: str,
    rows: Sequence[Variant],
    label: str,
    log: bool = False,
    caption: str = "Measured when the file was exported and verified.",
) -> Chart:
    with drawing(title) as made:
        for index, (name, top1, (low, high), x) in enumerate(rows):
            spread = [[100 * (top1 - low)], [100 * (high - top1)]]
            style: dict[str, Any] = {
                "fmt": MARKERS[index % len(MARKERS)],
                "color": SERIES[index % len(SERIES)],
                "label": name,
            }
            made.axes.errorbar([x], [100 * top1], spread, elinewidth=1, markersize=6, **style)
        if log:
            made.axes.set_xscale("log")
            plain_numbers(made.axes.xaxis)
        made.axes.set_xlabel(label)
        made.axes.set_ylabel("top-1, % (95 % interval)")
        made.figure.legend(loc="outside lower center", ncols=2)
    told = "; ".join(f"{name}: {100 * top1:.2f} % at {x:.3g}" for name, top1, _, x in rows)
    return Chart(title, made.svg, f"{title}. {told}, {label}.", caption)
