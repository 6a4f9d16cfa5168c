"""Simulated races: how often the best candidate is lost, and how many images a race takes against a full evaluation.

    python benchmarks/racing.py                                        # 2,000 races of each field, a few minutes
    python benchmarks/racing.py --run runs/tune_calib-…                # also: the candidates of a fully evaluated run

Truth is known here: image by image, a candidate is right with a probability of its own, but most candidates agree on
most images, as those of one model at different scales do. The best candidate is placed at random in the order. "Lost"
counts the races in which the truly best candidate was stopped as beaten, or in which every candidate within the tie
margin of it was stopped: at most alpha of them may be. With `--run`, the results of a search that evaluated every
candidate on all images (`tune_calib.py --chunk-images N`, N = all selection images) are raced in random orders.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from vitq_ray.measure.racing import Race, RaceRules, Verdict, chunks_left

FLIPS = 0.01  # share of images on which an equally good candidate differs
FIELDS: dict[str, Callable[[int], list[float]]] = {
    "easy: one good, the others 2 to 10 points worse": lambda k: [0.90, *np.linspace(0.88, 0.80, k - 1)],
    "hard: steps of 0.1 point": lambda k: list(np.linspace(0.90, 0.90 - 0.001 * (k - 1), k)),
    "mixed: a quarter within 0.2 points, the others worse": lambda k: [
        *np.linspace(0.90, 0.898, k // 4),
        *np.linspace(0.89, 0.80, k - k // 4),
    ],
    "all equal (cost only: none can be lost)": lambda k: [0.90] * k,
}


def results_of(accuracies: Sequence[float], images: int, rng: np.random.Generator) -> np.ndarray:
    """(candidates, images) bool: common results of the best, of which each candidate loses and gains its share."""
    top = max(accuracies)
    base = rng.random(images) < top
    gain = FLIPS / 2 / (1 - top)
    losses = [(top + FLIPS / 2 - accuracy) / top for accuracy in accuracies]
    return np.array([np.where(base, rng.random(images) >= loss, rng.random(images) < gain) for loss in losses])


def race_of(results: np.ndarray, rules: RaceRules) -> Race:
    """A whole race, in the order of the rows."""
    race = Race(rules)
    for i, row in enumerate(results):
        race.enter(str(i))
        for start, end in chunks_left(rules, 0):
            race.record(str(i), start, {"correct": row[start:end]})
            race.judge()
            if race.decision(str(i)) is not None:
                break
    return race


def lost(race: Race, accuracies: np.ndarray) -> bool:
    """Whether the best one was beaten, or everything within the margin of it was stopped."""
    stopped = [race.decision(name).verdict is not Verdict.FINISHED for name in race.names]  # type: ignore[union-attr]
    best = int(accuracies.argmax())
    beaten = race.decision(str(best)).verdict is Verdict.BEATEN  # type: ignore[union-attr]
    near = np.flatnonzero(accuracies >= accuracies.max() - race.rules.tie_margin)
    return beaten or all(stopped[i] for i in near)


def simulated(accuracies: list[float], rules: RaceRules, rng: np.random.Generator) -> tuple[Race, np.ndarray]:
    order = rng.permutation(len(accuracies))
    shuffled = np.array(accuracies)[order]
    return race_of(results_of(list(shuffled), rules.images, rng), rules), shuffled


def evaluated_run(path: Path) -> tuple[list[str], np.ndarray]:
    """(names, (candidates, images) results) of a run in which every candidate saw all images, in its order."""
    outcome = json.loads((path / "result.json").read_text())
    names = [name for name in outcome["selection"] if name != "float"]
    table = pq.read_table(path / "correct.parquet").to_pandas()
    rows = [table[table.candidate == name].correct.to_numpy() for name in names]
    if len({len(row) for row in rows}) != 1:
        raise SystemExit(f"{path}: not every candidate was evaluated on all images; use --chunk-images there")
    return names, np.array(rows)


def orders(results: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """The same results with the images in other random orders."""
    for i in range(count):
        yield results[:, np.random.default_rng(seed + i).permutation(results.shape[1])]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--tie-margin", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="folder of a search that evaluated everything")
    args = parser.parse_args(argv)
    rules = RaceRules(args.images, max(1, args.images // 25), args.alpha, args.tie_margin)

    print(f"{args.races} races of {args.candidates} candidates on {args.images} images, alpha {args.alpha}")
    print(f"{'field':<54} {'lost':>6} {'share':>8} {'images evaluated':>17} {'seconds':>8}")
    for name, field in FIELDS.items():
        clock, wrong, images = time.perf_counter(), 0, 0
        rng = np.random.default_rng(args.seed)
        for _ in range(args.races):
            race, accuracies = simulated(field(args.candidates), rules, rng)
            wrong += lost(race, accuracies)
            images += race.images_evaluated
        full = args.races * args.candidates * args.images
        seconds = time.perf_counter() - clock
        print(f"{name:<54} {wrong:>6} {wrong / args.races:>8.4f} {images / full:>16.1%} {seconds:>8.0f}", flush=True)

    if args.run is not None:
        names, results = evaluated_run(args.run)
        rules = RaceRules(results.shape[1], max(1, results.shape[1] // 25), args.alpha, args.tie_margin)
        best = int(results.sum(axis=1).max())
        print(
            f"\n{args.run}: {len(names)} candidates, {results.shape[1]} images, best {best} correct; 10 random orders"
        )
        for shuffled in orders(results, 10, args.seed):
            race = race_of(shuffled, rules)
            winner = int(race.leader() or 0)
            count, share = int(results[winner].sum()), race.images_evaluated / results.size
            print(f"winner {names[winner]}: {count} correct, {best - count} fewer; {share:.1%} of the images evaluated")


if __name__ == "__main__":
    main()
