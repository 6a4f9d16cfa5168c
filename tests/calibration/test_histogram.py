"""Against np.histogram of the float32 array, whose definition of bins this one shares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitq_ray.calibration import histogram as module
from vitq_ray.calibration.histogram import INITIAL_BINS, Histogram, Range, StatisticsError, count_bins


def draw(seed: int, size: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * scale


def numpy_counts(x: torch.Tensor, bins: int = INITIAL_BINS) -> np.ndarray:
    magnitude = np.abs(x.numpy().ravel())
    return np.histogram(magnitude, bins=bins, range=(0, magnitude.max()))[0]


@pytest.mark.parametrize("seed", range(8))
def test_first_batch_equals_numpy(seed: int) -> None:
    x = draw(seed, 200_003, scale=10.0 ** (seed - 4))
    seen = Histogram.observe(x)
    assert seen.counts.dtype == np.int64
    assert seen.max == x.abs().max().item()
    assert seen.width == seen.max / 2048
    np.testing.assert_array_equal(seen.counts, numpy_counts(x))


@settings(max_examples=60, deadline=None)
@given(
    st.floats(2.0**-90, 2.0**90, width=32),
    st.lists(st.tuples(st.integers(0, 2048), st.sampled_from([-1, 0, 1])), max_size=60),
)
def test_values_on_and_beside_the_edges(maximum: float, places: list[tuple[int, int]]) -> None:
    edges = np.linspace(0, np.float32(maximum), INITIAL_BINS + 1, dtype=np.float32)
    values = [np.float32(maximum)]
    for k, side in places:
        towards = np.float32(side * np.inf) if side else edges[k]
        values.append(np.nextafter(edges[k], towards))
    x = torch.from_numpy(np.clip(np.array(values, np.float32), 0, np.float32(maximum)))
    np.testing.assert_array_equal(Histogram.observe(x).counts, numpy_counts(x))


def test_maximum_falls_in_the_last_bin() -> None:
    assert Histogram.observe(torch.tensor([0.0, 2.0, -2.0])).counts[-1] == 2


def test_sign_shape_strides_and_dtype_do_not_matter() -> None:
    x = draw(0, 6000)
    plain = Histogram.observe(x)
    mirrored = Histogram.observe(-x)
    assert (mirrored.width, mirrored.max) == (plain.width, plain.max)
    np.testing.assert_array_equal(mirrored.counts, plain.counts)
    np.testing.assert_array_equal(mirrored.negative, plain.positive)
    assert mirrored.range == Range(-plain.range.high, -plain.range.low)
    assert Histogram.observe(x.reshape(10, 20, 30).permute(2, 0, 1)) == plain
    assert Histogram.observe(x.double()) == plain


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(3, 300_001)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: threads)
    np.testing.assert_array_equal(Histogram.observe(x).counts, numpy_counts(x))


def test_accelerator_path_counts_the_same() -> None:
    x = draw(5, 100_000)
    width = x.abs().max().item() / 2048
    np.testing.assert_array_equal(module._count_bins_torch(x, width, 2048), count_bins(x, width, 2048))


def later(x: torch.Tensor, width: float | None = None) -> Histogram | None:
    """As an accelerator counts it, computed here."""
    numbers, value = Histogram.observe_later(x, width)
    return value(numbers.numpy())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("width", [None, 1 / 700])
def test_counting_without_waiting_counts_the_same(scale: float, width: float | None) -> None:
    x = draw(5, 7 * 29 * 493, scale).reshape(7, -1, 29).transpose(0, 1) if width is None else draw(6, 50_000)
    assert later(x, width) == Histogram.observe(x, width)
    numbers, value = Range.observe_later(x)
    assert value(numbers.numpy()) == Range.observe(x)


@settings(max_examples=40, deadline=None)
@given(st.floats(2.0**-90, 2.0**90, width=32), st.lists(st.integers(-2048, 2048), max_size=60), st.integers(1, 5))
def test_edges_without_waiting(maximum: float, places: list[int], grown: int) -> None:
    edges = np.linspace(0, np.float32(maximum), INITIAL_BINS + 1, dtype=np.float32)
    x = torch.from_numpy(np.array([maximum, *(np.sign(k) * edges[abs(k)] for k in places)], np.float32))
    assert later(x) == Histogram.observe(x)
    width = maximum / 2048 / grown  # the range has grown since the first batch
    if grown <= 4:
        assert later(x, width) == Histogram.observe(x, width)
    else:
        assert later(x, width) is None


@pytest.mark.parametrize("width", [None, 0.0, 0.5])
def test_dead_tensors_without_waiting(width: float | None) -> None:
    zeros = torch.zeros(3, 100)
    assert later(zeros, width) == Histogram.observe(zeros, width)
    assert later(draw(0, 10), 0.0) == Histogram.observe(draw(0, 10), 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_without_waiting(bad: float) -> None:
    x = draw(0, 1000)
    x[17] = bad
    for width in (None, 0.01):
        with pytest.raises(StatisticsError, match="NaN or infinite"):
            later(x, width)
    with pytest.raises(StatisticsError, match="empty"):
        later(torch.zeros(0))


def test_counts_past_2_to_the_24() -> None:
    many = 2**24 + 3  # float32 counters stop at 2**24
    seen = Histogram.observe(torch.cat([torch.full((many,), 0.25), torch.ones(1)]))
    assert seen.counts[512] == many


def test_range_grows_by_appending_bins() -> None:
    first, second = draw(0, 1000), draw(1, 1000) * 3
    one = Histogram.observe(first)
    two = Histogram.observe(second, one.width)
    assert two.width == one.width
    assert len(two.counts) == np.ceil(two.max / one.width)
    merged = one.merge(two)
    edges = (np.arange(len(two.counts) + 1) * one.width).astype(np.float32)
    both = np.abs(torch.cat([first, second]).numpy())
    # The maximum of the first batch sits on the upper end of its last bin; in the grown range it starts the next.
    expected = np.histogram(both, bins=edges)[0]
    expected[2047] += 1
    expected[2048] -= 1
    np.testing.assert_array_equal(merged.counts, expected)


def test_merge_is_exact_in_any_order() -> None:
    first = Histogram.observe(draw(0, 1000))
    parts = [first, *(Histogram.observe(draw(s, 777, scale=s), first.width) for s in (1, 2, 3))]
    results = []
    for order in itertools.permutations(parts):
        total = Histogram.empty(first.width)
        for part in order:
            total = total.merge(part)
        results.append(total)
    assert all(total == results[0] for total in results)
    assert results[0].counts.sum() == 1000 + 3 * 777


def test_merging_leaves_the_parts_alone() -> None:
    one = Histogram.observe(draw(0, 100))
    before = one.counts.copy()
    one.merge(one)
    np.testing.assert_array_equal(one.counts, before)


def test_merge_refuses_other_widths() -> None:
    with pytest.raises(StatisticsError, match="cannot be merged"):
        Histogram.observe(torch.ones(3)).merge(Histogram.observe(torch.ones(3) * 2))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
        (torch.tensor([1.0, float("-inf")]), "NaN or infinite"),
        (torch.empty(0), "empty"),
    ],
)
def test_refuses(x: torch.Tensor, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        Histogram.observe(x)


def test_zeros_are_fine_after_the_first_batch() -> None:
    seen = Histogram.observe(torch.zeros(8), width=0.5)
    assert (seen.counts[0], seen.counts.sum(), seen.max) == (8, 8, 0.0)


def test_runaway_range_is_an_error() -> None:
    with pytest.raises(StatisticsError, match="range grew from 2 in the first batch to 4000"):
        Histogram.observe(torch.tensor([4000.0]), width=2 / 2048)


def test_signs_are_kept_apart() -> None:
    """Each side is NumPy's histogram of that side; together they are the histogram of |x|."""
    x = draw(7, 50_000) - 0.3
    histogram = Histogram.observe(x)
    values = x.numpy()
    edges = (np.arange(INITIAL_BINS + 1) * histogram.width).astype(np.float32)
    for counts, side in ((histogram.positive, values[values >= 0]), (histogram.negative, -values[values < 0])):
        np.testing.assert_array_equal(counts, np.histogram(side, bins=edges)[0])
    assert histogram.range == Range(float(values.min()), float(values.max()))
    merged = histogram.merge(Histogram.observe(-3 * x, histogram.width))
    np.testing.assert_array_equal(merged.positive + merged.negative, merged.counts)
    assert merged.range == Range(float((-3 * values).min()), float((-3 * values).max()))


def test_minus_zero_is_not_negative() -> None:
    histogram = Histogram.observe(torch.tensor([-0.0, 0.0, 1.0, -1.0]))
    assert (histogram.positive.sum(), histogram.negative.sum()) == (3, 1)


def test_histograms_of_format_1_have_no_signs() -> None:
    signed = Histogram.observe(draw(1, 100))
    old = Histogram(signed.width, signed.counts, signed.max)
    merged = old.merge(signed)
    np.testing.assert_array_equal(merged.counts, 2 * signed.counts)
    with pytest.raises(StatisticsError, match="has no signs"):
        _ = merged.positive


def test_zero_belongs_to_every_range() -> None:
    assert Range.observe(torch.tensor([2.0, 3.0])) == Range(0.0, 3.0)
    assert Range.observe(torch.tensor([-2.0, -3.0])).max == 3.0
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        Range.observe(torch.tensor([float("nan")]))
