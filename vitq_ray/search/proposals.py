"""Which settings of a space to try: all of them, random ones, or what Optuna suggests. No Ray.

A source proposes settings in rounds and is told how each did before it proposes the next. What it proposes is a
function of space, seed and what it was told, so a search that is resumed is proposed the same settings again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optuna

from vitq_ray.base.config import InputError
from vitq_ray.calibration.setting import Setting
from vitq_ray.search.space import SearchSpace, setting_of

SEARCH_ALGORITHMS = ("grid", "random", "optuna")
DEFAULT_SAMPLES = 64
_ROUND = 8  # settings that Optuna proposes at once


@dataclass(frozen=True)
class Round:
    """How the settings of a round did; larger is better, each on the images it has seen.

    Attributes:
        scores: by how much in the mean each is better than the first setting of the search.
        best: the best setting so far.
        gain: (setting, other of the search) -> by how much it is better, on the images that both have seen.
    """

    scores: Mapping[Setting, float]
    best: Setting
    gain: Callable[[Setting, Setting], float]


class Proposals(Protocol):
    """A source of settings."""

    def next_round(self) -> list[Setting]:
        """Settings that were not proposed before; empty when there are no more."""

    def tell(self, told: Round) -> None:
        """How the settings of the last round did."""


class ListProposals:
    """One round, known beforehand."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = list(settings)

    def next_round(self) -> list[Setting]:
        settings, self._settings = self._settings, []
        return settings

    def tell(self, told: Round) -> None:
        """Nothing to learn for."""


Require = Callable[[Setting], None]  # raises InputError for a setting that cannot be tried


def _anything(setting: Setting) -> None:
    pass


class OptunaProposals:
    """Optuna's TPE sampler (Bergstra et al., 2011): rounds of 8, each from the scores of all before it.

    Settings that `require` refuses are not proposed; Optuna learns that nothing is worse. InputError where none is
    left.
    """

    def __init__(
        self, space: SearchSpace, defaults: Setting, count: int, seed: int, require: Require = _anything
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # NumPy's old generator, which Optuna uses, takes 32 bits.
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=2 * _ROUND)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._values, self._defaults = space.values(defaults), defaults
        self._left = count
        self._require = require
        self._refused: dict[Setting, InputError] = {}
        self._scores: dict[Setting, float] = {}
        self._asked: list[tuple[optuna.Trial, Setting]] = []

    def next_round(self) -> list[Setting]:
        fresh: dict[Setting, None] = {}
        wanted = min(_ROUND, self._left)
        for _ in range(20 * wanted):
            if len(fresh) == wanted:
                break
            trial = self._study.ask()
            setting = self._suggest(trial)
            if self._is_refused(setting):
                self._study.tell(trial, -math.inf)
                continue
            if setting in self._scores:  # known: Optuna learns from it once more, nothing is run
                self._study.tell(trial, self._scores[setting])
                continue
            self._asked.append((trial, setting))
            fresh.setdefault(setting)
        self._left -= len(fresh)
        if self._refused and not fresh and not self._scores:
            setting, error = next(iter(self._refused.items()))
            raise InputError(f"no possible setting found, e.g. {setting.label!r}: {error}")
        return list(fresh)

    def _is_refused(self, setting: Setting) -> bool:
        if setting not in self._scores and setting not in self._refused:
            try:
                self._require(setting)
            except InputError as error:
                self._refused[setting] = error
        return setting in self._refused

    def _suggest(self, trial: optuna.Trial) -> Setting:
        row: dict[str, Any] = {}
        for field, values in self._values.items():
            row[field] = values[trial.suggest_int(field, 0, len(values) - 1)] if len(values) > 1 else values[0]
        return setting_of(row, self._defaults)

    def tell(self, told: Round) -> None:
        self._scores |= told.scores
        for trial, setting in self._asked:
            self._study.tell(trial, self._scores[setting])
        self._asked = []


def proposals(
    algorithm: str,
    space: SearchSpace,
    defaults: Setting,
    num_samples: int | None,
    seed: int,
    require: Require = _anything,
) -> Proposals:
    """The source for one of `SEARCH_ALGORITHMS`. `num_samples` is for those that draw; InputError for a grid.

    `require` is for Optuna, which goes round what it refuses. What the others propose is known beforehand.
    """
    if algorithm == "grid":
        if num_samples is not None:
            raise InputError(
                f"number of samples: {num_samples} given, but a grid tries every setting; expected random or optuna"
            )
        return ListProposals(space.grid(defaults))
    count = num_samples or DEFAULT_SAMPLES
    if algorithm == "random":
        return ListProposals(space.sample(defaults, count, seed))
    return OptunaProposals(space, defaults, count, seed, require)
