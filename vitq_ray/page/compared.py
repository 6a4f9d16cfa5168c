"""Candidates beside the winner: differences on the images that both have seen, and where the forecast sees a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from vitq_ray.measure.evaluation import wilson_interval
from vitq_ray.measure.paired import Interval, accuracy_difference, mean_ratio
from vitq_ray.page.factors import fields_of
from vitq_ray.quant.sites import SITES, local_name
from vitq_ray.run.report_search import OUTCOME_ORDER, RaceEntry, SearchRun
from vitq_ray.run.site_table import SiteTable

_FAMILY_OF = {site.name: site.family for site in SITES}
FAMILIES = {  # names of families of sites, for people
    "input": "inputs of linear layers",
    "weight": "weights",
    "aftergemm": "outputs of linear layers",
    "matmul": "q, k and v",
    "probabilities": "attention probabilities",
    "softmax_input": "inputs of softmax",
    "layernorm_input": "inputs of LayerNorm",
    "local": "branches before they are added",
    "residual": "residual stream",
}


@dataclass(frozen=True)
class Compared:
    """A candidate beside the leader.

    Attributes:
        top1: its own accuracy with the 95 % interval; None without labels, or before any image was evaluated.
        difference: top-1 less the leader's, a fraction, on the images that both have seen; None of the leader itself.
        ratio: mean KL over the leader's, there.
    """

    entry: RaceEntry
    top1: Interval | None
    difference: Interval | None
    ratio: Interval | None


def compare_all(search: SearchRun) -> list[Compared]:
    """Every candidate, the best outcome first, then by what the race is about, on images that the leader saw, too."""
    rows = [_compared(entry, search.leader) for entry in search.entries]
    judged = dict(zip((row.entry.name for row in rows), losses(search, rows), strict=True))
    return sorted(rows, key=lambda row: (OUTCOME_ORDER.index(row.entry.outcome), judged[row.entry.name]))


def _compared(entry: RaceEntry, leader: RaceEntry | None) -> Compared:
    top1 = None
    if "correct" in entry.results and entry.images:
        right = int(entry.results["correct"].sum())
        top1 = Interval(right / entry.images, *wilson_interval(right, entry.images))
    if leader is None or entry is leader or not entry.images:
        return Compared(entry, top1, None, None)
    n = min(entry.images, leader.images)
    found = {
        metric: (entry.results[metric][:n], leader.results[metric][:n])
        for metric in ("correct", "kl")
        if metric in entry.results and metric in leader.results
    }
    return Compared(
        entry,
        top1,
        accuracy_difference(*found["correct"]) if "correct" in found else None,
        mean_ratio(*found["kl"]) if "kl" in found else None,
    )


def losses(search: SearchRun, rows: list[Compared]) -> list[float]:
    """What settings are judged by, for an analysis of variance: ln of KL over the leader's, or points of top-1 lost."""
    if search.objective.metric == "kl":
        return [0.0 if row.ratio is None else math.log(max(row.ratio.value, 1e-12)) for row in rows]
    return [0.0 if row.difference is None else -100 * row.difference.value for row in rows]


# Why one lost ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """Why a candidate was beaten, as far as the forecast tells.

    Attributes:
        differs: fields in which its setting is another one than the leader's: (field, its value, the leader's).
        more: what is forecast to be lost beyond the leader's forecast, over all sites.
        families: {family: its part of `more`}, the largest first; parts can be negative.
        worst: (site, its part of `more`) of the site with the largest.
    """

    entry: RaceEntry
    differs: tuple[tuple[str, str, str], ...]
    more: float
    families: Mapping[str, float]
    worst: tuple[str, float]


def why_beaten(search: SearchRun, rows: Sequence[Compared], table: SiteTable | None) -> list[Reason]:
    """Of every beaten candidate whose sites are known, in the order of the rows."""
    leader = search.leader
    at = None if table is None or leader is None else table.row(leader.same_as or leader.name)
    if table is None or leader is None or at is None:
        return []
    reasons = []
    for entry in (compared.entry for compared in rows):
        row = table.row(entry.name)
        if entry.outcome == "beaten" and entry.same_as is None and row is not None:
            reasons.append(_reason(entry, leader, table, table.loss[row] - table.loss[at]))
    return reasons


def _reason(entry: RaceEntry, leader: RaceEntry, table: SiteTable, more: npt.NDArray[Any]) -> Reason:
    ours, others = fields_of(entry.setting), fields_of(leader.setting)
    families: dict[str, float] = {}
    for site, value in zip(table.sites, more.tolist(), strict=True):
        family = family_of(site)
        families[family] = families.get(family, 0.0) + value
    worst = int(more.argmax())
    return Reason(
        entry,
        tuple((name, ours[name], others[name]) for name in ours if ours[name] != others[name]),
        float(more.sum()),
        dict(sorted(families.items(), key=lambda row: -row[1])),
        (local_name(table.sites[worst]), float(more[worst])),
    )


def family_of(site: str) -> str:
    """The family of a site by its full name."""
    return _FAMILY_OF[local_name(site).partition(".")[2]]
