"""Tables of the page as values: cells with texts, numbers to sort by, and where their marks stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vitq_ray.measure.paired import Interval
from vitq_ray.page.compared import FAMILIES, Compared, Reason
from vitq_ray.page.texts import nats, percent, percent_interval, signed_points, times
from vitq_ray.run.report_search import OUTCOME_ORDER, SearchRun

MOST_ROWS = 300  # of a table; candidates.csv has all
_MISSING = ""


@dataclass(frozen=True)
class Marks:
    """An interval as it is drawn in a cell, in percent of the cell's width; None where there is none."""

    left: float
    width: float
    dot: float


@dataclass(frozen=True)
class Cell:
    """A text, and what to sort it by: a number, else the text."""

    text: str
    value: float | None = None
    marks: Marks | None = None


@dataclass(frozen=True)
class Row:
    """Cells, and what the row is, for its style: an outcome."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Column names, which of them hold numbers, and rows.

    Attributes:
        drawn: the column with marks; None where there is none.
        zero, band: where `no difference` stands among the marks, and the span of all ties, in percent.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    drawn: int | None = None
    zero: float = 0.0
    band: tuple[float, float] = (0.0, 0.0)
    more: str = ""
    numbers: frozenset[int] = field(default=frozenset())


@dataclass(frozen=True)
class Scale:
    """From values to percent of a cell's width."""

    low: float
    high: float
    log: bool

    @staticmethod
    def of(intervals: Sequence[Interval], log: bool) -> Scale:
        """So that most intervals fit; what is far out is cut off."""
        neutral = 1.0 if log else 0.0
        low, high = min([neutral, *(i.low for i in intervals)]), max([neutral, *(i.high for i in intervals)])
        if log:
            return Scale(max(low, 0.1) / 1.1, min(high, 100.0) * 1.1, log)
        return Scale(max(low, -0.15) - 0.002, min(high, 0.05) + 0.002, log)

    def place(self, value: float) -> float:
        low, high, x = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return round(100 * min(1.0, max(0.0, (x - low) / (high - low))), 2)

    def marks(self, interval: Interval) -> Marks:
        left, right = self.place(interval.low), self.place(interval.high)
        return Marks(left, round(right - left, 2), self.place(interval.value))


def candidate_table(search: SearchRun, rows: Sequence[Compared], forecasts: str) -> Table:
    """Every candidate with its intervals; the drawn one is what the race is about."""
    by_kl = search.objective.metric == "kl"
    found = [interval for row in rows if (interval := row.ratio if by_kl else row.difference) is not None]
    scale = Scale.of(found, log=by_kl)
    ties = [i for row in rows if row.entry.outcome == "tied" and (i := row.ratio if by_kl else row.difference)]
    band = (
        scale.place(min([i.low for i in ties], default=float(by_kl))),
        scale.place(max([i.high for i in ties], default=float(by_kl))),
    )
    what = "KL over the winner's" if by_kl else "top-1 less the winner's, points"
    other = "top-1 less the winner's, points" if by_kl else "KL over the winner's"
    columns = (
        *("", "setting", "outcome", what, other, "top-1, %", "KL to float, nats", "agreement, %"),
        *("images", FORECAST_NAMES[forecasts]),
    )
    return Table(
        "candidates",
        columns,
        tuple(_candidate(row, scale, by_kl) for row in rows[:MOST_ROWS]),
        drawn=3,
        zero=scale.place(1.0 if by_kl else 0.0),
        band=(band[0], round(band[1] - band[0], 2)),
        more=f"The first {MOST_ROWS} of {len(rows):,} are shown." if len(rows) > MOST_ROWS else "",
        numbers=frozenset(range(3, len(columns))),
    )


FORECAST_NAMES = {"predicted_kl": "predicted KL, nats", "predicted_noise": "predicted noise"}


def _candidate(row: Compared, scale: Scale, by_kl: bool) -> Row:
    entry = row.entry
    ratio, difference = (
        _interval(row.ratio, times, 1.0, scale, by_kl),
        _interval(row.difference, signed_points, 0.0, scale, not by_kl),
    )
    kl, agreement = entry.mean("kl"), entry.mean("agree")
    same = f" (same plan as {entry.same_as})" if entry.same_as else ""
    cells = (
        Cell(entry.name),
        Cell(entry.setting.label + same),
        Cell(entry.outcome, OUTCOME_ORDER.index(entry.outcome)),
        *((ratio, difference) if by_kl else (difference, ratio)),
        Cell(_MISSING) if row.top1 is None else Cell(percent_interval(row.top1), row.top1.value),
        Cell(_MISSING) if kl is None else Cell(nats(kl), kl),
        Cell(_MISSING) if agreement is None else Cell(percent(agreement), agreement),
        Cell(f"{entry.images:,}", entry.images),
        Cell(f"{entry.forecast:.4g}", entry.forecast),
    )
    return Row(cells, entry.outcome)


def _interval(found: Interval | None, text: object, neutral: float, scale: Scale, drawn: bool) -> Cell:
    assert callable(text)
    if found is None:
        return Cell(_MISSING, neutral)
    return Cell(text(found), found.value, scale.marks(found) if drawn else None)


def reason_table(reasons: Sequence[Reason], forecasts: str) -> Table:
    """Why candidates were beaten, the nearest to the winner first."""
    rows = []
    for reason in reasons[:MOST_ROWS]:
        differs = "; ".join(f"{name} {value}, not {other}" for name, value, other in reason.differs)
        site, value = reason.worst
        cells = (
            Cell(reason.entry.name),
            Cell(differs or "nothing but its scales"),
            Cell(f"{reason.more:+.3g}".replace("-", "−"), reason.more),
            Cell(_explained(reason)),
            Cell(f"{site} ({value:+.2g})", value),
        )
        rows.append(Row(cells, "beaten"))
    columns = ("", "differs from the winner in", f"{FORECAST_NAMES[forecasts]}, beyond the winner's")
    return Table("reasons", (*columns, "comes from", "the site that adds most"), tuple(rows), numbers=frozenset({2}))


def _explained(reason: Reason) -> str:
    """The families that make up most of what is lost more: E.g. `weights 80 %, q, k and v 15 %`."""
    if reason.more <= 0:
        return "not seen by the forecast, which promised no more loss than the winner's"
    lost = sum(value for value in reason.families.values() if value > 0)  # others may lose less than the winner's
    parts, told = [], 0.0
    for family, value in reason.families.items():
        share = value / lost
        if share < 0.05 or told > 0.9:
            break
        parts.append(f"{FAMILIES[family]} {100 * share:.0f} %")
        told += share
    return ", ".join(parts)


def class_table(counts: Mapping[str, tuple[int, int, int, int]]) -> Table:
    """{class: (images, float right, quantized right, flipped)}, what lost most first."""
    ordered = sorted(counts.items(), key=lambda row: (row[1][2] - row[1][1], -row[1][3]))
    rows = [
        Row(
            (
                Cell(name),
                Cell(f"{images:,}", images),
                Cell(percent(right / images), right / images),
                Cell(percent(quantized / images), quantized / images),
                Cell(f"{quantized - right:+d}".replace("-", "−"), quantized - right),
                Cell(str(flipped), flipped),
            )
        )
        for name, (images, right, quantized, flipped) in ordered[:MOST_ROWS]
    ]
    columns = ("class", "images", "float top-1", "quantized top-1", "images won or lost", "flipped")
    more = f"The first {MOST_ROWS} of {len(counts):,} are shown." if len(counts) > MOST_ROWS else ""
    return Table("classes", columns, tuple(rows), more=more, numbers=frozenset(range(1, 6)))
