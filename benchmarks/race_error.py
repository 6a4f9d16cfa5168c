"""How often the race by fidelity stops a candidate that is not worse: its test, simulated where the hypothesis holds.

    python benchmarks/race_error.py                      # 10,000 races of two for every distribution, two minutes

X of an image is (a - b) / (a + b), a and b the KL of candidate and opponent; the hypothesis is E[X] <= 0, here with
equality, the hardest case. The test looks after every chunk. Without the guards, which only delay stops, it may err in
at most alpha of the races. The last column is power: the share that is stopped, and after how many images, where the
candidate's KL is a tenth larger than it is under the hypothesis.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np

from vitq_ray.measure.racing import OBJECTIVES, Pair, relative_excess

Kls = tuple[np.ndarray, np.ndarray]  # of opponent and candidate


def of_excess(x: np.ndarray, rng: np.random.Generator) -> Kls:
    """KL with these X, at scales of their own."""
    scale = rng.lognormal(-6, 1.5, len(x))
    return (1 - x) * scale, (1 + x) * scale


def skewed(images: int, rng: np.random.Generator, up: float) -> Kls:
    """X is 1 - up with chance `up`, else -up."""
    return of_excess(np.where(rng.random(images) < up, 1 - up, -up), rng)


def exchangeable(images: int, rng: np.random.Generator, sigma: float) -> Kls:
    """KL of an image times a factor of each: lognormal, with a common part."""
    common, own = rng.lognormal(-6, 1.5, images), rng.lognormal(0, sigma, (2, images))
    return common * own[0], common * own[1]


def heavy(images: int, rng: np.random.Generator) -> Kls:
    """Pareto tails without a mean: rankings by mean KL mean nothing here, X is bounded all the same."""
    a, b = 1e-4 * (1 + rng.pareto(0.8, (2, images)))
    return a, b


def mostly_equal(images: int, rng: np.random.Generator) -> Kls:
    """Nine images of ten are the same to both."""
    a, b = exchangeable(images, rng, 0.5)
    return a, np.where(rng.random(images) < 0.9, a, b)


FAMILIES: dict[str, Callable[[int, np.random.Generator], Kls]] = {
    "exchangeable, factors of 5 %": lambda n, rng: exchangeable(n, rng, 0.05),
    "exchangeable, factors of 3": lambda n, rng: exchangeable(n, rng, 1.0),
    "heavy tails": heavy,
    "mostly equal": mostly_equal,
    "X = ±1, a fair coin": lambda n, rng: of_excess(rng.choice([-1.0, 1.0], n), rng),
    "X = 0.9 or -0.1": lambda n, rng: skewed(n, rng, 0.1),
    "X = 0.1 or -0.9": lambda n, rng: skewed(n, rng, 0.9),
    "X = 0.99 or -0.01": lambda n, rng: skewed(n, rng, 0.01),
}


def stopped_at(opponent: np.ndarray, candidate: np.ndarray, chunk: int, alpha: float) -> int | None:
    """Images after which a candidate is stopped by its first opponent, guards apart; None where it is not."""
    needed, pair = math.log(1 / alpha), Pair()
    for look in range(chunk, len(opponent) + 1, chunk):
        pair = pair.extended({"kl": opponent}, {"kl": candidate}, ("kl",), look)
        if OBJECTIVES["fidelity"].evidence(pair, 0.0) >= needed:
            return look
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--chunk", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(f"{args.races} races of two, {args.images} images, chunks of {args.chunk}, alpha {args.alpha}")
    print(
        f"{'distribution under the hypothesis':34} {'mean X':>8}  {'stopped wrongly':>15}  a tenth worse: stopped, at"
    )
    for name, family in FAMILIES.items():
        rng = np.random.default_rng(args.seed)
        wrong, mean, found = 0, 0.0, []
        for _ in range(args.races):
            opponent, candidate = family(args.images, rng)
            mean += relative_excess(opponent, candidate).mean() / args.races
            wrong += stopped_at(opponent, candidate, args.chunk, args.alpha) is not None
            found.append(stopped_at(opponent, 1.1 * candidate, args.chunk, args.alpha))
        at = [look for look in found if look is not None]
        after = f"{np.median(at):.0f} images" if at else "-"
        share = len(at) / args.races
        print(f"{name:34} {mean:>8.4f}  {wrong / args.races:>15.2%}  {share:>22.1%}, {after}", flush=True)


if __name__ == "__main__":
    main()
