"""A race of settings: what is proposed becomes candidates, results become decisions, and all of it is logged.

    proposals ──► candidates, the most promising first ──► race ──► decisions
    trials.jsonl: every candidate, chunk and decision, written before anything is done with it

The log is the record of truth: a contest that is made again from its log has the same candidates, results and
decisions, and goes on from there. No Ray, no clock: see `racing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from vitq_ray.base.config import InputError
from vitq_ray.base.formats import FORMATS, require_format
from vitq_ray.calibration.planner import Planner
from vitq_ray.calibration.setting import Setting, read_setting
from vitq_ray.measure.evaluation import Evaluation
from vitq_ray.measure.metrics import Results, pack_text, unpack_text
from vitq_ray.measure.racing import FIDELITY, Decision, Race, RaceRules, standings
from vitq_ray.quant.plan import Plan
from vitq_ray.run.folder import RunFolder
from vitq_ray.search.proposals import Proposals, Round

_FEWEST = 8  # images before the first look
_SAME_NOISE = 1e-3  # relative: other processors round differently


@dataclass(frozen=True)
class Candidate:
    """One setting of the search and its plan: what races is what is saved.

    `noise` is `Planner.forecast`: less promises more; `by_site` are its parts; `same_as` names the earlier candidate
    with the same plan, if any.
    """

    name: str
    setting: Setting
    plan: Plan = field(compare=False)
    by_site: Mapping[str, float] = field(compare=False, repr=False)
    same_as: str | None = None

    @property
    def noise(self) -> float:
        return math.fsum(self.by_site.values())


@dataclass(frozen=True)
class Listeners:
    """Who else wants to know; each is called after the log was written.

    Attributes:
        on_plan: how many settings of a round have their plan, of how many.
        on_candidate: a candidate with a plan of its own.
        on_round: what the planner forecasts, and all candidates so far, after further ones were proposed.
        on_chunk: name, images of the chunk.
        on_decision: what the race decided.
    """

    on_plan: Callable[[int, int], None] = lambda done, total: None
    on_candidate: Callable[[Candidate], None] = lambda candidate: None
    on_round: Callable[[str, Sequence[Candidate]], None] = lambda forecasts, candidates: None
    on_chunk: Callable[[str, int], None] = lambda name, images: None
    on_decision: Callable[[Decision], None] = lambda decision: None

    @staticmethod
    def all(listeners: Sequence[Listeners]) -> Listeners:
        """One that tells all of them, in order."""

        def each(calls: Sequence[Callable[..., None]]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                for one in calls:
                    one(*arguments)

            return call

        return Listeners(**{f.name: each([getattr(one, f.name) for one in listeners]) for f in fields(Listeners)})


class Contest:
    """The referee of `trials.run_trials`, without Ray."""

    def __init__(
        self,
        planner: Planner,
        proposals: Proposals,
        race: Race,
        folder: RunFolder,
        listeners: Listeners,
    ) -> None:
        """`race` is empty; what the folder's log holds is replayed. InputError where the log does not fit."""
        self._planner = planner
        self._proposals = proposals
        self._folder = folder
        self._listeners = listeners
        self._logged = _Log.of(folder)
        self._first_with: dict[str, str] = {}
        self._round: list[Candidate] = []
        self._handed_out: set[str] = set()
        self._exhausted = False
        self.race = race
        self.candidates: dict[str, Candidate] = {}
        self._fill()

    # What a referee does ------------------------------------------------------------------------------------------

    def next(self) -> str | None:
        """The next candidate that has not been decided, once; None where there is none, or none yet."""
        while not self.over:
            for name in self.race.names:
                if name not in self._handed_out and self._has_work(name):
                    self._handed_out.add(name)
                    return name
            if not self.race.over:
                return None
            self._fill()
        return None

    def _has_work(self, name: str) -> bool:
        """Undecided, with images left to see; one that has seen all may still wait for an earlier one."""
        return self.race.decision(name) is None and self.race.seen(name) < self.race.rules.images

    @property
    def over(self) -> bool:
        """Every candidate is decided and no further ones are proposed."""
        return self._exhausted and self.race.over

    def seen(self, name: str) -> int:
        return self.race.seen(name)

    def take(self, name: str, start: int, results: Results, seconds: float) -> bool:
        """Take in every metric of a chunk's images; whether the candidate is decided, so that its trial can stop."""
        if self.race.record(name, start, results):
            images = len(next(iter(results.values())))
            self._folder.append(
                "chunk",
                name=name,
                start=start,
                images=images,
                **pack_text(results),
                seconds=round(seconds, 4),
            )
            self._listeners.on_chunk(name, images)
            self._judge()
        return self.race.decision(name) is not None

    def _judge(self) -> None:
        for decision in self.race.judge():
            if decision.name not in self._logged.decided:
                self._folder.append("decision", **_decision_fields(decision))
            self._listeners.on_decision(decision)

    # Candidates ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """The next round of proposals as candidates, those with the least predicted noise first."""
        if self._round:
            self._proposals.tell(self._told())
        settings = self._proposals.next_round()
        self._exhausted = not settings
        made = [(s, plan, self._planner.losses(s, plan)) for s, plan in self._plans(settings)]
        self._round = [self._enter(*row) for row in sorted(made, key=lambda row: math.fsum(row[2].values()))]
        if self._round:
            self._listeners.on_round(self._planner.forecasts, tuple(self.candidates.values()))
        self._replay(c.name for c in self._round)

    def _plans(self, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Plan]]:
        for done, setting in enumerate(settings):
            self._listeners.on_plan(done, len(settings))
            yield setting, self._planner.plan(setting)

    def _enter(self, setting: Setting, plan: Plan, by_site: Mapping[str, float]) -> Candidate:
        key = plan.key
        candidate = Candidate(f"c{len(self.candidates):03d}", setting, plan, by_site, self._first_with.get(key))
        self._log_candidate(candidate)
        self.candidates[candidate.name] = candidate
        if candidate.same_as is None:
            self._first_with[key] = candidate.name
            self.race.enter(candidate.name)
            self._listeners.on_candidate(candidate)
        return candidate

    def forecast_of(self, candidate: Candidate) -> dict[str, float]:
        """{what the planner forecasts: the candidate's}."""
        return {self._planner.forecasts: candidate.noise}

    def _log_candidate(self, candidate: Candidate) -> None:
        logged = self._logged.candidates.get(candidate.name)
        if logged is None:
            self._folder.append(
                "candidate",
                format=FORMATS["log"],
                name=candidate.name,
                setting=candidate.setting.to_dict(),
                predicted_noise=candidate.noise,  # or predicted KL: the field is older than that
                same_as=candidate.same_as,
                plan=candidate.plan.key,
            )
            return
        self._require_as_logged(candidate, logged)

    def _require_as_logged(self, candidate: Candidate, logged: Mapping[str, Any]) -> None:
        """What is proposed now must be what was proposed then, and be forecast to do as well."""
        log, name = self._folder.log, candidate.name
        found = require_format("log", str(log.path), logged)
        try:
            known = read_setting(logged["setting"], found, candidate.setting.batch_size)
        except InputError as error:
            raise log.error(None, f"candidate {name}: {error}") from None
        if known != candidate.setting:
            raise log.error(
                None, f"candidate {name} is {known.label!r}, but {candidate.setting.label!r} is proposed now"
            )
        then, now = logged["predicted_noise"], candidate.noise
        if not math.isclose(then, now, rel_tol=_SAME_NOISE) or logged["same_as"] != candidate.same_as:
            there, here = f"{then:.6g}, same as {logged['same_as']}", f"{now:.6g}, same as {candidate.same_as}"
            raise log.error(None, f"candidate {name}: forecast noise {there} there, {here} now")
        raced = bool(self._logged.chunks.get(name))
        if raced and candidate.setting.corrections and logged.get("plan") != candidate.plan.key:
            raise log.error(
                None,
                f"candidate {name}: its corrected weights are not those that were raced; expected the machine and the "
                "versions of before, which compute the same ones again",
            )

    def _told(self) -> Round:
        best, first = self.race.leader(), self.race.names[0]
        assert best is not None
        of = {c.setting: c for c in self.candidates.values()}
        return Round(
            {c.setting: self._better(c, self.candidates[first]) for c in self._round},
            self.candidates[best].setting,
            lambda setting, other: self._better(of[setting], of[other]),
        )

    def _better(self, candidate: Candidate, other: Candidate) -> float:
        """By how much it is better than another candidate in the mean, on the images that both have seen."""
        names = [c.same_as or c.name for c in (candidate, other)]
        images = min(len(self.race.results(name)[self.race.objective.metric]) for name in names)
        mine, others = (self.race.mean(name, images) for name in names)
        return self.race.objective.sign * (mine - others)

    # The log ------------------------------------------------------------------------------------------------------

    def _replay(self, names: Iterable[str]) -> None:
        """Take in what the log has of these candidates."""
        for name in names:
            for chunk in self._logged.chunks.get(name, ()):
                try:
                    self.race.record(name, chunk["start"], unpack_text(chunk, chunk["images"]))
                except ValueError as error:
                    raise self._folder.log.error(None, f"results of {name}: {error}") from None
        self._judge()

    # The outcome --------------------------------------------------------------------------------------------------

    def evaluations(self, labels: npt.NDArray[np.int64], sample_ids: npt.NDArray[np.int64]) -> dict[str, Evaluation]:
        """{candidate with scales of its own: its results that count}; both arrays in the order of the race."""
        results = {name: self.race.results(name) for name in self.race.names}
        counts = {name: len(columns[self.race.objective.metric]) for name, columns in results.items()}
        return {name: Evaluation(sample_ids[:n], labels[:n], results[name]) for name, n in counts.items()}

    def outcome(self) -> dict[str, str]:
        """{candidate: best, tied, behind or beaten}, those that share scales included."""
        standing = standings(self.race)
        return {c.name: standing[c.same_as or c.name] for c in self.candidates.values()}


@dataclass(frozen=True)
class _Log:
    """What trials.jsonl holds of a contest."""

    candidates: dict[str, dict[str, Any]]
    chunks: dict[str, list[dict[str, Any]]]
    decided: frozenset[str]

    @staticmethod
    def of(folder: RunFolder) -> _Log:
        """InputError for results or a decision of a candidate that is not introduced before them."""
        candidates: dict[str, dict[str, Any]] = {}
        chunks: dict[str, list[dict[str, Any]]] = {}
        decided = set()
        for event in folder.events():
            kind, name = event["event"], event.get("name")
            if kind in ("chunk", "decision") and name not in candidates:
                raise folder.log.error(None, f"{kind} of {name!r}, which is no candidate before it")
            if kind == "candidate":
                candidates[event["name"]] = event
            elif kind == "chunk":
                chunks.setdefault(event["name"], []).append(event)
            elif kind == "decision":
                decided.add(event["name"])
        return _Log(candidates, chunks, frozenset(decided))


def _decision_fields(decision: Decision) -> dict[str, Any]:
    return {
        "name": decision.name,
        "verdict": decision.verdict.value,
        "images": decision.images,
        "against": decision.against,
        "wins": decision.wins,
        "losses": decision.losses,
        "evidence": round(decision.evidence, 4),
    }


def race_rules(
    images: int,
    chunk: int | None,
    batch_size: int,
    alpha: float,
    tie_margin: float,
    objective: str,
    grows: bool = True,
) -> RaceRules:
    """Rules with about 25 looks, a whole number of batches each, unless `chunk` says otherwise.

    By fidelity many candidates are beaten after few images: the first looks are then closer together, if it `grows`.
    """
    batches = -(-images // (25 * batch_size))
    between = min(images, chunk or batches * batch_size)
    first = min(between, max(_FEWEST, between // 4)) if grows and chunk is None and objective == FIDELITY else None
    return RaceRules(images, between, alpha, tie_margin, objective, first)
