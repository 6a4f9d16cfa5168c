"""Racing: the statistic against brute force, the guarantee by simulation, and decisions that know no clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from vitq_ray.base.config import InputError
from vitq_ray.measure.racing import (
    OBJECTIVES,
    Decision,
    Pair,
    Race,
    RaceRules,
    Verdict,
    chunks_left,
    discordant,
    log_evidence,
    relative_excess,
    standings,
)


def capital(pairs: Sequence[int | Fraction], margin: Fraction) -> Fraction:
    """The gambler's mean capital, bet by bet in exact arithmetic."""
    total = Fraction(0)
    for j in range(32):
        bet, money = Fraction(2 * j + 1, 64), Fraction(1)
        for x in pairs:
            money *= 1 + bet * (x + margin)
        total += money
    return total / 32


@pytest.mark.parametrize("pairs", [[1], [-1], [0], [1, 1, -1, 0, 1], [0] * 20 + [1] * 7, [-1] * 9 + [1]])
@pytest.mark.parametrize("margin", [Fraction(0), Fraction(1, 200), Fraction(1, 4)])
def test_evidence_is_the_mean_capital(pairs: list[int], margin: Fraction) -> None:
    got = log_evidence(pairs.count(1), pairs.count(-1), len(pairs), float(margin))
    assert got == pytest.approx(math.log(capital(pairs, margin)), abs=1e-9)


@pytest.mark.parametrize("margin", [Fraction(0), Fraction(1, 10)])
def test_capital_is_fair_on_the_boundary(margin: Fraction) -> None:
    """Its mean over all sequences of five images is exactly 1 where E[X] = -margin."""
    up, down = Fraction(2, 10), Fraction(2, 10) + margin
    chance = {1: up, -1: down, 0: 1 - up - down}
    mean = sum(
        (math.prod((chance[x] for x in path), start=Fraction(1)) * capital(list(path), margin))
        for path in itertools.product((1, 0, -1), repeat=5)
    )
    assert mean == 1


def test_evidence_of_thousands_of_pairs_is_finite() -> None:
    assert log_evidence(25_000, 0, 25_000) > 15_000
    assert log_evidence(0, 25_000, 25_000) < -100


def test_discordant() -> None:
    a, b = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
    assert discordant(a, b) == (2, 1)


def field_of(accuracies: list[float], images: int, flips: float, rng: np.random.Generator) -> np.ndarray:
    """(candidates, images) results that agree on most images, as those of one model at different scales do.

    Image by image a common result with the mean of the best accuracy; candidate k turns a share `flips` of the wrong
    ones right and as many right ones wrong as its accuracy asks for.
    """
    top = max(accuracies)
    base = rng.random(images) < top
    rows = []
    for accuracy in accuracies:
        gain = flips / 2 / (1 - top)
        loss = (top + flips / 2 - accuracy) / top
        rows.append(np.where(base, rng.random(images) >= loss, rng.random(images) < gain))
    return np.array(rows)


def run(results: np.ndarray, rules: RaceRules, order: list[int] | None = None) -> Race:
    """A whole race, one candidate after the other."""
    race = Race(rules)
    for i in range(len(results)):
        race.enter(f"c{i}")
    for i in order or range(len(results)):
        name = f"c{i}"
        for start, end in chunks_left(rules, 0):
            if race.decision(name) is not None:
                break
            race.record(name, start, {"correct": results[i, start:end]})
            race.judge()
    return race


def test_a_clear_loser_stops_early_and_the_best_is_found() -> None:
    results = field_of([0.85, 0.70, 0.90, 0.60], 4000, 0.02, np.random.default_rng(0))
    race = run(results, RaceRules(4000, 100))
    assert race.over
    assert race.leader() == "c2"
    for name in ("c1", "c3"):
        decision = race.decision(name)
        assert decision is not None
        assert decision.verdict is Verdict.BEATEN
        assert decision.images <= 400
        assert decision.wins > decision.losses
        assert decision.evidence >= math.log(int(name[1:]) / 0.05)
    assert standings(race) == {"c0": "beaten", "c1": "beaten", "c2": "best", "c3": "beaten"}


def test_equal_candidates_are_tied_within_the_margin() -> None:
    results = field_of([0.9] * 6, 10_000, 0.004, np.random.default_rng(1))
    race = run(results, RaceRules(10_000, 250, tie_margin=0.01))
    verdicts = [race.decision(f"c{i}").verdict for i in range(1, 6)]  # type: ignore[union-attr]
    assert set(verdicts) <= {Verdict.TIED, Verdict.BEHIND}
    assert verdicts.count(Verdict.TIED) >= 4
    assert race.images_evaluated < 0.5 * 60_000
    assert set(standings(race).values()) <= {"best", "tied", "behind"}


@pytest.mark.parametrize(("lost", "verdict", "standing"), [(6, Verdict.TIED, "tied"), (7, Verdict.BEHIND, "behind")])
def test_one_that_cannot_win_by_the_margin_is_stopped_before_it_is_beaten(
    lost: int, verdict: Verdict, standing: str
) -> None:
    """Too few images lost to be beaten, but it will not be better by a point; 5 of 500 images are the margin."""
    first, other = np.ones(3000, bool), np.ones(3000, bool)
    first[100], other[100] = False, True
    other[200 : 200 + lost] = False
    race = run(np.array([first, other]), RaceRules(3000, 500, alpha=0.01, tie_margin=0.01))
    decision = race.decision("c1")
    assert decision is not None
    assert (decision.verdict, decision.images, decision.wins, decision.losses) == (verdict, 500, lost, 1)
    assert log_evidence(lost, 1, 500) < math.log(100) <= decision.evidence
    assert standings(race) == {"c0": "best", "c1": standing}


def test_without_a_margin_nothing_is_stopped_as_tied() -> None:
    results = np.ones((3, 2000), bool)
    race = run(results, RaceRules(2000, 100, tie_margin=0.0))
    assert [race.decision(n).verdict for n in race.names] == [Verdict.FINISHED] * 3  # type: ignore[union-attr]
    assert race.leader() == "c0", "the earlier on equal counts"


def test_the_first_candidate_is_never_stopped() -> None:
    results = field_of([0.5, 0.9, 0.9], 2000, 0.02, np.random.default_rng(2))
    race = run(results, RaceRules(2000, 100))
    assert race.decision("c0") == Decision("c0", Verdict.FINISHED, 2000)
    assert race.leader() in ("c1", "c2")
    assert standings(race)["c0"] == "beaten"


@pytest.mark.parametrize("seed", range(5))
def test_decisions_do_not_depend_on_arrival(seed: int) -> None:
    """Any interleaving of chunks that keeps each candidate's own order gives the decisions of one after the other."""
    rng = np.random.default_rng(seed)
    results = field_of([0.86, 0.9, 0.88, 0.7, 0.9, 0.89, 0.9], 3000, 0.01, rng)
    rules = RaceRules(3000, 150, tie_margin=0.01)
    expected = run(results, rules)

    race = Race(rules)
    for i in range(len(results)):
        race.enter(f"c{i}")
    left = {f"c{i}": list(chunks_left(rules, 0)) for i in range(len(results))}
    while running := [n for n in left if left[n] and race.decision(n) is None]:
        name = running[int(rng.integers(len(running)))]
        start, end = left[name].pop(0)
        race.record(name, start, {"correct": results[int(name[1:]), start:end]})
        race.judge()
    assert race.over
    assert [race.decision(n) for n in race.names] == [expected.decision(n) for n in expected.names]
    assert race.leader() == expected.leader()
    for name in race.names:
        here, there = (r.results(name)["correct"] for r in (race, expected))
        assert np.array_equal(here, there), "results past a decision are discarded"


def test_chunks_may_come_twice_but_leave_no_gap() -> None:
    race = Race(RaceRules(10, 4))
    race.enter("a")
    with pytest.raises(ValueError, match="in the race already"):
        race.enter("a")
    assert race.record("a", 0, {"correct": np.ones(4, bool)})
    assert not race.record("a", 0, {"correct": np.zeros(4, bool)})
    assert race.results("a")["correct"].all()
    with pytest.raises(ValueError, match="results 8 to 10, 4 seen"):
        race.record("a", 8, {"correct": np.ones(2, bool)})


def test_looks_and_chunks() -> None:
    rules = RaceRules(10, 4)
    assert rules.looks == (4, 8, 10)
    assert list(chunks_left(rules, 0)) == [(0, 4), (4, 8), (8, 10)]
    assert list(chunks_left(rules, 4)) == [(4, 8), (8, 10)]
    assert list(chunks_left(rules, 10)) == []
    assert RaceRules(3, 4).looks == (3,)


@pytest.mark.parametrize(
    ("images", "chunk", "first", "looks"),
    [
        (500, 100, 25, (25, 50, 100, 200, 300, 400, 500)),
        (30, 10, 8, (8, 16, 26, 30)),
        (20, 10, 10, (10, 20)),
        (5, 10, 8, (5,)),
    ],
)
def test_first_looks_are_closer_together(images: int, chunk: int, first: int, looks: tuple[int, ...]) -> None:
    rules = RaceRules(images, chunk, first=first)
    assert rules.looks == looks
    assert [end for _, end in chunks_left(rules, 0)] == list(looks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 0.0}, "alpha: expected a number between 0 and 1, got 0.0"),
        ({"alpha": float("nan")}, "alpha: .* got nan"),
        ({"tie_margin": -0.1}, "tie margin: .* got -0.1"),
        ({"objective": "kl"}, "objective: 'kl' is not one of fidelity, top1"),
        ({"images": 0}, "images of a race: expected an integer >= 1, got 0"),
        ({"chunk": 0}, "images of a chunk: "),
        ({"first": 3}, "images before the first look: expected an integer from 1 to 2, got 3"),
    ],
)
def test_bad_rules(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RaceRules(**({"images": 10, "chunk": 2} | values))  # type: ignore[arg-type]


def lost_best(accuracies: list[float], races: int, rules: RaceRules, seed: int) -> tuple[int, float]:
    """(races in which the truly best one, or all within the margin of it, were stopped; share of images evaluated)."""
    rng = np.random.default_rng(seed)
    close = [i for i, a in enumerate(accuracies) if a >= max(accuracies) - rules.tie_margin]
    lost, images = 0, 0
    for _ in range(races):
        race = run(field_of(accuracies, rules.images, 0.02, rng), rules)
        best = f"c{int(np.argmax(accuracies))}"
        stopped = {n for n in race.names if race.decision(n).verdict is not Verdict.FINISHED}  # type: ignore[union-attr]
        beaten = race.decision(best).verdict is Verdict.BEATEN  # type: ignore[union-attr]
        lost += beaten or {f"c{i}" for i in close} <= stopped
        images += race.images_evaluated
    return lost, images / (races * len(accuracies) * rules.images)


def test_the_best_is_kept() -> None:
    """300 races of a close field, the best one last: at alpha 0.2, 60 may go wrong; 9 do, without i/alpha 46 do."""
    lost, share = lost_best([0.9, 0.9, 0.899, 0.898, 0.9005], 300, RaceRules(2000, 50, alpha=0.2), seed=3)
    assert lost <= 25
    assert share < 1


def test_the_simulation_can_fail() -> None:
    """With next to no level to hold, the same simulation does lose the best one."""
    rules = RaceRules(2000, 50, alpha=0.999999, tie_margin=0.0)
    lost, _ = lost_best([0.9, 0.9, 0.9, 0.900001], 100, rules, seed=4)
    assert lost > 10


# By fidelity ---------------------------------------------------------------------------------------------------------


def race_by_fidelity(kl: np.ndarray, correct: np.ndarray | None = None, **rules: float) -> Race:
    """A whole race of (candidates, images) KL, and results of top-1 where there are labels."""
    images = kl.shape[1]
    race = Race(RaceRules(**({"images": images, "chunk": images // 20, "objective": "fidelity"} | rules)))
    for i in range(len(kl)):
        race.enter(f"c{i}")
    for i in range(len(kl)):
        for start, end in chunks_left(race.rules, 0):
            if race.decision(f"c{i}") is None:
                part = {"kl": kl[i, start:end].astype(np.float32)}
                race.record(f"c{i}", start, part if correct is None else {**part, "correct": correct[i, start:end]})
                race.judge()
    return race


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ([3.0], [1.0]),
        ([0.0, 1.0], [0.0, 0.0]),
        ([0.25, 0.5, 1.0, 0.0], [0.75, 0.5, 0.0, 1.0]),
        ([1.0] * 30, [3.0] * 30),
    ],
)
def test_evidence_of_fidelity_is_the_mean_capital(ours: list[float], other: list[float]) -> None:
    x = [Fraction(a - b) / Fraction(a + b) if a + b else Fraction(0) for a, b in zip(ours, other, strict=True)]
    assert relative_excess(np.array(other), np.array(ours)).tolist() == [float(value) for value in x]
    opponent, candidate = {"kl": np.array(other, np.float32)}, {"kl": np.array(ours, np.float32)}
    for cut in range(len(x)):  # in two parts, which add up
        pair = Pair().extended(opponent, candidate, ("correct", "kl"), cut)
        pair = pair.extended(opponent, candidate, ("correct", "kl"), len(x))
        wanted = math.log(capital(x, Fraction(0)))
        assert OBJECTIVES["fidelity"].evidence(pair, 0.0) == pytest.approx(wanted, abs=1e-9)
        counts = (sum(value > 0 for value in x), sum(value < 0 for value in x))
        assert OBJECTIVES["fidelity"].counts(pair) == counts


def test_those_that_are_further_from_float_stop_early() -> None:
    rng = np.random.default_rng(0)
    kl = rng.lognormal(-7, 1.5, 4000) * np.array([[2.0], [1.0], [4.0], [1.0]]) * rng.lognormal(0, 0.3, (4, 4000))
    race = race_by_fidelity(kl)
    decisions = {name: race.decision(name) for name in race.names}
    assert decisions["c2"].verdict is Verdict.BEATEN  # type: ignore[union-attr]
    assert decisions["c2"].images == 200  # type: ignore[union-attr]
    assert decisions["c2"].against == "c1"  # type: ignore[union-attr]
    assert decisions["c2"].wins > decisions["c2"].losses  # type: ignore[union-attr]
    means = kl.astype(np.float32).mean(axis=1, dtype=float)
    best, tied = sorted(("c1", "c3"), key=lambda name: means[int(name[1:])])
    assert standings(race) == {"c0": "beaten", "c2": "beaten", best: "best", tied: "tied"}
    assert race.mean("c1") == pytest.approx(means[1])


def test_more_images_classified_correctly_than_the_opponent_keep_a_candidate() -> None:
    """By KL it is beaten at the first look; it gets 3 of 400 right that the other does not, and 2 are the margin."""
    kl = np.outer([1.0, 3.0], np.ones(400))
    correct = np.ones((2, 400), bool)
    correct[0, :3] = False
    beaten = race_by_fidelity(kl, correct, tie_margin=0.0076).decision("c1")
    assert beaten is not None
    assert beaten.images > 380, "only there are 3 images no more than the margin"
    assert race_by_fidelity(kl, correct, tie_margin=0.005).decision("c1").verdict is Verdict.FINISHED  # type: ignore[union-attr]
    assert race_by_fidelity(kl).decision("c1").images == 20  # type: ignore[union-attr]


def test_the_lower_mean_keeps_a_candidate() -> None:
    """On nine images of ten it is the one further off, on the tenth far closer: X is against it, the mean is not."""
    kl = np.array([[*[1.0] * 9, 100.0] * 40, [*[2.0] * 9, 1.0] * 40])
    race = race_by_fidelity(kl)
    assert race.decision("c1").verdict is Verdict.FINISHED  # type: ignore[union-attr]
    assert race.leader() == "c1"
    assert standings(race)["c0"] == "tied"


@pytest.mark.parametrize(("lost", "leader"), [(3, "c0"), (30, "c1")])
def test_the_winner_is_not_proven_worse_in_top1(lost: int, leader: str) -> None:
    kl = np.outer([1.0, 1.0001], np.ones(400))
    correct = np.ones((2, 400), bool)
    correct[0, :lost] = False
    race = race_by_fidelity(kl, correct)
    assert race.leader() == leader
    assert standings(race) == ({"c0": "best", "c1": "tied"} if lost == 3 else {"c0": "beaten", "c1": "best"})


def test_equal_results_are_a_tie() -> None:
    race = race_by_fidelity(np.zeros((3, 400)))
    assert race.leader() == "c0"
    assert set(standings(race).values()) == {"best", "tied"}


def test_results_without_what_decides_are_refused() -> None:
    race = Race(RaceRules(10, 4, objective="fidelity"))
    race.enter("a")
    with pytest.raises(ValueError, match="candidate 'a': results without 'kl', which the race is decided by"):
        race.record("a", 0, {"correct": np.ones(4, bool)})


def fair(kind: str, images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """KL of opponent and candidate with E[X] = 0."""
    if kind == "exchangeable":
        return tuple(rng.lognormal(-6, 1.5, (2, images)))  # type: ignore[return-value]
    up = {"coin": 0.5, "skewed": 0.1}[kind]
    high = rng.random(images) < up  # X is (1 - up) with chance up, else -up
    x = np.where(high, 1 - up, -up)
    scale = rng.lognormal(-6, 1, images)
    return (1 - x) * scale, (1 + x) * scale


@pytest.mark.parametrize("kind", ["exchangeable", "coin", "skewed"])
def test_few_are_stopped_that_are_not_worse(kind: str) -> None:
    """400 races at α = 0.1, without the guards: 40 may go wrong."""
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(400):
        opponent, candidate = fair(kind, 600, rng)
        x, pair = relative_excess(opponent, candidate), Pair()
        assert abs(x.mean()) < 0.2
        for look in range(20, 620, 20):
            pair = pair.extended({"kl": opponent}, {"kl": candidate}, ("kl",), look)
            if OBJECTIVES["fidelity"].evidence(pair, 0.0) >= math.log(1 / 0.1):
                wrong += 1
                break
    assert 2 <= wrong <= 40, "it can go wrong, and rarely does"
