"""Figures of a search: calibrators and percentiles, forecast against measurement, the race, what matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes

from vitq_ray.calibration.calibrators import PERCENTILE
from vitq_ray.page.compared import Compared, losses
from vitq_ray.page.factors import fields_of, importance
from vitq_ray.page.figures import COLOURS, MARKERS, OUTCOMES, SERIES, Chart, drawing, plain_numbers, points
from vitq_ray.run.report_search import RaceEntry, SearchRun

MOST_PANELS = 6  # of calibrators: one for each group of settings that differ in something else
_MOST_RUNNERS = 120  # bars of the race
FORECASTS = {"predicted_kl": "predicted KL, nats", "predicted_noise": "predicted noise over signal, summed over sites"}
Rows = Sequence[Compared]


def search_charts(search: SearchRun, rows: Rows, forecasts: str) -> list[Chart]:
    """All of them that the run has the numbers for."""
    measured = [row for row in rows if row.entry.images and row.entry.same_as is None]
    if len(measured) < 2:
        return []
    charts = [*calibrator_charts(search, rows, forecasts), forecast_chart(measured, forecasts), race_chart(search)]
    return [*charts, *importance_chart(search, [row for row in rows if row.entry.images])]


# Calibrators --------------------------------------------------------------------------------------------------------


def calibrator_charts(search: SearchRun, rows: Rows, forecasts: str) -> list[Chart]:
    """One panel for every mode, bits and so on, those with the best candidates first."""
    panels: dict[str, list[Compared]] = {}
    for row in rows:
        if row.entry.images:
            panels.setdefault(_panel(row.entry), []).append(row)
    chosen = [(title, members) for title, members in panels.items() if len({_x(m.entry) for m in members}) > 1]
    return [_calibrators(search, title, members, forecasts) for title, members in chosen[:MOST_PANELS]]


def _panel(entry: RaceEntry) -> str:
    fields = {k: v for k, v in fields_of(entry.setting).items() if k not in ("calibrator", "num_batches")}
    bits = f"w{fields.pop('weight_bits')}a{fields.pop('act_bits')}"
    own = [f"{name} {value}" for name, value in fields.items() if name != "mode" and value not in ("none", "max")]
    return ", ".join([f"{fields['mode']} {bits}", *own])


def _x(entry: RaceEntry) -> str:
    return entry.setting.calibrator.short


def _calibrators(search: SearchRun, title: str, members: Rows, forecasts: str) -> Chart:
    by_kl = search.objective.metric == "kl"
    places = _places([row.entry for row in members])
    series = sorted({row.entry.setting.num_batches for row in members})
    with drawing(f"calibrators {title}") as made:
        for index, batches in enumerate(series):
            mine = sorted(
                (r for r in members if r.entry.setting.num_batches == batches), key=lambda r: places[_x(r.entry)]
            )
            colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            shift = (index - (len(series) - 1) / 2) * 0.12
            _measured(made.axes, mine, places, shift, by_kl, colour, marker, f"{batches} batches")
            if by_kl:
                _predicted(made.axes, mine, places, shift, _factor(members, forecasts), colour)
        made.axes.set_xticks(list(places.values()), list(places), rotation=30, ha="right")
        made.axes.grid(visible=False, axis="x")
        made.axes.set_ylabel("mean KL to float, nats" if by_kl else "top-1 less the winner's, points")
        if by_kl:
            made.axes.set_yscale("log")
            plain_numbers(made.axes.yaxis)
        made.axes.legend()
    best = members[0].entry
    alt = (
        f"{title}: {len(members)} settings by calibrator and number of batches. The best of them is "
        f"{best.setting.label}, {best.outcome}."
    )
    return Chart(f"Calibrators: {title}", made.svg, alt, _caption(by_kl, forecasts))


def _caption(by_kl: bool, forecasts: str) -> str:
    if not by_kl:
        return "Points are measured, on the images that both have seen, with 95 % intervals of the difference."
    scaled = "" if forecasts == "predicted_kl" else ", which is noise over signal, scaled to fit"
    return f"Points are measured on the images seen, with 95 % intervals. Dashed: what was predicted{scaled}."


def _places(entries: Sequence[RaceEntry]) -> dict[str, float]:
    """{calibrator: where it stands}: percentiles by the nines they have, the others behind them."""
    names = dict.fromkeys(_x(entry) for entry in entries)
    calibrations = {_x(entry): entry.setting.calibrator for entry in entries}
    numbers = {name: c.values[0] for name, c in calibrations.items() if c.row.parameters == (PERCENTILE,)}
    nines = {name: -math.log10(max(100 - value, 1e-9)) for name, value in numbers.items()}
    ordered = sorted(nines, key=lambda name: nines[name]) + [name for name in names if name not in nines]
    return {name: float(place) for place, name in enumerate(ordered)}


def _measured(
    axes: Axes, rows: Rows, places: dict[str, float], shift: float, by_kl: bool, colour: str, marker: str, label: str
) -> None:
    drawn = []
    for row in rows:
        if (limits := _kl_limits(row.entry) if by_kl else _top1_limits(row)) is not None:
            drawn.append((places[_x(row.entry)] + shift, *limits))
    if drawn:
        x, y, low, high = np.array(drawn).T
        axes.errorbar(x, y, [y - low, high - y], fmt=marker, color=colour, markersize=5, elinewidth=1, label=label)


def _kl_limits(entry: RaceEntry) -> tuple[float, float, float] | None:
    """Mean KL and its 95 % interval, on a log scale."""
    values = np.asarray(entry.results.get("kl", ()), float)
    if not len(values) or not values.any():
        return None
    mean = float(values.mean())
    spread = math.exp(1.96 * float(values.std()) / math.sqrt(len(values)) / mean)
    return mean, mean / spread, mean * spread


def _top1_limits(row: Compared) -> tuple[float, float, float] | None:
    if row.difference is None:
        return (0.0, 0.0, 0.0) if row.top1 is not None else None
    return 100 * row.difference.value, 100 * row.difference.low, 100 * row.difference.high


def _factor(rows: Rows, forecasts: str) -> float:
    """What predicted noise is multiplied by to be drawn as a KL: as good a fit as one number can be."""
    if forecasts == "predicted_kl":
        return 1.0
    pairs = [(row.entry.forecast, row.entry.mean("kl") or 0) for row in rows]
    logs = [math.log(kl / noise) for noise, kl in pairs if noise > 0 and kl > 0]
    return math.exp(float(np.median(logs))) if logs else 1.0


def _predicted(axes: Axes, rows: Rows, places: dict[str, float], shift: float, factor: float, colour: str) -> None:
    x = [places[_x(row.entry)] + shift for row in rows]
    axes.plot(x, [factor * row.entry.forecast for row in rows], linestyle="--", linewidth=1, color=colour)


# Forecasts, race, importance ------------------------------------------------------------------------------------------


def forecast_chart(rows: Rows, forecasts: str) -> Chart:
    """What was predicted against what was measured."""
    by_kl = all("kl" in row.entry.results for row in rows)
    pairs = [(row.entry.forecast, _loss(row, by_kl), row.entry.outcome) for row in rows]
    pairs = [pair for pair in pairs if pair[0] > 0 and (pair[1] > 0 or not by_kl)]
    with drawing("forecasts") as made:
        for outcome, (colour, marker) in OUTCOMES.items():
            mine = [(x, y) for x, y, what in pairs if what == outcome]
            if mine:
                x, y = zip(*mine, strict=True)
                points(made.axes, x, y, COLOURS[colour], marker, label=outcome)
        if by_kl and forecasts == "predicted_kl" and pairs:
            ends = [min(x for x, _, _ in pairs), max(x for x, _, _ in pairs)]
            made.axes.plot(ends, ends, color=COLOURS["faint"], linewidth=1, label="as predicted")
        made.axes.set_xscale("log")
        made.axes.set_yscale("log" if by_kl else "linear")
        for axis in (made.axes.xaxis, made.axes.yaxis):
            plain_numbers(axis)
        made.axes.set_xlabel(FORECASTS[forecasts])
        made.axes.set_ylabel("measured KL to float, nats" if by_kl else "top-1 lost against the winner, points")
        made.axes.legend()
    rank = rank_correlation([x for x, _, _ in pairs], [y for _, y, _ in pairs])
    caption = f"{len(pairs)} candidates; rank correlation {rank:.2f}. The forecast only puts candidates in order."
    return Chart("Predicted and measured loss", made.svg, f"Predicted against measured loss. {caption}", caption)


def _loss(row: Compared, by_kl: bool) -> float:
    if by_kl:
        return row.entry.mean("kl") or 0.0
    return 0.0 if row.difference is None else -100 * row.difference.value


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, with mean ranks of equal values; 0 where one of them does not vary."""
    if len(x) < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    ordered, ranks, place = sorted(values), {}, 0
    for value, same in groupby(ordered):
        count = len(list(same))
        ranks[value] = place + (count - 1) / 2
        place += count
    return [ranks[value] for value in values]


def race_chart(search: SearchRun) -> Chart:
    """How many images each candidate saw until it was decided, in the order of the race."""
    runners = sorted(search.measured, key=lambda entry: entry.name)
    shown = runners[:_MOST_RUNNERS]
    with drawing("race", height=1.2 + 0.085 * len(shown)) as made:
        for outcome, (colour, _) in OUTCOMES.items():
            mine = [(place, entry.images) for place, entry in enumerate(shown) if entry.outcome == outcome]
            if mine:
                y, width = zip(*mine, strict=True)
                made.axes.barh(y, width, height=0.75, color=COLOURS[colour], label=f"{outcome} ({len(mine)})")
        made.axes.set_ylim(len(shown) - 0.5, -0.5)
        step = max(1, len(shown) // 12)
        made.axes.set_yticks(range(0, len(shown), step), [entry.name for entry in shown[::step]])
        made.axes.grid(visible=False, axis="y")
        made.axes.set_xlabel("selection images seen until decided")
        made.figure.legend(loc="outside lower center", ncols=4)
    seen = sum(entry.images for entry in search.measured)
    share = seen / max(1, len(search.measured) * search.images)
    more = f" The first {len(shown)} of {len(runners)} are drawn." if len(runners) > len(shown) else ""
    counted = f"; {100 * share:.0f} % of the images of a full evaluation count" if search.result is not None else ""
    caption = f"In the order of the forecast{counted}.{more}"
    return Chart("The race", made.svg, f"Images seen by each of {len(runners)} candidates. {caption}", caption)


def importance_chart(search: SearchRun, rows: Rows) -> list[Chart]:
    """How much each field explains; none where nothing can be told."""
    found = importance([row.entry.setting for row in rows], losses(search, list(rows)))
    if found is None:
        return []
    names, shares = list(found.shares), [100 * share for share in found.shares.values()]
    with drawing("importance", height=1.1 + 0.3 * len(names)) as made:
        bars = made.axes.barh(names, shares, color=COLOURS["blue"], height=0.6)
        made.axes.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=3)
        made.axes.invert_yaxis()
        made.axes.set_xlim(0, 112)
        made.axes.grid(visible=False, axis="y")
        made.axes.set_xlabel("share of what differs between settings, %")
    what = "ln of KL over the winner's" if search.objective.metric == "kl" else "top-1 less the winner's"
    how = "exact analysis of variance on the full grid" if found.exact else "PED-ANOVA of Optuna"
    caption = f"Of {what}: {how}."
    told = ", ".join(f"{name} {share:.0f} %" for name, share in zip(names, shares, strict=True))
    return [Chart("What matters", made.svg, f"Importance of fields: {told}. {caption}", caption)]
