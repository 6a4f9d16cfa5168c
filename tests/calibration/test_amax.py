"""Calibrators against brute force: the definitions, written as slowly and plainly as possible."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitq_ray.base.config import InputError
from vitq_ray.calibration.calibrators import (
    entropy_amax,
    entropy_bin,
    entropy_divergences,
    max_amax,
    mse_amax,
    percentile_amax,
)
from vitq_ray.calibration.histogram import Histogram


def histogram(seed: int, grown: bool = False) -> Histogram:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30_000, generator=generator) ** 3
    seen = Histogram.observe(x)
    return seen.merge(Histogram.observe(x * 1.3, seen.width)) if grown else seen


HISTOGRAMS = [histogram(0), histogram(1), histogram(2, grown=True)]


def brute_force_percentile(h: Histogram, p: float) -> float:
    if p == 100:
        return h.max
    running = 0.0
    for k, count in enumerate(h.counts):
        running += count / h.counts.sum()
        if running >= p / 100:
            return k * h.width
    return (len(h.counts) - 1) * h.width


def brute_force_mse(h: Histogram, bits: int) -> float:
    centres = (np.arange(len(h.counts)) + 0.5) * h.width
    qmax = 2 ** (bits - 1) - 1
    errors = []
    for amax in centres[128:]:
        quantized = np.clip(np.round(centres * qmax / amax), -qmax, qmax) * amax / qmax
        errors.append(np.mean(h.counts * (centres - quantized) ** 2))
    return float(centres[128 + int(np.argmin(errors))])


def brute_force_divergences(counts: np.ndarray, levels: int) -> np.ndarray:
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    result = []
    for i in range(128, len(counts) + 1):
        reference = counts[:i].copy()
        reference[-1] += counts[i:].sum()
        level = np.arange(i) * levels // i
        filled = counts[:i] > 0
        mass = np.bincount(level, counts[:i], levels)
        number = np.maximum(np.bincount(level, filled, levels), 1)
        candidate = np.where(filled, (mass / number)[level], 0.0)
        r, c = reference / reference.sum(), candidate / candidate.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(r > 0, r * np.log(r / c), 0.0)
        result.append(terms.sum())
    return np.array(result)


def test_max() -> None:
    assert max_amax(HISTOGRAMS).tolist() == [h.max for h in HISTOGRAMS]


def test_percentile() -> None:
    percentiles = [0, 12.5, 50, 99, 99.9, 99.99, 99.9999, 100]
    amax = percentile_amax(HISTOGRAMS, percentiles)
    expected = [[brute_force_percentile(h, p) for h in HISTOGRAMS] for p in percentiles]
    assert amax.shape == (8, 3)
    np.testing.assert_array_equal(amax, expected)


def test_percentile_is_the_lower_edge_of_the_bin() -> None:
    counts = np.zeros(2048, np.int64)
    counts[[0, 10, 2047]] = [50, 49, 1]
    h = Histogram(0.5, counts, 1024.0)
    assert percentile_amax([h], [50, 50.1, 99, 99.1, 100]).ravel().tolist() == [0, 5, 5, 1023.5, 1024]


def test_percentile_that_rounding_leaves_unreached() -> None:
    h = Histogram(1.0, np.full(2048, 7, np.int64), 2048.0)
    just_below = np.nextafter(100, 0)
    assert percentile_amax([h], [just_below]).item() == 2047.0


@pytest.mark.parametrize("percentile", [-1, 100.01, float("nan")])
def test_percentile_out_of_range(percentile: float) -> None:
    with pytest.raises(InputError, match="expected numbers in"):
        percentile_amax(HISTOGRAMS, [percentile])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse(bits: int) -> None:
    expected = [brute_force_mse(h, bits) for h in HISTOGRAMS]
    np.testing.assert_allclose(mse_amax(HISTOGRAMS, bits), expected, rtol=1e-12)


def test_mse_first_minimum_wins() -> None:
    # All mass in the first bin rounds to 0 for every candidate: the same error again and again.
    counts = np.zeros(2048, np.int64)
    counts[0] = 5
    h = Histogram(1.0, counts, 0.5)
    assert mse_amax([h], 8).item() == brute_force_mse(h, 8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("h", HISTOGRAMS)
def test_entropy_divergences(h: Histogram, bits: int) -> None:
    expected = brute_force_divergences(h.counts, 2 ** (bits - 1))
    ours = entropy_divergences(h.counts, 2 ** (bits - 1))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))
    np.testing.assert_allclose(ours, expected, atol=1e-11)


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy(bits: int) -> None:
    expected = []
    for h in HISTOGRAMS:
        divergence = brute_force_divergences(h.counts, 2 ** (bits - 1))
        last_minimum = len(divergence) - 1 - int(np.argmin(divergence[::-1]))
        expected.append((128 + last_minimum) * h.width)
    np.testing.assert_array_equal(entropy_amax(HISTOGRAMS, bits), expected)


def test_entropy_last_minimum_wins() -> None:
    # All mass in the first bins, each alone in its level: nothing is lost from any i on, KL is 0 again and again.
    counts = np.zeros(2048, np.int64)
    counts[[1, 64]] = [3, 1]
    divergence = brute_force_divergences(counts, 128)
    ties = np.flatnonzero(divergence <= np.nanmin(divergence) + 1e-12)
    assert len(ties) > 1
    assert entropy_bin(counts, 128) == 128 + ties[-1]


def test_entropy_does_not_change_its_input() -> None:
    h = histogram(5)
    before = h.counts.copy()
    entropy_amax([h])
    np.testing.assert_array_equal(h.counts, before)


def test_no_sites() -> None:
    assert max_amax([]).shape == mse_amax([]).shape == entropy_amax([]).shape == (0,)
    assert percentile_amax([], [99.0, 99.9]).shape == (2, 0)
