from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vitq_ray.data.loader import Batch
from vitq_ray.measure.evaluation import (
    Evaluation,
    NonFiniteLogitsError,
    evaluate,
    sanity_problem,
    wilson_interval,
)


def batches(sizes: list[int], classes: int = 8) -> list[Batch]:
    """Images whose pixel [0, 0] is the class that `ReadPixel` predicts; labels are sample_id modulo classes."""
    result, start = [], 0
    for size in sizes:
        ids = torch.arange(start, start + size)
        pixels = torch.zeros(size, 2, 2, 3, dtype=torch.uint8)
        pixels[:, 0, 0, 0] = (ids % 3).to(torch.uint8)
        result.append(Batch(pixels, ids % classes, ids))
        start += size
    return result


class ReadPixel(nn.Module):
    """Logits that rank class (pixel + k) mod 8 at place k."""

    def forward(self, pixel: torch.Tensor) -> torch.Tensor:
        return -((torch.arange(8)[None] - pixel[:, None]) % 8).float()


def prepare(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, 0].long()


def test_every_image_counts_the_last_partial_batch_included() -> None:
    result = evaluate(ReadPixel(), batches([5, 5, 3]), prepare)
    ids = np.arange(13)
    np.testing.assert_array_equal(result.sample_ids, ids)
    np.testing.assert_array_equal(result.correct, ids % 3 == ids % 8)
    np.testing.assert_array_equal(result.results["correct5"], (ids % 8 - ids % 3) % 8 < 5)
    assert (result.images, result.top1_correct) == (13, int((ids % 3 == ids % 8).sum()))


def test_a_label_at_place_six_is_not_in_the_top_five() -> None:
    logits = torch.arange(8.0).flip(0).repeat(3, 1)
    result = Evaluation.of_logits(logits, torch.tensor([4, 5, 0]), torch.arange(3))
    assert result.results["correct5"].tolist() == [True, False, True]


def test_batching_does_not_matter() -> None:
    one, many = (evaluate(ReadPixel(), batches(sizes), prepare) for sizes in ([12], [5, 6, 1]))
    assert one.summary() == many.summary()


def test_summary_has_counts_fractions_and_interval() -> None:
    summary = evaluate(ReadPixel(), batches([16]), prepare).summary()
    assert summary["top1"] == summary["top1_correct"] / 16
    low, high = summary["top1_interval95"]
    assert low < summary["top1"] < high


def test_fewer_than_five_classes() -> None:
    logits, labels = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0])
    result = Evaluation.of_logits(logits, labels, torch.tensor([9]))
    assert (result.top1_correct, result.top5_correct) == (0, 1)


def test_nan_logits_are_an_error() -> None:
    with pytest.raises(NonFiniteLogitsError, match="NaN"):
        Evaluation.of_logits(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]), torch.tensor([0]))


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I: 81/263 -> 0.2553 to 0.3662; 0/20 -> 0 to 0.1611
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def evaluation(correct: int, images: int, classes: int = 10) -> Evaluation:
    right = np.arange(images) < correct
    labels = np.arange(images) % classes
    return Evaluation(np.arange(images), labels, {"correct": right, "correct5": right})


@pytest.mark.parametrize(
    ("correct", "images", "problem"), [(10, 100, True), (14, 100, True), (40, 100, False), (3, 10, True)]
)
def test_chance_level(correct: int, images: int, problem: bool) -> None:
    message = sanity_problem(evaluation(correct, images), 10)
    assert (message is not None) == problem
    if message:
        assert "not above chance level (10.00%)" in message


def test_min_top1() -> None:
    message = sanity_problem(evaluation(40, 100), 10, min_top1=0.5)
    assert message == "float top-1 is 40.00%, below the 50.00% asked for"
    assert sanity_problem(evaluation(50, 100), 10, min_top1=0.5) is None


def test_one_class_seen_of_many() -> None:
    """A val (or a `--limit`) of one class: guessing it is no skill, missing it all is no classifier."""
    assert sanity_problem(evaluation(10, 10, classes=1), 1000) is None
    assert "not above chance level (0.10%)" in str(sanity_problem(evaluation(0, 10, classes=1), 1000))


def test_two_classes_seen_of_a_thousand() -> None:
    assert sanity_problem(evaluation(55, 100, classes=2), 1000) is None


def test_majority_share_is_chance_where_all_classes_are_there() -> None:
    labels = np.array([0] * 90 + list(range(10)))
    right = np.arange(100) < 91
    assert sanity_problem(Evaluation(np.arange(100), labels, {"correct": right, "correct5": right}), 10) is not None
