"""Racing: which of many candidates is best, decided on as few images as a sound decision needs. Pure, no Ray.

All candidates see the same images in the same random order, so two of them are compared image by image: only the
images that exactly one of them gets right (discordant pairs) tell them apart. Of n images let W be those that the
opponent alone gets right, L those that the candidate alone gets right. X = +1, -1 or 0 per image; E[X] is by how much
the opponent's accuracy exceeds the candidate's.

The statistic, against the hypothesis E[X] <= -m with a margin m >= 0, is the capital of a gambler who bets a share λ
on every X + m > 0, averaged over 32 values of λ spread over (0, 1):

    K(W, L, n; m) = mean over λ of  (1 + λ(1 + m))^W · (1 - λ(1 - m))^L · (1 + λm)^(n - W - L)

Under the hypothesis no factor has a mean above 1, so K is a nonnegative supermartingale that starts at 1, and by
Ville's inequality the chance that it *ever* reaches 1/a is at most a: one may look after every chunk. With m = 0 it
is the mixture likelihood ratio for the share of discordant pairs won. Sources: Robbins, Ann. Math. Stat. 41 (1970),
for mixtures; Waudby-Smith and Ramdas, JRSS B 86 (2024), for betting; Ville (1939).

Candidates are ordered, the promising ones first. Candidate i (counted from 0) is compared at every look with those
before it, and needs K >= i/α, so that the i chances of error add up to at most α:

    beaten     K(m = 0) against the best of the earlier candidates on this prefix reaches i/α: it is worse
    tied       K(m = tie margin) against the first candidate, which is never stopped, reaches i/α: it is not better by
               more than the margin, and the difference seen is within the margin
    behind     the same, but on the images seen it is worse by more than the margin (an estimate, not a proof)
    finished   all images seen

Guarantee: the chance that the truly best candidate is ever stopped as beaten, or as tied or behind while it is better
than the first candidate by more than the margin, is at most α; for images drawn independently from what accuracy is
about and candidates fixed beforehand. (In a class-balanced set K is smaller on average at every fixed look, by
Maclaurin's inequality. Candidates that were proposed for what others did on the same images, as Optuna's later rounds
are, have no such guarantee among each other; nor has the final naming of ties, which tests once more.)

A decision depends on results at the same look or before, of candidates before: never on which result arrived first.
So a race that was killed and replayed, or ran on other workers, comes to the same decisions. Where an earlier
candidate is behind, the later one runs on, and what it saw past its decision is discarded.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vitq_ray.base.config import Config, InputError, require_int

Bools = npt.NDArray[np.bool_]

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
        alpha: chance of losing the best candidate, in (0, 1); what that means is in the module's docstring.
        tie_margin: difference of accuracies, as a fraction, that is not worth telling apart.
    """

    images: int
    chunk: int
    alpha: float = 0.05
    tie_margin: float = 0.005

    def __post_init__(self) -> None:
        require_int("images of a race", self.images, 1)
        require_int("images of a chunk", self.chunk, 1)
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha: expected a number between 0 and 1, got {self.alpha!r}")
        if not 0 <= self.tie_margin < 1:
            raise InputError(f"tie margin: expected a fraction in [0, 1), got {self.tie_margin!r}")

    @property
    def looks(self) -> tuple[int, ...]:
        """Prefix lengths at which decisions are made; the last one is all images."""
        return (*range(self.chunk, self.images, self.chunk), self.images)


@dataclass(frozen=True)
class Decision:
    """How a candidate's race ended.

    Attributes:
        images: length of the prefix that decided; results past it do not count.
        against: the opponent, None where all images were seen.
        wins, losses: discordant pairs on the prefix that the opponent, and the candidate, got right.
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
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).mean()))


def discordant(opponent: Bools, candidate: Bools) -> tuple[int, int]:
    """(W, L): images that only the opponent, and only the candidate, got right; both (n,) bool."""
    return int((opponent & ~candidate).sum()), int((candidate & ~opponent).sum())


@dataclass
class _Runner:
    """One candidate: its results so far, how many looks were judged, and its decision."""

    name: str
    correct: Bools
    seen: int = 0
    judged: int = 0  # looks
    decision: Decision | None = None

    @property
    def kept(self) -> int:
        """Images whose results count."""
        return self.seen if self.decision is None else self.decision.images


@dataclass
class Race:
    """Results in, decisions out. Candidates are compared in the order in which they `enter`."""

    rules: RaceRules
    _runners: list[_Runner] = field(default_factory=list)
    _by_name: dict[str, _Runner] = field(default_factory=dict)

    def enter(self, name: str) -> None:
        if name in self._by_name:
            raise ValueError(f"candidate {name!r} is in the race already")
        runner = _Runner(name, np.zeros(self.rules.images, bool))
        self._runners.append(runner)
        self._by_name[name] = runner

    def record(self, name: str, start: int, correct: Bools) -> bool:
        """Take in results for images `start` … of the order; False where they were known already.

        A chunk may come twice, after the loss of a worker. One that leaves a gap is a ValueError.
        """
        runner = self._by_name[name]
        end = start + len(correct)
        if not 0 <= start <= runner.seen or end > self.rules.images:
            raise ValueError(f"candidate {name!r}: results {start} to {end}, {runner.seen} seen")
        if end <= runner.seen:
            return False
        runner.correct[start:end] = correct
        runner.seen = end
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
        runner = self._runners[i]
        if look == self.rules.images:
            return Decision(runner.name, Verdict.FINISHED, look)
        if i == 0:
            return None
        needed = math.log(i / self.rules.alpha)
        best = max(self._opponents(i, look), key=lambda e: int(e.correct[:look].sum()))
        worse, no_better = (best, 0.0), (self._runners[0], self.rules.tie_margin)
        for opponent, margin in (worse, no_better):
            wins, losses = discordant(opponent.correct[:look], runner.correct[:look])
            evidence = log_evidence(wins, losses, look, margin)
            if evidence >= needed:
                verdict = Verdict.BEATEN if margin == 0 else self._within_margin(wins - losses, look)
                return Decision(runner.name, verdict, look, opponent.name, wins, losses, evidence)
        return None

    def _within_margin(self, difference: int, images: int) -> Verdict:
        return Verdict.TIED if difference <= self.rules.tie_margin * images else Verdict.BEHIND

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

    def correct(self, name: str) -> Bools:
        """Results that count, (n,) bool in the order of the race; of decided candidates up to the decision."""
        runner = self._by_name[name]
        return runner.correct[: runner.kept]

    @property
    def images_evaluated(self) -> int:
        """Of all candidates together, what was evaluated past a decision included."""
        return sum(runner.seen for runner in self._runners)

    @property
    def over(self) -> bool:
        return all(runner.decision is not None for runner in self._runners)

    def leader(self) -> str | None:
        """Most correct among the finished, the earlier on equal counts; None before one has finished."""
        finished = [r for r in self._runners if r.decision is not None and r.decision.verdict is Verdict.FINISHED]
        return max(finished, key=lambda r: int(r.correct.sum())).name if finished else None


def standings(race: Race) -> dict[str, str]:
    """What the race says of each candidate: `best`, `tied`, `behind` or `beaten`.

    Every candidate is compared once more with the best, on the images it has seen and at the same level: one that was
    stopped by the first candidate, or finished, can still turn out to be beaten. What is not beaten is tied where the
    difference seen is within the margin, or cannot be told from chance on all images; else behind.
    """
    best = race.leader()
    if best is None:
        return {}
    return {name: "best" if name == best else _standing(race, name, best) for name in race.names}


def _standing(race: Race, name: str, best: str) -> str:
    decision, correct = race.decision(name), race.correct(name)
    wins, losses = discordant(race.correct(best)[: len(correct)], correct)
    needed = math.log((len(race.names) - 1) / race.rules.alpha)
    verdict = None if decision is None else decision.verdict
    if verdict is Verdict.BEATEN or log_evidence(wins, losses, len(correct)) >= needed:
        return "beaten"
    near = wins - losses <= race.rules.tie_margin * len(correct)
    return "tied" if near or verdict is Verdict.FINISHED else "behind"


def chunks_left(rules: RaceRules, seen: int) -> Sequence[tuple[int, int]]:
    """(start, end) of the chunks that remain after the first `seen` images, each ending at a look."""
    ends = [look for look in rules.looks if look > seen]
    return list(zip([seen, *ends[:-1]], ends, strict=True)) if ends else []
