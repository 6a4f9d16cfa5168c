"""A search as Optuna's journal file: `optuna-dashboard optuna-journal.log` opens it, Optuna loads it.

    trials.jsonl ──► optuna-journal.log     one study of the race, one of the trainings where there are any

The log stays the record of truth; the journal is made of it and can be deleted. It is a function of the log that goes
event by event, so a longer log only adds lines at its end, and whoever reads the journal meanwhile can go on. The one
exception are values that neither the space nor an earlier setting has, as refinement proposes: for Optuna a parameter
has the same choices in all trials, so all are written anew, and a dashboard that is open must be started again.

    candidate            trial, with what the space varies as parameters: numbers, or one of several texts
    chunk                intermediate value: mean KL, or top-1, by images seen
    beaten, behind       PRUNED           tied, finished    COMPLETE, with its value
    no decision yet      RUNNING, or WAITING where it has seen no image
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from vitq_ray.base.files import atomic_file, one_line
from vitq_ray.calibration.setting import SITE_GROUPS, TECHNIQUES, Calibration, Rule, Setting, read_setting, techniques
from vitq_ray.measure.metrics import METRICS, unpack_text
from vitq_ray.measure.racing import OBJECTIVES, Verdict
from vitq_ray.run.folder import RunFolder
from vitq_ray.search.asha import QatContest, training_runs
from vitq_ray.search.space import FIELDS, PARAMETERS, LogUniform, QatSpace, SearchSpace

JOURNAL = "optuna-journal.log"
_log = logging.getLogger(__name__)
_SHARE_OF_TIME = 0.05  # that writing it anew may take
_SECONDS_BETWEEN = 10.0
_NONE = "none"
_PRUNED = (Verdict.BEATEN.value, Verdict.BEHIND.value)
_TITLES = {"kl": "mean KL to the float model (nats)", "correct": "top-1"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Searched:
    """What a log does not say: `space` and `defaults` of the search, and what it is decided by."""

    space: SearchSpace
    defaults: Setting
    objective: str
    seed: int


@dataclass
class JournalFile:
    """Keeps the journal of a run's folder up to date, at a small share of the time.

    An error costs one warning and the journal, not the search.
    """

    folder: RunFolder
    searched: Searched
    warn: Callable[[str], None] = _log.warning
    clock: Callable[[], float] = time.monotonic
    _next: float = field(default=0.0, init=False)

    def refresh(self) -> None:
        """Write it, if it was not written just now."""
        if self.clock() >= self._next:
            self.write()

    def write(self) -> None:
        """Anew, as the log is now."""
        began = self.clock()
        try:
            data = journal(self.folder.events(), self.searched, self.folder.path.name)
            with atomic_file(self.folder.path / JOURNAL) as stream:
                stream.write(data)
        except Exception as error:
            self._next = math.inf
            self.warn(f"{self.folder.path / JOURNAL}: is not written any more: {one_line(error)}")
            return
        now = self.clock()
        self._next = now + max(_SECONDS_BETWEEN, (now - began) / _SHARE_OF_TIME)


def journal(events: Sequence[Mapping[str, Any]], searched: Searched, name: str) -> bytes:
    """What Optuna's `JournalFileBackend` reads; `name` is that of the study."""
    memory = _Memory()
    storage = JournalStorage(memory)
    race, training = _Race(storage, events, searched, name), _Training(storage, searched, name)
    for event in events:
        memory.time = event.get("time", memory.time)
        for part in (race, training):
            part.take(event)
    return "".join(json.dumps(op, separators=(",", ":")) + "\n" for op in memory.operations()).encode()


class _Memory(BaseJournalBackend):
    """A journal in memory, whose operations happened when the log says."""

    def __init__(self) -> None:
        self._operations: list[Row] = []
        self.time = 0.0

    def read_logs(self, log_number_from: int) -> list[Row]:
        return self._operations[log_number_from:]

    def append_logs(self, logs: list[Row]) -> None:
        when = datetime.fromtimestamp(self.time, timezone.utc).isoformat(timespec="microseconds")
        times = ("datetime_start", "datetime_complete")
        self._operations += [{**op, **{name: when for name in times if op.get(name)}} for op in logs]

    def operations(self) -> Iterator[Row]:
        """Without the random name of who wrote them."""
        return ({**op, "worker_id": "vitq_ray"} for op in self._operations)


def _new_study(storage: JournalStorage, name: str, larger_is_better: bool, title: str, attributes: Row) -> int:
    direction = StudyDirection.MAXIMIZE if larger_is_better else StudyDirection.MINIMIZE
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it says that a study was made
    try:
        study = storage.create_new_study([direction], name)
    finally:
        optuna.logging.set_verbosity(level)
    storage.set_study_system_attr(study, "study:metric_names", [title])
    for key, value in attributes.items():
        storage.set_study_user_attr(study, key, value)
    return study


# The race -----------------------------------------------------------------------------------------------------------


class _Trial:
    """A candidate: its trial, those of candidates with the same plan, and its results so far."""

    def __init__(self, number: int) -> None:
        self.numbers = [number]
        self.results: dict[str, list[Any]] = {}
        self.images = 0
        self.state: TrialState | None = None
        self.value: float | None = None
        self.attributes: Row = {}


class _Race:
    """The study of the candidates."""

    def __init__(
        self, storage: JournalStorage, events: Sequence[Mapping[str, Any]], searched: Searched, name: str
    ) -> None:
        objective = OBJECTIVES[searched.objective]
        self._storage, self._metric = storage, objective.metric
        candidates = (event for event in events if event["event"] == "candidate")
        self._settings = {event["name"]: _setting(event, searched) for event in candidates}
        self._columns = _Columns(searched, self._settings.values())
        attributes = {"search space": searched.space.name, "objective": searched.objective}
        title = _TITLES.get(self._metric, self._metric)
        self._study = _new_study(storage, name, objective.sign > 0, title, attributes)
        self._trials: dict[str, _Trial] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "candidate":
            self._enter(event)
        elif kind == "chunk":
            self._result(event)
        elif kind == "decision":
            self._decide(event)

    def _enter(self, event: Mapping[str, Any]) -> None:
        setting = self._settings[event["name"]]
        attributes = {"name": event["name"], "label": setting.label, "forecast": event["predicted_noise"]}
        if event["same_as"] is not None:
            attributes["same as"] = event["same_as"]
        params = self._columns.of(setting)
        distributions = {name: self._columns.distributions[name] for name in params}
        number = self._storage.create_new_trial(
            self._study,
            create_trial(state=TrialState.WAITING, params=params, distributions=distributions, user_attrs=attributes),
        )
        first = self._trials.get(event["same_as"])
        if first is None:
            self._trials[event["name"]] = _Trial(number)
            return
        self._trials[event["name"]] = first
        first.numbers.append(number)
        if first.state is not None:
            self._finish(number, first)

    def _result(self, event: Mapping[str, Any]) -> None:
        trial = self._trials[event["name"]]
        known = trial.images - event["start"]
        if trial.state is not None or not 0 <= known < event["images"]:  # late, or nothing new
            return
        if not trial.images:
            for number in trial.numbers:
                self._storage.set_trial_state_values(number, TrialState.RUNNING)
        for metric, values in unpack_text(event, event["images"]).items():
            trial.results.setdefault(metric, []).append(values[known:])
        trial.images += event["images"] - known
        if self._metric in trial.results:
            value = float(np.concatenate(trial.results[self._metric]).mean(dtype=float))
            self._storage.set_trial_intermediate_value(trial.numbers[0], trial.images, value)

    def _decide(self, event: Mapping[str, Any]) -> None:
        trial, images = self._trials[event["name"]], event["images"]
        whole = {name: np.concatenate(parts) for name, parts in trial.results.items()}
        means = {name: float(x[:images].mean(dtype=float)) for name, x in whole.items() if len(x) >= images}
        against = event.get("against")
        counts = {"won": event.get("losses"), "lost": event.get("wins"), "against": against} if against else {}
        measured = {METRICS[name].mean: value for name, value in means.items()}
        trial.state = TrialState.PRUNED if event["verdict"] in _PRUNED else TrialState.COMPLETE
        trial.value = means.get(self._metric)
        if trial.state is TrialState.COMPLETE and trial.value is None:  # Optuna knows no such thing
            trial.state = TrialState.FAIL
        trial.attributes = {"verdict": event["verdict"], "images": images, **counts, **measured}
        for number in trial.numbers:
            self._finish(number, trial)

    def _finish(self, number: int, trial: _Trial) -> None:
        assert trial.state is not None
        for key, value in trial.attributes.items():
            self._storage.set_trial_user_attr(number, key, value)
        self._storage.set_trial_state_values(number, trial.state, _values(trial.value))


def _values(value: float | None) -> list[float] | None:
    return None if value is None else [value]


def _setting(event: Mapping[str, Any], searched: Searched) -> Setting:
    return read_setting(event["setting"], event.get("format", 1), searched.defaults.batch_size)


class _Columns:
    """What varies in a search: {column: its distribution}, and the row of a setting in these columns.

    Values are those of the space and those of the settings: of an earlier search they are none of the space.
    """

    def __init__(self, searched: Searched, settings: Iterable[Setting]) -> None:
        self._patterns = [name for name in searched.space.choices if _is_pattern(name)]
        columns: dict[str, dict[Any, None]] = {}
        for name, values in searched.space.choices.items():
            columns[name] = dict.fromkeys(_as_parameter(name, value) for value in values)
        of_calibrators = searched.space.calibrations(searched.defaults)
        for calibration in of_calibrators[: len(searched.space.choices.get("calibrator", ()))]:
            for parameter, value in zip(calibration.row.parameters, calibration.values, strict=True):
                if parameter.name not in searched.space.choices:
                    columns.setdefault(parameter.name, {}).setdefault(float(value))
        for setting in dict.fromkeys(settings):
            for name, value in self._row(setting).items():
                columns.setdefault(name, {}).setdefault(value)
        self.distributions = {name: _distribution(list(v)) for name, v in columns.items() if len(v) > 1}

    def of(self, setting: Setting) -> Row:
        """{column: value} of what varies."""
        return {name: value for name, value in self._row(setting).items() if name in self.distributions}

    def _row(self, setting: Setting) -> Row:
        own = {str(rule.sites): rule.action for rule in setting.rules if rule.sites in self._patterns}
        rules = [rule for rule in setting.rules if rule.sites not in self._patterns]
        numbers = zip(setting.calibrator.row.parameters, setting.calibrator.values, strict=True)
        return {
            "mode": setting.mode,
            "calibrator": setting.calibrator.name,
            **{parameter.name: float(value) for parameter, value in numbers},
            "num_batches": setting.num_batches,
            "weight_bits": setting.weight_bits,
            "act_bits": setting.act_bits,
            "weights": str(setting.weights),
            "rules": _joined(rules),
            **{name: _joined(getattr(setting, name)) for name in TECHNIQUES},
            **{name: own.get(name, _NONE) for name in self._patterns},
        }


def _is_pattern(column: str) -> bool:
    return column in SITE_GROUPS or column not in FIELDS


def _joined(values: Iterable[Any]) -> str:
    return "; ".join(map(str, values)) or _NONE


def _as_parameter(column: str, value: Any) -> Any:
    """A value of a space as `_Columns` has it in a setting."""
    if column in PARAMETERS:
        return float(value)
    if column == "calibrator":
        return value.name if isinstance(value, Calibration) else str(value).split()[0]
    if column == "rules":
        return _joined(map(Rule.parse, value))
    if column in TECHNIQUES:
        return _joined(techniques(column, value))
    if _is_pattern(column):
        return _NONE if value is None else Rule.parse((column, value)).action
    return value if isinstance(value, int) else str(value)


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    if all(isinstance(value, float) for value in values):
        return FloatDistribution(min(values), max(values))
    if all(isinstance(value, int) for value in values):
        return IntDistribution(min(values), max(values))
    return CategoricalDistribution(list(map(str, values)))


# The trainings ------------------------------------------------------------------------------------------------------


class _Training:
    """The study of the training runs, begun with the first epoch."""

    def __init__(self, storage: JournalStorage, searched: Searched, name: str) -> None:
        self._storage, self._space, self._seed, self._name = storage, searched.space.qat, searched.seed, name
        self._trials: dict[str, int] = {}
        self._contest: QatContest | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        if self._space is None or event["event"] not in ("qat_epoch", "qat_failed"):
            return
        contest, name = self._begun(self._space), event["name"]
        known = len(contest.history[name])
        contest.replay([event])
        epochs, trial = contest.history[name], self._trials[name]
        if self._storage.get_trial(trial).state.is_finished():
            return
        if name in contest.failed:
            self._storage.set_trial_user_attr(trial, "failure", contest.failed[name])
            self._storage.set_trial_state_values(trial, TrialState.FAIL)
        elif len(epochs) > known:
            if not known:
                self._storage.set_trial_state_values(trial, TrialState.RUNNING)
            self._storage.set_trial_intermediate_value(trial, epochs[-1].epoch, epochs[-1].top1)
            best = max(epoch.top1 for epoch in epochs)
            if name in contest.stopped:
                self._storage.set_trial_state_values(trial, TrialState.PRUNED, [best])
            elif name not in contest.unfinished():
                self._storage.set_trial_state_values(trial, TrialState.COMPLETE, [best])

    def _begun(self, space: QatSpace) -> QatContest:
        if self._contest is None:
            runs = training_runs(space, ["start"], self._seed)
            self._contest = QatContest(runs, space, lambda event, **values: None)
            study = _new_study(self._storage, f"{self._name} QAT", True, "selection top-1 of the best epoch", {})
            distributions = {name: _range(values) for name, values in space.choices.items()}
            for run, row in zip(runs, space.sample(self._seed), strict=True):
                params = {name: _plain(value) for name, value in row.items()}
                template = create_trial(
                    state=TrialState.WAITING, params=params, distributions=distributions, user_attrs={"name": run.name}
                )
                self._trials[run.name] = self._storage.create_new_trial(study, template)
        return self._contest


def _range(values: Any) -> BaseDistribution:
    if isinstance(values, LogUniform):
        return FloatDistribution(values.low, values.high, log=True)
    return CategoricalDistribution(list(map(_plain, values)))


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)
