"""Evaluation: batches of images -> which images were classified correctly, as counts and one by one.

Counts stay integers; every image counts, the last partial batch included. Per-image results are what lets two
settings be compared on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.data.loader import Batch

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class NonFiniteLogitsError(InputError):
    """The model produced NaN or infinite logits."""


@dataclass(frozen=True)
class Evaluation:
    """Per-image results, (images,) each, in the order in which the images were seen.

    Attributes:
        sample_ids: position of the image in its split.
        labels: class of the image.
        correct: the class with the largest logit is the label.
        correct5: the label is among the five largest logits.
    """

    sample_ids: Ints
    labels: Ints
    correct: Bools
    correct5: Bools

    @property
    def images(self) -> int:
        return len(self.correct)

    @property
    def top1_correct(self) -> int:
        return int(self.correct.sum())

    @property
    def top5_correct(self) -> int:
        return int(self.correct5.sum())

    @property
    def top1(self) -> float:
        """Fraction in [0, 1]; 0 images have no accuracy and raise."""
        return self.top1_correct / self.images

    @property
    def top5(self) -> float:
        return self.top5_correct / self.images

    def summary(self) -> dict[str, Any]:
        """Counts, fractions and the 95 % interval of top-1, for result files."""
        return {
            "images": self.images,
            "top1_correct": self.top1_correct,
            "top5_correct": self.top5_correct,
            "top1": self.top1,
            "top5": self.top5,
            "top1_interval95": list(wilson_interval(self.top1_correct, self.images)),
        }

    @staticmethod
    def of_logits(logits: Tensor, labels: Tensor, sample_ids: Tensor) -> Evaluation:
        """Judge logits (B, classes) by labels (B,). With fewer than five classes, top-5 is top-`classes`."""
        if not torch.isfinite(logits).all():
            raise NonFiniteLogitsError("the model produced NaN or infinite logits")
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        hits = best == labels[:, None].cpu()
        return Evaluation(sample_ids.cpu().numpy(), labels.cpu().numpy(), hits[:, 0].numpy(), hits.any(dim=1).numpy())

    @staticmethod
    def concatenate(parts: Sequence[Evaluation]) -> Evaluation:
        """All results after each other; (0,) arrays where there are no parts."""
        empty = Evaluation(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool), np.empty(0, bool))
        parts = parts or [empty]
        fields = ("sample_ids", "labels", "correct", "correct5")
        return Evaluation(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Tensor], Tensor],
    on_batch: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
) -> Evaluation:
    """Classify every image of `batches`.

    Args:
        model: (B, 3, S, S) float32 -> (B, classes) logits.
        prepare: uint8 images (B, S, S, 3) -> what the model takes, on the model's device.
        on_batch: sees every batch and its logits, for progress or for keeping them.
    """
    model.eval()
    parts = []
    with torch.inference_mode():
        for batch in batches:
            logits = model(prepare(batch.images))
            parts.append(Evaluation.of_logits(logits, batch.labels, batch.sample_ids))
            on_batch(batch, logits)
    return Evaluation.concatenate(parts)


def wilson_interval(correct: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of an accuracy, as fractions (Wilson 1927, the score interval)."""
    if images == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / images
    centre = share + z * z / (2 * images)
    spread = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    scale = 1 + z * z / images
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def sanity_problem(
    evaluation: Evaluation, num_classes: int, min_top1: float | None = None, what: str = "float"
) -> str | None:
    """Why these results are not those of a working classifier, or None: at chance level, or below `min_top1`.

    Chance is 1 / num_classes, or the share of the most frequent label where all classes are there to be guessed.
    "Above chance" means that the 99 % interval of top-1 lies above it. `min_top1` is a fraction.
    """
    if min_top1 is not None and evaluation.top1 < min_top1:
        return f"{what} top-1 is {evaluation.top1:.2%}, below the {min_top1:.2%} asked for"
    counts = np.bincount(evaluation.labels, minlength=num_classes)
    chance = counts.max() / evaluation.images if (counts > 0).all() else 1 / num_classes
    low, _ = wilson_interval(evaluation.top1_correct, evaluation.images, 0.99)
    if num_classes > 1 and low <= chance:
        return (
            f"{what} top-1 is {evaluation.top1:.2%} on {evaluation.images} images, not above chance level "
            f"({chance:.2%}): do the labels, the normalisation and the image size fit the checkpoint?"
        )
    return None
