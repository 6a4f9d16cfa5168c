"""The end of a search in 80 columns: a table of the best settings, a sketch of what percentile and calibrator do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitq_ray.calibration.setting import Setting
from vitq_ray.commands.screen import percent
from vitq_ray.measure.evaluation import Counts
from vitq_ray.measure.racing import Race
from vitq_ray.search.contest import Contest

WIDTH = 80
_HEIGHT = 10  # rows of the sketch
_ROWS = 10  # of the table
_MARKS, _ASCII_MARKS = "●○■□▲△◆◇", "ox#=^v*@"  # of the series, in order
_FRAME, _ASCII_FRAME = ("│", "└", "─"), ("|", "+", "-")
_ENDING, _ASCII_ENDING = "…", "~"
SYMBOLS = _MARKS + "".join(_FRAME) + _ENDING  # what is shown where a terminal can show it


# The table ----------------------------------------------------------------------------------------------------------


def table_text(contest: Contest, unicode: bool = True) -> str:
    """The best settings and how each ended, best first; no line is wider than 80 columns."""
    race, standing = contest.race, contest.outcome()
    names = sorted(race.names, key=lambda name: (_RANK[standing[name]], -race.objective.sign * paired(race, name)))
    counts = {name: Counts.summed(race.results(name)) for name in names}
    titles = [("images", 7), *((("top-1", 8),) if counts[names[0]].has_accuracy else ()), ("KL", 8), ("", 6)]
    label_width = WIDTH - 5 - sum(width + 2 for _, width in titles)
    lines = [" " * (5 + label_width) + "".join(f"  {title:>{width}}" for title, width in titles)]
    for name in names[:_ROWS]:
        label, means = contest.candidates[name].setting.label, counts[name].means
        cells = [f"{counts[name].images:,}", *([percent(means["top1"])] if "top1" in means else [])]
        cells += [f"{means['kl']:.5f}" if "kl" in means else "", standing[name]]
        ending = _ENDING if unicode else _ASCII_ENDING
        shown = label if len(label) <= label_width else label[: label_width - 1] + ending
        row = "".join(f"  {cell:>{width}}" for cell, (_, width) in zip(cells, titles, strict=True))
        lines.append(f"{name:<4} {shown:<{label_width}}{row}".rstrip())
    rest = [standing[name] for name in names[_ROWS:]]
    if rest:
        parts = [f"{rest.count(what)} {what}" for what in _RANK if what in rest]
        lines.append(f"and {len(rest)} more: {', '.join(parts)}")
    return "\n".join(line.rstrip() for line in lines)


_RANK = {"best": 0, "tied": 1, "behind": 2, "beaten": 3}


def paired(race: Race, name: str) -> float:
    """What candidates are ranked by, as it would be on the images of the best one: the images that both have seen say
    how far they are apart. By top-1 that is a difference, by KL a ratio."""
    best = race.leader()
    assert best is not None
    images = min(_images(race, name), _images(race, best))
    whole, there, own = race.mean(best), race.mean(best, images), race.mean(name, images)
    if race.objective.sign > 0 or not there > 0:
        return whole + own - there
    return whole * own / there


def _images(race: Race, name: str) -> int:
    return len(race.results(name)[race.objective.metric])


# The sketch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A value in a column of the sketch, in the symbol of its series."""

    column: str
    series: str
    value: float


def sketch_text(contest: Contest, unicode: bool = True) -> str | None:
    """Mean KL, or top-1, over percentiles and beside them the other calibrators; None where no percentile varies."""
    race = contest.race
    best: dict[tuple[str, str], float] = {}
    columns: dict[str, tuple[float, str]] = {}
    for name in race.names:
        setting = contest.candidates[name].setting
        column, value = setting.calibrator.short.removeprefix("percentile "), paired(race, name)
        columns[column] = _place(setting)
        key = column, _series(setting)
        if key not in best or (value - best[key]) * race.objective.sign > 0:
            best[key] = value
    if sum(place < math.inf for place, _ in columns.values()) < 2:
        return None
    ordered = sorted(columns, key=lambda column: columns[column])
    points = [Point(column, series, value) for (column, series), value in sorted(best.items())]
    by_kl = race.objective.metric == "kl"
    title = "mean KL to the float model, nats (log scale)" if by_kl else "top-1, %"
    points = points if by_kl else [Point(p.column, p.series, 100 * p.value) for p in points]
    return "\n".join((f"{title}, by percentile and calibrator", *draw(points, ordered, by_kl, unicode)))


def _place(setting: Setting) -> tuple[float, str]:
    """Percentiles in order, then the others."""
    calibrator = setting.calibrator
    return (calibrator.values[0], "") if calibrator.name == "percentile" else (math.inf, calibrator.short)


def _series(setting: Setting) -> str:
    return f"{setting.mode} w{setting.weight_bits}a{setting.act_bits}"


def draw(points: Sequence[Point], columns: Sequence[str], log: bool, unicode: bool) -> list[str]:
    """Points in rows of text, at most 80 wide: a scale at the left, columns and series named below."""
    symbols, (bar, corner, dash) = (_MARKS, _FRAME) if unicode else (_ASCII_MARKS, _ASCII_FRAME)
    log = log and all(point.value > 0 for point in points)
    series = list(dict.fromkeys(point.series for point in points))
    heights = {p: math.log(p.value) if log else p.value for p in points}
    low, high = min(heights.values()), max(heights.values())
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    values = [high - (high - low) * row / (_HEIGHT - 1) for row in range(_HEIGHT)]
    scale = [f"{math.exp(v) if log else v:.3g}" for v in values]
    margin = max(map(len, scale)) + 1
    step = max(min(len(series), len(symbols)) + 1, min(12, (WIDTH - margin - 2) // len(columns)))
    shown = columns[: (WIDTH - margin - 2) // step]
    rows = [[" "] * (step * len(shown)) for _ in range(_HEIGHT)]
    for point in points:
        if point.column in shown:
            x = shown.index(point.column) * step + series.index(point.series) % len(symbols) % step
            y = round((high - heights[point]) / (high - low) * (_HEIGHT - 1))
            rows[y][x] = symbols[series.index(point.series) % len(symbols)]
    lines = [f"{scale[y]:>{margin}}{bar} {''.join(row)}".rstrip() for y, row in enumerate(rows)]
    lines.append(" " * margin + corner + dash * (step * len(shown) + 1))
    lines += _names_below(shown, step, margin + 2)
    keys = [f"{symbols[i % len(symbols)]} {name}" for i, name in enumerate(series)]
    return [*lines, *_wrapped(keys, " " * (margin + 2))]


def _names_below(names: Sequence[str], step: int, indent: int) -> list[str]:
    """Names under their columns, in as many rows as keep them apart."""
    rows: list[str] = []
    for i, name in enumerate(names):
        start = min(indent + i * step, WIDTH - len(name))
        row = next((r for r, text in enumerate(rows) if len(text) < start or not text), len(rows))
        if row == len(rows):
            rows.append("")
        rows[row] = f"{rows[row]:<{start}}{name}"
    return rows


def _wrapped(words: Sequence[str], indent: str) -> list[str]:
    lines = [indent]
    for word in words:
        if len(lines[-1]) + len(word) + 3 > WIDTH and lines[-1] != indent:
            lines.append(indent)
        lines[-1] += ("" if lines[-1] == indent else "   ") + word
    return lines
