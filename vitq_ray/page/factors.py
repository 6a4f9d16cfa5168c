"""What of a setting matters: the fields in which the settings of a search differ, and how much each explains.

On a full grid, where every value of every field meets every value of the others equally often, the variance of the
result divides exactly: the share of a field is the variance of the means of its values, and what no field explains
alone is their interplay. Elsewhere PED-ANOVA of Optuna (Watanabe et al., arXiv 2304.10255) tells which fields decide
whether a setting is among the better ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vitq_ray.calibration.setting import Setting

INTERPLAY = "interplay of fields"
_FIELDS = (
    *("mode", "calibrator", "num_batches", "weight_bits", "act_bits"),
    *("weights", "rules", "transforms", "corrections"),
)
_FEWEST = 8  # settings of which PED-ANOVA is asked


@dataclass(frozen=True)
class Importance:
    """How much of the differences each field explains, the most important first.

    Attributes:
        shares: {field: share}; they add up to 1.
        exact: by analysis of variance on a full grid.
    """

    shares: Mapping[str, float]
    exact: bool


def fields_of(setting: Setting) -> dict[str, str]:
    """{field: its value as text}; `batch_size` is the same in all of a search."""
    values = setting.to_dict()
    return {name: _text(values[name]) for name in _FIELDS}


def _text(value: object) -> str:
    return ("; ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def varied(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """{field: its value in every setting} of fields in which they differ."""
    rows = [fields_of(setting) for setting in settings]
    columns = {name: [row[name] for row in rows] for name in _FIELDS}
    return {name: column for name, column in columns.items() if len(set(column)) > 1}


def importance(settings: Sequence[Setting], values: Sequence[float]) -> Importance | None:
    """Of the fields for a value of every setting, e.g. the logarithm of its KL; None where nothing can be told."""
    columns, y = varied(settings), np.asarray(values, float)
    if not columns or not np.isfinite(y).all() or np.ptp(y) == 0:
        return None
    combinations = set(zip(*columns.values(), strict=True))
    if len(combinations) == len(y) == math.prod(len(set(column)) for column in columns.values()):
        return Importance(_sorted(_variance_shares(columns, y)), exact=True)
    return None if len(y) < _FEWEST else Importance(_sorted(_ped_anova(columns, y)), exact=False)


def _sorted(shares: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(shares.items(), key=lambda row: -row[1]))


def _variance_shares(columns: Mapping[str, Sequence[str]], y: npt.NDArray[Any]) -> dict[str, float]:
    total, shares = float(((y - y.mean()) ** 2).sum()), {}
    for name, column in columns.items():
        groups = [y[np.array(column) == value] for value in set(column)]
        shares[name] = float(sum(len(group) * (group.mean() - y.mean()) ** 2 for group in groups)) / total
    rest = 1 - sum(shares.values())
    return shares | ({INTERPLAY: max(0.0, rest)} if len(columns) > 1 else {})


def _ped_anova(columns: Mapping[str, Sequence[str]], y: npt.NDArray[Any]) -> dict[str, float]:
    import optuna  # slow, and seldom needed

    choices = {
        name: optuna.distributions.CategoricalDistribution(sorted(set(column))) for name, column in columns.items()
    }
    trials = [
        optuna.trial.create_trial(
            params=dict(zip(columns, row, strict=True)), distributions=dict(choices), value=float(value)
        )
        for row, value in zip(zip(*columns.values(), strict=True), y, strict=True)
    ]
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        study.add_trials(trials)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    return dict(found)
