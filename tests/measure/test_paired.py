"""Paired intervals against the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from vitq_ray.measure.paired import Interval, accuracy_difference, mean_ratio


def test_difference_of_accuracies_is_as_wide_as_the_bootstrap_says() -> None:
    rng = np.random.default_rng(0)
    reference = rng.random(2000) < 0.9
    candidate = reference ^ (rng.random(2000) < np.where(reference, 0.04, 0.2))
    found = accuracy_difference(candidate, reference)
    assert found.value == pytest.approx(candidate.mean() - reference.mean(), abs=1e-12)
    draws = rng.integers(0, 2000, (4000, 2000))
    low, high = np.quantile(candidate[draws].mean(1) - reference[draws].mean(1), [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.002), pytest.approx(high, abs=0.002))


def test_equal_candidates_still_have_an_interval() -> None:
    same = np.ones(50, bool)
    found = accuracy_difference(same, same)
    assert found.value == 0
    assert found.low == -found.high < 0


def test_ratio_of_means_is_as_wide_as_the_bootstrap_says() -> None:
    rng = np.random.default_rng(1)
    reference = rng.gamma(0.5, 0.02, 3000).astype(np.float32)
    candidate = (reference * rng.gamma(2.0, 0.8, 3000)).astype(np.float32)
    found = mean_ratio(candidate, reference)
    assert found.value == pytest.approx(candidate.mean(dtype=float) / reference.mean(dtype=float))
    draws = rng.integers(0, 3000, (3000, 3000))
    low, high = np.quantile(candidate[draws].mean(1) / reference[draws].mean(1), [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, rel=0.01), pytest.approx(high, rel=0.01))


def test_nothing_is_said_of_zeros() -> None:
    zeros, some = np.zeros(5, np.float32), np.ones(5, np.float32)
    assert mean_ratio(zeros, some) == mean_ratio(some, zeros) == Interval(1.0, 1.0, 1.0)
