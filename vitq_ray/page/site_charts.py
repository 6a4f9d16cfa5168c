"""Figures of sites: what passed them, and where each calibrator would clip it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitq_ray.calibration.calibrators import Calibration
from vitq_ray.calibration.histogram import Histogram
from vitq_ray.calibration.setting import Setting
from vitq_ray.calibration.statistics import HISTOGRAM, CalibrationStatistics
from vitq_ray.page.figures import COLOURS, SERIES, Chart, drawing, plain_numbers
from vitq_ray.quant.sites import LAYER_PREFIX, SITES, WEIGHT, local_name
from vitq_ray.run.report_parts import SiteMap
from vitq_ray.run.report_search import SearchRun
from vitq_ray.run.site_table import SiteTable

MOST_SITES = 6
_BINS = 160  # that are drawn
_DASHES = ("-", "--", ":", "-.")
_MOST_MARKS = 12
_TENSOR_OF = {site.name: site.tensor for site in SITES if site.family != WEIGHT}


def histogram_charts(
    search: SearchRun, site_map: SiteMap, statistics: CalibrationStatistics | None, table: SiteTable | None
) -> list[Chart]:
    """Of the sites that lose most by the forecast, one a tensor."""
    if statistics is None or HISTOGRAM not in statistics.kinds or search.leader is None:
        return []
    batches = search.leader.setting.num_batches
    batches = batches if batches in statistics.snapshots else statistics.snapshots[-1]
    seen: Mapping[str, Histogram] = dict(zip(statistics.keys, statistics.after(batches, HISTOGRAM), strict=True))
    charts = []
    chosen = [(site, seen[tensor]) for site, tensor in _worst_sites(site_map) if tensor in seen]
    for site, histogram in [(site, found) for site, found in chosen if found.width > 0][:MOST_SITES]:
        marks = {**_marks(search, histogram), **_from_table(search, table, site)}
        charts.append(_histogram(site, site_map, histogram, marks, batches))
    return charts


def _worst_sites(site_map: SiteMap) -> list[tuple[str, str]]:
    """(site, its tensor), the largest forecast first, each tensor once; in the order of the model without forecasts."""
    loss = np.zeros(len(site_map.sites)) if site_map.loss is None else site_map.loss
    chosen: dict[str, str] = {}
    for index in np.argsort(-loss, kind="stable").tolist():
        site = site_map.sites[index]
        block, _, name = local_name(site).partition(".")
        if name in _TENSOR_OF and site_map.bits[index]:
            chosen.setdefault(f"{LAYER_PREFIX}{block}.{_TENSOR_OF[name]}", site)
    return [(site, tensor) for tensor, site in chosen.items()]


def _marks(search: SearchRun, histogram: Histogram) -> dict[str, float]:
    """{calibrator of the search: its amax}, of those that look at histograms."""
    assert search.leader is not None
    bits = search.leader.setting.act_bits
    calibrations: dict[str, Calibration] = {}
    for entry in search.entries:
        calibrations.setdefault(entry.setting.calibrator.short, entry.setting.calibrator)
    return {
        name: float(calibration.row.activation([histogram], calibration.values, bits)[0])
        for name, calibration in calibrations.items()
        if calibration.row.activation is not None
    }


def _from_table(search: SearchRun, table: SiteTable | None, site: str) -> dict[str, float]:
    """amax of a calibrator that looks at gradients, as the best candidate that has it was planned."""
    if table is None or search.leader is None:
        return {}
    for entry in search.entries:
        row, setting = table.row(entry.name), entry.setting
        if setting.calibrator.row.by_curves and row is not None and _alike(setting, search.leader.setting):
            return {setting.calibrator.short: float(table.amax[row, table.sites.index(site)])}
    return {}


def _alike(setting: Setting, other: Setting) -> bool:
    return (setting.mode, setting.act_bits, setting.transforms) == (other.mode, other.act_bits, other.transforms)


def _histogram(site: str, site_map: SiteMap, seen: Histogram, marks: Mapping[str, float], batches: int) -> Chart:
    name, own = local_name(site), float(site_map.amax[site_map.sites.index(site)])
    edges, counts = _coarse(seen)
    ordered = sorted(marks.items(), key=lambda row: row[1])[:_MOST_MARKS]
    with drawing(f"histogram {site}", height=3.2 + 0.1 * len(ordered)) as made:
        made.axes.stairs(counts, edges, fill=True, color=COLOURS["line"])
        for index, (label, amax) in enumerate(ordered):
            style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "linestyle": _DASHES[index % len(_DASHES)]}
            made.axes.axvline(amax, linewidth=1.3, label=f"{label}: {amax:.3g}", **style)
        made.axes.axvline(own, linewidth=2.5, color=COLOURS["green"], alpha=0.6, label=f"in the plan: {own:.3g}")
        made.axes.set_yscale("log")
        made.axes.set_ylim(bottom=0.5)
        plain_numbers(made.axes.yaxis)
        made.axes.set_xlim(0, max([edges[-1], own, *marks.values()]) * 1.03)
        made.axes.set_xlabel("|x|, in units of the tensor")
        made.axes.set_ylabel("values seen")
        made.figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    told = ", ".join(f"{label} {amax:.3g}" for label, amax in ordered)
    caption = f"{int(seen.counts.sum()):,} values of {batches} batches; the largest is {seen.max:.4g}."
    return Chart(name, made.svg, f"Histogram at {name} with amax of {told or 'no calibrator'}. {caption}", caption)


def _coarse(seen: Histogram) -> tuple[Sequence[float], Sequence[int]]:
    """Edges and counts of neighbouring bins added up."""
    last = int(np.flatnonzero(seen.counts)[-1]) + 1 if seen.counts.any() else len(seen.counts)
    size = -(-last // _BINS)
    padded = np.zeros(size * -(-last // size), np.int64)
    padded[:last] = seen.counts[:last]
    counts = padded.reshape(-1, size).sum(axis=1)
    return (np.arange(len(counts) + 1) * size * seen.width).tolist(), counts.tolist()
