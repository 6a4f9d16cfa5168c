"""The splits of the images: disjoint, balanced, complete, and functions of content and seed alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import make_project
from vitq_ray.base.config import InputError
from vitq_ray.data.samples import open_split
from vitq_ray.data.splits import (
    Splits,
    calibration_ids,
    class_balanced_order,
    default_calib_split,
    make_splits,
    race_order,
    random_order,
    split_val,
)

fingerprints = st.text("0123456789abcdef", min_size=64, max_size=64)
label_lists = st.lists(st.integers(0, 6), min_size=2, max_size=60)
seeds = st.integers(0, 2**31)


def counts(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.bincount(labels[ids], minlength=labels.max() + 1)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9), st.sampled_from(["shuffled", "map"]), seeds)
def test_calibration_ids(small: int, more: int, left: int, order: str, seed: int) -> None:
    size = small + more + left
    first, both = (calibration_ids(size, n, order, seed) for n in (small, small + more))
    assert both[:small].tolist() == first.tolist()
    assert len(set(both.tolist())) == small + more
    assert both.min() >= 0
    assert both.max() < size
    if order == "map":
        assert both.tolist() == list(range(small + more))


def test_calibration_ids_shuffle_by_seed() -> None:
    one, same, other = (calibration_ids(1000, 100, "shuffled", seed).tolist() for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert one != sorted(one)
    with pytest.raises(InputError, match=r"^calibration: needs 81 images \(batches x batch size\), the split has 80$"):
        calibration_ids(80, 81, "shuffled", 0)
    with pytest.raises(InputError, match=r"^calibration order: 'sorted' is not one of shuffled, map$"):
        calibration_ids(80, 8, "sorted", 0)


@given(label_lists, fingerprints, seeds)
def test_halves(label_list: list[int], fingerprint: str, seed: int) -> None:
    labels = np.array(label_list)
    none, selection, report = split_val(labels, fingerprint, seed)
    assert len(none) == 0
    assert sorted([*selection, *report]) == list(range(len(labels)))
    assert selection.tolist() == sorted(selection)
    assert report.tolist() == sorted(report)
    assert abs(counts(labels, selection) - counts(labels, report)).max() <= 1
    assert abs(len(selection) - len(report)) <= 1


@given(label_lists.filter(lambda labels: len(labels) >= 4), fingerprints, seeds, st.data())
def test_thirds(label_list: list[int], fingerprint: str, seed: int, data: st.DataObject) -> None:
    labels = np.array(label_list)
    count = data.draw(st.integers(1, len(labels) - 2))
    calibration, selection, report = split_val(labels, fingerprint, seed, count)
    assert len(calibration) == count
    assert sorted([*calibration, *selection, *report]) == list(range(len(labels)))
    assert_balanced(labels, calibration)
    assert abs(counts(labels, selection) - counts(labels, report)).max() <= 1
    assert abs(len(selection) - len(report)) <= 1


@pytest.mark.parametrize(
    "split",
    [
        lambda labels, fingerprint, seed: split_val(labels, fingerprint, seed),
        lambda labels, fingerprint, seed: split_val(labels, fingerprint, seed, 10),
    ],
    ids=["halves", "thirds"],
)
def test_splits_follow_from_content_and_seed_alone(split: Callable[..., tuple[np.ndarray, ...]]) -> None:
    labels = np.arange(100) % 7
    results = [split(labels, fp * 64, seed) for fp, seed in (("a", 1), ("a", 1), ("b", 1), ("a", 2))]
    as_lists = [[ids.tolist() for ids in result] for result in results]
    assert as_lists[0] == as_lists[1]
    assert as_lists[2] != as_lists[0]
    assert as_lists[3] != as_lists[0]


def test_thirds_leave_two_images() -> None:
    with pytest.raises(InputError, match=r"^calibration: needs 9 of the 10 images of val; none would be left"):
        split_val(np.zeros(10, int), "a" * 64, 0, 9)


def assert_balanced(labels: np.ndarray, ids: np.ndarray) -> None:
    """No class has two more than another, unless that other has no more to give."""
    taken, there = counts(labels, ids), np.bincount(labels)
    assert np.all((taken >= taken.max() - 1) | (taken == there))


@given(label_lists, st.integers(0, 2**31), st.data())
def test_class_balanced_order(label_list: list[int], seed: int, data: st.DataObject) -> None:
    labels = np.array(label_list)
    ids = np.array(data.draw(st.lists(st.integers(0, len(labels) - 1), unique=True, min_size=1)))
    order = class_balanced_order(labels, ids, seed)
    assert sorted(order) == sorted(ids)
    own = labels[ids]  # what each class has to give is counted over ids, not over the split
    for n in range(1, len(order) + 1):
        taken, there = counts(labels, order[:n]), np.bincount(own, minlength=labels.max() + 1)
        assert np.all((taken >= taken.max() - 1) | (taken == there))
    assert order.tolist() == class_balanced_order(labels, ids, seed).tolist()


def test_orders_are_random() -> None:
    """Every image comes first about equally often, within four standard deviations."""
    labels, ids = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 3, 4, 5])
    runs = 1800
    for order in (lambda seed: class_balanced_order(labels, ids, seed), lambda seed: random_order(ids, seed)):
        first = Counter(int(order(seed)[0]) for seed in range(runs))
        assert all(abs(first[i] - runs / 6) < 4 * (runs * 5 / 36) ** 0.5 for i in range(6))


@given(st.lists(st.integers(0, 10**6), unique=True), seeds)
def test_random_order_is_a_permutation(ids: list[int], seed: int) -> None:
    order = random_order(ids, seed)
    assert sorted(order.tolist()) == sorted(ids)
    assert order.tolist() == random_order(ids, seed).tolist()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_to_halve(count: int) -> None:
    with pytest.raises(InputError, match=rf"^val: {count} images cannot be halved into selection and report$"):
        split_val(np.zeros(count, int), "a" * 64, 0)


def test_splits_of_a_project(tmp_path: Path) -> None:
    root = str(make_project(tmp_path, train=40, val=22).folder)
    train, val = open_split(root, "train"), open_split(root, "val")
    assert default_calib_split(root) == "train"
    splits = make_splits("train", train, val, 3, 8, spare_images=2)
    assert (splits.calib_split, len(splits.calibration)) == ("train", 10)
    assert sorted([*splits.selection, *splits.report]) == list(range(22))
    assert len(make_splits("train", train, val, 3, 38, spare_images=32).calibration) == 40
    training = make_splits("train", train, val, 3)
    assert len(training.calibration) == 0
    assert training.report.tolist() == splits.report.tolist(), "a training reports on what the search reported on"
    with pytest.raises(InputError, match="needs 41 images"):
        make_splits("train", train, val, 3, 41)
    (tmp_path / "train.zip").unlink()
    assert default_calib_split(root) == "val"
    alone = make_splits("val", val, val, 3, 8)
    assert sorted([*alone.calibration, *alone.selection, *alone.report]) == list(range(22))


def test_the_order_of_a_race() -> None:
    labels, half = np.arange(60) % 3, np.arange(0, 60, 2)
    order = race_order(labels, half, 12, 1)
    assert set(order) <= set(half)
    assert np.bincount(labels[order]).tolist() == [4, 4, 4]
    assert order.tolist() != sorted(order)
    assert sorted(race_order(labels, half, 1000, 1)) == half.tolist()


def test_splits_in_a_file() -> None:
    splits = Splits("val", np.array([3, 1]), np.array([2, 0]), np.array([4]))
    assert Splits.from_dict(splits.to_dict()).to_dict() == splits.to_dict()
    of_training = Splits.from_dict({"from": "split seed 0", "selection": [1], "report": [2]})
    assert (of_training.calibration.tolist(), of_training.report.tolist()) == ([], [2])
