"""Figures of trainings: loss, accuracy on the selection images, and scales before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from vitq_ray.measure.evaluation import wilson_interval
from vitq_ray.page.compared import FAMILIES, family_of
from vitq_ray.page.figures import COLOURS, MARKERS, SERIES, Chart, drawing, plain_numbers, points
from vitq_ray.run.report_training import TrainingCurve

_MOST_POINTS = 300  # of a line of steps
_DASHES = {"": "-", "stopped": "--", "failed": ":"}


def training_charts(curves: Sequence[TrainingCurve], scales: Mapping[str, tuple[float, float]] | None) -> list[Chart]:
    """All of them that there are numbers for."""
    curves = [curve for curve in curves if curve.epochs]
    charts = [_accuracy(curves), *_loss(curves)] if curves else []
    return [*charts, *_scales(scales or {})]


def _accuracy(curves: Sequence[TrainingCurve]) -> Chart:
    with drawing("selection accuracy", height=3.0 + 0.16 * len(curves)) as made:
        for index, curve in enumerate(curves):
            rows = [(epoch, right / n, *wilson_interval(right, n)) for epoch, _, right, n in curve.epochs]
            x, y, low, high = np.array(rows).T * np.array([[1], [100], [100], [100]])
            colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            made.axes.plot(x, y, color=colour, marker=marker, linestyle=_DASHES[curve.ended], label=_label(curve))
            if len(curves) == 1:
                made.axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        made.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        made.axes.set_xlabel("epoch (0: before training)")
        made.axes.set_ylabel("top-1 on selection images, %")
        made.figure.legend(loc="outside lower center", ncols=1 if len(curves) < 4 else 2)
    best = max(((right / n, epoch, c) for c in curves for epoch, _, right, n in c.epochs), key=lambda row: row[0])
    stopped = sum(curve.ended == "stopped" for curve in curves)
    told = f"The best is {100 * best[0]:.2f} % after epoch {best[1]} of {best[2].label}."
    caption = told + (f" {stopped} of {len(curves)} runs were stopped early by ASHA (dashed)." if stopped else "")
    return Chart("Accuracy while training", made.svg, f"Selection accuracy by epoch. {caption}", caption)


def _label(curve: TrainingCurve) -> str:
    return f"{curve.label} ({curve.ended})" if curve.ended else curve.label


def _loss(curves: Sequence[TrainingCurve]) -> list[Chart]:
    if not any(curve.steps or any(loss is not None for _, loss, _, _ in curve.epochs) for curve in curves):
        return []
    with drawing("loss", height=3.0 + 0.16 * len(curves)) as made:
        for index, curve in enumerate(curves):
            colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            if curve.steps:
                x, y = _thinned(curve.steps)
                made.axes.plot(x, y, color=colour, alpha=0.45, linewidth=0.8, label="steps, means of neighbours")
            rows = [(epoch, loss) for epoch, loss, _, _ in curve.epochs if loss is not None]
            if rows:
                style = _DASHES[curve.ended]
                made.axes.plot(
                    *zip(*rows, strict=True), color=colour, marker=marker, linestyle=style, label=_label(curve)
                )
        made.axes.set_xlabel("epoch")
        made.axes.set_ylabel("training loss")
        made.figure.legend(loc="outside lower center", ncols=1 if len(curves) < 4 else 2)
    last = [(curve.label, loss) for curve in curves for _, loss, _, _ in curve.epochs[-1:] if loss is not None]
    told = "; ".join(f"{label}: {loss:.4g} at the end" for label, loss in last)
    return [Chart("Training loss", made.svg, f"Training loss. {told}", "Points are means of an epoch.")]


def _thinned(steps: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most 300 points: means of neighbours."""
    size = -(-len(steps) // _MOST_POINTS)
    parts = [np.array(steps[i : i + size]).mean(axis=0) for i in range(0, len(steps), size)]
    return [float(part[0]) for part in parts], [float(part[1]) for part in parts]


def _scales(scales: Mapping[str, tuple[float, float]]) -> list[Chart]:
    """amax after over amax before, by family; nothing where none was learned."""
    ratios: dict[str, list[float]] = {}
    for site, (before, after) in scales.items():
        if before > 0 and after > 0:
            ratios.setdefault(family_of(site), []).append(after / before)
    changed = [ratio for values in ratios.values() for ratio in values if abs(ratio - 1) > 1e-6]
    if not changed:
        return []
    names = sorted(ratios, key=lambda name: -np.median(ratios[name]))
    with drawing("scales", height=1.2 + 0.38 * len(names)) as made:
        for place, name in enumerate(names):
            jitter = np.linspace(-0.25, 0.25, len(ratios[name]))
            points(made.axes, ratios[name], place + jitter, COLOURS["blue"], "o", alpha=0.5)
        made.axes.axvline(1, color=COLOURS["faint"], linewidth=1)
        made.axes.set_yticks(range(len(names)), [FAMILIES[name] for name in names])
        made.axes.invert_yaxis()
        made.axes.set_xscale("log")
        plain_numbers(made.axes.xaxis)
        made.axes.set_xlabel("amax after training / before")
    low, high = min(changed), max(changed)
    caption = (
        f"{len(changed)} of {len(scales)} scales were learned; they changed by factors of {low:.3g} to {high:.3g}."
    )
    return [Chart("Learned scales", made.svg, f"amax after training over before, by family. {caption}", caption)]
