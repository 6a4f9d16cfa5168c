"""Racing: which of many candidates is best, decided on as few images as a sound decision needs. Pure, no Ray.

All candidates see the same images in the same random order, so two of them are compared image by image. X is by how
much an image speaks for the opponent and against the candidate, a number in [-1, 1]:

    objective    X of an image                                                    candidates are ranked by
    top1         +1 if only the opponent is right, -1 if only the candidate is,   images classified correctly
                 else 0
    fidelity     (a - b) / (a + b), 0 where both are 0; a, b: KL to the float     mean KL, the lowest first
                 model of the candidate and of the opponent

The statistic, against the hypothesis E[X] <= -m with a margin m >= 0, is the capital of a gambler who bets a share λ
on every X + m > 0, averaged over 32 values of λ spread over (0, 1):

    K(n; m) = mean over λ of  Π over n images of (1 + λ(X + m))

For top-1, with W images that the opponent alone gets right and L that the candidate alone gets right, that is

    K(W, L, n; m) = mean over λ of  (1 + λ(1 + m))^W · (1 - λ(1 - m))^L · (1 + λm)^(n - W - L)

Under the hypothesis no factor has a mean above 1, so K is a nonnegative supermartingale that starts at 1, and by
Ville's inequality the chance that it *ever* reaches 1/a is at most a: one may look after every chunk. For top-1 with
m = 0 it is the mixture likelihood ratio for the share of discordant pairs won. Sources: Robbins, Ann. Math. Stat. 41
(1970), for mixtures; Waudby-Smith and Ramdas, JRSS B 86 (2024), for betting; Ville (1939).

Candidates are ordered, the promising ones first. Candidate i (counted from 0) is compared at every look with those
before it, and needs K >= i/α, so that the i chances of error add up to at most α:

    beaten     K(m = 0) against the best of the earlier candidates on this prefix reaches i/α: it is worse
    tied       top-1 only: K(m = tie margin) against the first candidate, which is never stopped, reaches i/α: it is
               not better by more than the margin, and the difference seen is within the margin
    behind     the same, but on the images seen it is worse by more than the margin (an estimate, not a proof)
    finished   all images seen

Two guards only delay stops, so that they raise no chance of error: nothing is stopped while more of the images seen
are classified correctly than by its opponent, by more than the tie margin; nor is it beaten while its rank on them is
the better one. (A top-1 race meets neither: there the evidence has the sign of the difference.)

The winner is the first by rank among the finished, unless its top-1 is proven worse than another's.

Guarantee for top-1: the chance that the truly best candidate is ever stopped as beaten, or as tied or behind while it
is better than the first candidate by more than the margin, is at most α.

Guarantee for fidelity: of each candidate for which E[X] <= 0 against every earlier one, the chance that it is ever
stopped is at most α. That is what "best" means here: on an image at random, its KL is in the mean not the larger one
*relative to the sum of both*. The candidate with the lowest mean KL need not be it: a mean is moved by few images with
a large KL, X by many with a slightly larger one. That is why means rank and X only stops. And the float model is the
measure of all: a setting that classifies better than the float model looks like one that differs from it.

Both hold for images drawn independently from what the race is about, and candidates fixed beforehand. (In a
class-balanced set K for top-1 is smaller on average at every fixed look, by Maclaurin's inequality. Candidates that
were proposed for what others did on the same images, as Optuna's later rounds are, have no such guarantee among each
other; nor has the final naming of ties, which tests once more, or the choice between finished ones.)

A decision depends on results at the same look or before, of candidates before: never on which result arrived first.
So a race that was killed and replayed, or ran on other workers, comes to the same decisions. Where an earlier
candidate is behind, the later one runs on, and what it saw past its decision is discarded.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vitq_ray.base.config import Config, InputError, require_choice, require_int
from vitq_ray.measure.metrics import Column, Results, no_results

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

FIDELITY, TOP1 = "fidelity", "top1"
_BETS = (np.arange(32) + 0.5) / 32


class Verdict(enum.Enum):
    """Why a candidate stopped."""

    BEATEN = "beaten"
    TIED = "tied"
    BEHIND = "behind"
    FINISHED = "finished"


@dataclass(frozen=True)
class RaceRules(Config):
    """What decides a race.

    Attributes:
        images: how many images a candidate sees at most.
        chunk: images between two looks.
        first: images before the first look; they double from look to look until looks are a chunk apart. None: a
            chunk.
        alpha: chance of losing the best candidate, in (0, 1); what that means is in the module's docstring.
        tie_margin: difference of accuracies, as a fraction, that is not worth telling apart.
        objective: what better means, one of `OBJECTIVES`.
    """

    images: int
    chunk: int
    alpha: float = 0.05
    tie_margin: float = 0.005
    objective: str = TOP1
    first: int | None = None

    def __post_init__(self) -> None:
        require_int("images of a race", self.images, 1)
        require_int("images of a chunk", self.chunk, 1)
        if self.first is not None:
            require_int("images before the first look", self.first, 1, self.chunk)
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha: expected a number between 0 and 1, got {self.alpha!r}")
        if not 0 <= self.tie_margin < 1:
            raise InputError(f"tie margin: expected a fraction in [0, 1), got {self.tie_margin!r}")
        require_choice("objective", self.objective, tuple(OBJECTIVES))

    @property
    def looks(self) -> tuple[int, ...]:
        """Prefix lengths at which decisions are made; the last one is all images."""
        looks, seen = [], self.first or self.chunk
        while seen < self.images:
            looks.append(seen)
            seen += min(seen, self.chunk)
        return (*looks, self.images)


@dataclass(frozen=True)
class Decision:
    """How a candidate's race ended.

    Attributes:
        images: length of the prefix that decided; results past it do not count.
        against: the opponent, None where all images were seen.
        wins, losses: images of the prefix that speak for the opponent, and for the candidate: with top-1 those that it
            alone got right, with fidelity those on which its KL is the lower one.
        evidence: natural logarithm of K.
    """

    name: str
    verdict: Verdict
    images: int
    against: str | None = None
    wins: int = 0
    losses: int = 0
    evidence: float = 0.0


def log_evidence(wins: int, losses: int, images: int, margin: float = 0.0) -> float:
    """ln K(W, L, n; m) of the module's docstring: evidence that the opponent is not worse by `margin` or more.

    Args:
        wins, losses: images that the opponent alone, and the candidate alone, got right.
        images: all images compared, the concordant ones included.
    """
    concordant = images - wins - losses
    logs = (
        wins * np.log1p(_BETS * (1 + margin))
        + losses * np.log1p(-_BETS * (1 - margin))
        + concordant * np.log1p(_BETS * margin)
    )
    return _log_mean(logs)


def discordant(opponent: Bools, candidate: Bools) -> tuple[int, int]:
    """(W, L): images that only the opponent, and only the candidate, got right; both (n,) bool."""
    return int((opponent & ~candidate).sum()), int((candidate & ~opponent).sum())


def relative_excess(opponent: Column, candidate: Column) -> Floats:
    """X of every image for KL to float, (n,): (a - b) / (a + b), and 0 where both are 0."""
    a, b = candidate.astype(np.float64), opponent.astype(np.float64)
    return np.divide(a - b, a + b, out=np.zeros(len(a)), where=a + b > 0)


@dataclass(frozen=True)
class Pair:
    """What a prefix of the images says of an opponent and a candidate; adds up over images.

    Attributes:
        wins, losses: images that only the opponent, and only the candidate, got right; 0 without labels.
        nearer, farther: images on which the opponent's KL, and the candidate's, is the lower one.
        capital: (32,) ln of what each bet on X of the KL has made of 1.
    """

    images: int = 0
    wins: int = 0
    losses: int = 0
    nearer: int = 0
    farther: int = 0
    capital: Floats = field(default_factory=lambda: np.zeros(len(_BETS)))

    def extended(self, opponent: Results, candidate: Results, metrics: Sequence[str], end: int) -> Pair:
        """The same for images up to `end`, by those of `metrics` that both have."""
        part = slice(self.images, end)
        wins, losses, nearer, farther, capital = self.wins, self.losses, self.nearer, self.farther, self.capital
        there = [name for name in metrics if name in opponent and name in candidate]
        if "correct" in there:
            won, lost = discordant(opponent["correct"][part], candidate["correct"][part])
            wins, losses = wins + won, losses + lost
        if "kl" in there:
            x = relative_excess(opponent["kl"][part], candidate["kl"][part])
            nearer, farther = nearer + int((x > 0).sum()), farther + int((x < 0).sum())
            capital = capital + np.log1p(np.multiply.outer(_BETS, x)).sum(axis=1)
        return Pair(end, wins, losses, nearer, farther, capital)


def _evidence_of_top1(pair: Pair, margin: float) -> float:
    return log_evidence(pair.wins, pair.losses, pair.images, margin)


def _evidence_of_fidelity(pair: Pair, margin: float) -> float:
    return _log_mean(pair.capital)


def _log_mean(logs: Floats) -> float:
    """ln of the mean of exp(logs)."""
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).mean()))


@dataclass(frozen=True)
class Objective:
    """What better means in a race.

    Attributes:
        metric: what candidates are ranked by, one of `METRICS`.
        sign: 1 where more of it is better, -1 where less is.
        evidence: (pair, margin) -> ln K.
        counts: which images of a pair speak for the opponent and for the candidate.
        metrics: what a pair is made of; those that images without labels do not have are left out.
        stops_ties: candidates are stopped that will not be better than the first one by the tie margin.
    """

    metric: str
    sign: int
    evidence: Callable[[Pair, float], float]
    counts: Callable[[Pair], tuple[int, int]]
    metrics: tuple[str, ...]
    stops_ties: bool


OBJECTIVES: dict[str, Objective] = {
    FIDELITY: Objective(
        "kl", -1, _evidence_of_fidelity, lambda p: (p.nearer, p.farther), ("correct", "kl"), stops_ties=False
    ),
    TOP1: Objective("correct", 1, _evidence_of_top1, lambda p: (p.wins, p.losses), ("correct",), stops_ties=True),
}


class _Runner:
    """One candidate: its results so far, how many looks were judged, and its decision."""

    def __init__(self, name: str, images: int, objective: Objective) -> None:
        self.name = name
        self.results: dict[str, Column] = no_results(images)
        self.seen = 0
        self.judged = 0  # looks
        self.decision: Decision | None = None
        self._objective = objective
        self._sums = np.zeros(images + 1)  # of the metric of the objective, by length of the prefix
        self._pairs: dict[str, Pair] = {}  # by opponent, as far as they were compared

    @property
    def kept(self) -> int:
        """Images whose results count."""
        return self.seen if self.decision is None else self.decision.images

    def take(self, start: int, end: int, results: Results) -> None:
        """Remember results. A metric that a chunk lacks, since an earlier version logged it, is not kept at all."""
        for metric in tuple(self.results):
            if metric in results:
                self.results[metric][start:end] = results[metric]
            else:
                del self.results[metric]
        values = self.results[self._objective.metric][start:end]
        self._sums[start : end + 1] = np.cumsum(np.r_[self._sums[start], values])
        self.seen = end

    def merit(self, images: int) -> float:
        """On a prefix: the larger, the better."""
        return self._objective.sign * float(self._sums[images])

    def against(self, opponent: _Runner, images: int) -> Pair:
        """Compared on a prefix, which is no shorter than at the call before."""
        pair = self._pairs.get(opponent.name, Pair())
        pair = pair.extended(opponent.results, self.results, self._objective.metrics, images)
        self._pairs[opponent.name] = pair
        return pair


@dataclass
class Race:
    """Results in, decisions out. Candidates are compared in the order in which they `enter`."""

    rules: RaceRules
    _runners: list[_Runner] = field(default_factory=list)
    _by_name: dict[str, _Runner] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.rules.objective]

    def enter(self, name: str) -> None:
        if name in self._by_name:
            raise ValueError(f"candidate {name!r} is in the race already")
        runner = _Runner(name, self.rules.images, self.objective)
        self._runners.append(runner)
        self._by_name[name] = runner

    def record(self, name: str, start: int, results: Results) -> bool:
        """Take in results for images `start` … of the order; False where they were known already.

        A chunk may come twice, after the loss of a worker. One that leaves a gap, or lacks what the race is decided by,
        is a ValueError.
        """
        runner, metric = self._by_name[name], self.objective.metric
        if metric not in results:
            raise ValueError(f"candidate {name!r}: results without {metric!r}, which the race is decided by")
        end = start + len(results[metric])
        if not 0 <= start <= runner.seen or end > self.rules.images:
            raise ValueError(f"candidate {name!r}: results {start} to {end}, {runner.seen} seen")
        if end <= runner.seen:
            return False
        runner.take(start, end, results)
        return True

    def judge(self) -> list[Decision]:
        """Decisions that have become possible since the last call, in order."""
        made = []
        for i, runner in enumerate(self._runners):
            while runner.decision is None and self._can_judge(i):
                look = self.rules.looks[runner.judged]
                runner.decision = self._decide(i, look)
                runner.judged += 1
                if runner.decision is not None:
                    made.append(runner.decision)
        return made

    def _can_judge(self, i: int) -> bool:
        runner = self._runners[i]
        look = self.rules.looks[runner.judged]
        ready = (e.decision is not None or e.judged > runner.judged for e in self._runners[:i])
        return runner.seen >= look and all(ready)

    def _decide(self, i: int, look: int) -> Decision | None:
        runner, objective = self._runners[i], self.objective
        if look == self.rules.images:
            return Decision(runner.name, Verdict.FINISHED, look)
        if i == 0:
            return None
        needed = math.log(i / self.rules.alpha)
        best = max(self._opponents(i, look), key=lambda e: e.merit(look))
        worse, no_better = (best, 0.0), (self._runners[0], self.rules.tie_margin)
        for opponent, margin in (worse, no_better) if objective.stops_ties else (worse,):
            pair = runner.against(opponent, look)
            evidence = objective.evidence(pair, margin)
            if evidence >= needed and not (margin == 0 and self._spared(runner, opponent, pair)):
                verdict = Verdict.BEATEN if margin == 0 else self._within_margin(pair)
                return Decision(runner.name, verdict, look, opponent.name, *objective.counts(pair), evidence)
        return None

    def _spared(self, runner: _Runner, opponent: _Runner, pair: Pair) -> bool:
        """The guards of the module's docstring, on the images of the pair."""
        more_right = pair.losses - pair.wins > self.rules.tie_margin * pair.images
        return more_right or runner.merit(pair.images) > opponent.merit(pair.images)

    def _within_margin(self, pair: Pair) -> Verdict:
        return Verdict.TIED if pair.wins - pair.losses <= self.rules.tie_margin * pair.images else Verdict.BEHIND

    def _opponents(self, i: int, look: int) -> list[_Runner]:
        """Earlier candidates that were still racing at this look; the first one always is."""
        return [e for e in self._runners[:i] if e.decision is None or e.decision.images >= look]

    # What is known ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(runner.name for runner in self._runners)

    def decision(self, name: str) -> Decision | None:
        return self._by_name[name].decision

    def seen(self, name: str) -> int:
        """Images evaluated for a candidate, those past its decision included."""
        return self._by_name[name].seen

    def results(self, name: str) -> dict[str, Column]:
        """Results that count, every metric (n,) in the order of the race; of decided candidates up to the decision."""
        runner = self._by_name[name]
        return {metric: values[: runner.kept] for metric, values in runner.results.items()}

    def mean(self, name: str, images: int | None = None) -> float:
        """What candidates are ranked by, in the mean over those images that count, or over the first of them."""
        runner = self._by_name[name]
        count = runner.kept if images is None else images
        return self.objective.sign * runner.merit(count) / count

    @property
    def images_evaluated(self) -> int:
        """Of all candidates together, what was evaluated past a decision included."""
        return sum(runner.seen for runner in self._runners)

    @property
    def over(self) -> bool:
        return all(runner.decision is not None for runner in self._runners)

    def leader(self) -> str | None:
        """The first by rank among the finished whose top-1 is not proven worse than another's; None before one has
        finished. On equal ranks it is the earlier one."""
        finished = [r for r in self._runners if r.decision is not None and r.decision.verdict is Verdict.FINISHED]
        ranked = sorted(finished, key=lambda r: -r.merit(r.kept))
        fine = (r.name for r in ranked if not any(self._proves_worse(other, r) for other in finished))
        return next(fine, None)

    def _proves_worse(self, opponent: _Runner, runner: _Runner) -> bool:
        """Top-1 of a candidate against another's on the images of both, at the level of the race."""
        pair = self._pair(opponent, runner, ("correct",))
        return log_evidence(pair.wins, pair.losses, pair.images) >= self._needed_last

    def _pair(self, opponent: _Runner, runner: _Runner, metrics: Sequence[str]) -> Pair:
        return Pair().extended(opponent.results, runner.results, metrics, min(opponent.kept, runner.kept))

    @property
    def _needed_last(self) -> float:
        """ln K that the last candidate needs: also for what is compared once more when all is seen."""
        return math.log(max(1, len(self._runners) - 1) / self.rules.alpha)

    def standing(self, name: str, best: str) -> str:
        """What the race says of a candidate: see `standings`."""
        if name == best:
            return "best"
        leader, runner, objective = self._by_name[best], self._by_name[name], self.objective
        pair = self._pair(leader, runner, objective.metrics)
        verdict = None if runner.decision is None else runner.decision.verdict
        beaten = objective.evidence(pair, 0.0) >= self._needed_last and not self._spared(runner, leader, pair)
        if verdict is Verdict.BEATEN or beaten or self._proves_worse(leader, runner):
            return "beaten"
        near = self._within_margin(pair) is Verdict.TIED
        return "tied" if near or verdict is Verdict.FINISHED else "behind"


def standings(race: Race) -> dict[str, str]:
    """What the race says of each candidate: `best`, `tied`, `behind` or `beaten`.

    Every candidate is compared once more with the best, on the images it has seen and at the same level: one that was
    stopped by the first candidate, or finished, can still turn out to be beaten. What is not beaten is tied where the
    difference seen is within the margin, or cannot be told from chance on all images; else behind. In a race by
    fidelity, what is not beaten has seen all images: it is tied.
    """
    best = race.leader()
    return {} if best is None else {name: race.standing(name, best) for name in race.names}


def chunks_left(rules: RaceRules, seen: int) -> Sequence[tuple[int, int]]:
    """(start, end) of the chunks that remain after the first `seen` images, each ending at a look."""
    ends = [look for look in rules.looks if look > seen]
    return list(zip([seen, *ends[:-1]], ends, strict=True)) if ends else []
