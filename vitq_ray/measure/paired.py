"""Two candidates on the same images: by how much they differ, with 95 % intervals. For people, not for decisions: those
are `racing`'s, whose statistic may be looked at as often as one likes; these intervals hold for a number of images that
was fixed beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from vitq_ray.measure.metrics import Column

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Interval:
    """An estimate between its limits."""

    value: float
    low: float
    high: float


def accuracy_difference(correct: Column, reference: Column) -> Interval:
    """Accuracy less that of a reference, as fractions; both (n,) bool, n > 0.

    Agresti and Min, Biometrics 61 (2005): Wald's interval for matched pairs with half an image added to each cell.
    """
    won, lost, n = int((correct & ~reference).sum()), int((reference & ~correct).sum()), len(correct)
    b, c, total = won + 0.5, lost + 0.5, n + 2
    centre = (b - c) / total
    spread = _Z * math.sqrt(max(0.0, b + c - (b - c) ** 2 / total)) / total
    return Interval((won - lost) / n, centre - spread, centre + spread)


def mean_ratio(values: Column, reference: Column) -> Interval:
    """Mean over the mean of a reference, both (n,) and not negative; delta method on the logarithm.

    Where one of the means is 0, nothing can be said, and everything is 1.
    """
    a, b = values.astype(np.float64), reference.astype(np.float64)
    if not a.any() or not b.any():
        return Interval(1.0, 1.0, 1.0)
    ratio = float(a.mean() / b.mean())
    error = float((a / a.mean() - b / b.mean()).std()) / math.sqrt(len(a))
    return Interval(ratio, ratio * math.exp(-_Z * error), ratio * math.exp(_Z * error))
