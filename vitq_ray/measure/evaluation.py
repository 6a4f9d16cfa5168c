"""Evaluation: batches of images -> what every image came to, one by one and summed up.

Counts stay integers; every image counts, the last partial batch included. Per-image results are what lets two
settings be compared on the same images; which results there are is the table of `metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitq_ray.base.config import InputError
from vitq_ray.data.loader import Batch
from vitq_ray.measure.metrics import FLOAT, METRICS, Results, measure, no_results, total_of

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class NonFiniteLogitsError(InputError):
    """The model produced NaN or infinite logits."""


@dataclass(frozen=True)
class Counts:
    """An evaluation without its images: how many they were, and every metric summed over them.

    Attributes:
        images: how many.
        totals: {name of a sum in the table of metrics: the sum}, as far as it was measured.
    """

    images: int
    totals: Mapping[str, int | float]

    @staticmethod
    def of(evaluation: Evaluation) -> Counts:
        return Counts.summed(evaluation.results, evaluation.images)

    @staticmethod
    def summed(results: Results, images: int | None = None) -> Counts:
        """Of per-image results; how many images these are may be left out where there is any metric."""
        count = len(next(iter(results.values()))) if images is None else images
        return Counts(count, {METRICS[name].total: total_of(values) for name, values in results.items()})

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Counts:
        """From what `to_dict` wrote, or from a summary; InputError where a number is missing."""
        try:
            totals = {metric.total: values[metric.total] for metric in METRICS.values() if metric.total in values}
            return Counts(values["images"], {"top1_correct": values["top1_correct"], **totals})
        except KeyError as error:
            raise InputError(f"counts: {error} is missing; found {', '.join(values)}") from None

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, **self.totals}

    @property
    def has_accuracy(self) -> bool:
        """The images have labels."""
        return "top1_correct" in self.totals

    @property
    def means(self) -> dict[str, float]:
        """{name of a mean in the table of metrics: the mean}, as far as it was measured."""
        return {m.mean: self.totals[m.total] / self.images for m in METRICS.values() if m.total in self.totals}

    @property
    def top1_correct(self) -> int:
        return int(self.totals["top1_correct"])

    @property
    def top1(self) -> float:
        """Fraction in [0, 1]; 0 images have no accuracy and raise."""
        return self.top1_correct / self.images

    def accuracy(self) -> dict[str, Any]:
        """Counts and means of every metric."""
        return {**self.to_dict(), **self.means}

    def summary(self) -> dict[str, Any]:
        """As `accuracy`, with the 95 % interval of top-1: the one form of counts in result files."""
        if not self.has_accuracy:
            return self.accuracy()
        return {**self.accuracy(), "top1_interval95": list(wilson_interval(self.top1_correct, self.images))}


@dataclass(frozen=True)
class Evaluation:
    """Per-image results, (images,) each, in the order in which the images were seen.

    Attributes:
        sample_ids: position of the image in its split.
        labels: class of the image, `NO_LABEL` where there are none.
        results: {metric: its value for every image}; `correct` is there where the images have labels, `kl` where the
            float model's logits were at hand, see `metrics.METRICS`.
    """

    sample_ids: Ints
    labels: Ints
    results: Results

    @property
    def images(self) -> int:
        return len(self.sample_ids)

    @property
    def has_accuracy(self) -> bool:
        """As `Counts.has_accuracy`."""
        return "correct" in self.results

    @property
    def correct(self) -> Bools:
        """The class with the largest logit is the label."""
        return self.results["correct"]

    @property
    def top1_correct(self) -> int:
        return int(self.correct.sum())

    @property
    def top5_correct(self) -> int:
        return int(self.results["correct5"].sum())

    @property
    def top1(self) -> float:
        """Fraction in [0, 1]; 0 images have no accuracy and raise."""
        return self.top1_correct / self.images

    @property
    def top5(self) -> float:
        return self.top5_correct / self.images

    def accuracy(self) -> dict[str, Any]:
        """As `Counts.accuracy`."""
        return Counts.of(self).accuracy()

    def summary(self) -> dict[str, Any]:
        """As `Counts.summary`."""
        return Counts.of(self).summary()

    def prefix(self, images: int) -> Evaluation:
        """The first images."""
        return self._select(slice(images))

    def subset(self, ids: npt.ArrayLike) -> Evaluation:
        """The results of some of the images, in the order they have here; ids that are not here are left out."""
        return self._select(np.isin(self.sample_ids, ids))

    def _select(self, chosen: slice | Bools) -> Evaluation:
        results = {name: values[chosen] for name, values in self.results.items()}
        return Evaluation(self.sample_ids[chosen], self.labels[chosen], results)

    @staticmethod
    def of_logits(logits: Tensor, labels: Tensor, sample_ids: Tensor, float_logits: Tensor | None = None) -> Evaluation:
        """Judge logits (B, classes) by labels (B,), and by the float model's logits (B, classes) if given.

        With fewer than five classes, top-5 is top-`classes`.
        """
        if not torch.isfinite(logits).all():
            raise NonFiniteLogitsError("the model produced NaN or infinite logits")
        return Evaluation(sample_ids.cpu().numpy(), labels.cpu().numpy(), measure(logits, labels, float_logits))

    @staticmethod
    def concatenate(parts: Sequence[Evaluation]) -> Evaluation:
        """All results after each other, of the metrics that all parts have; (0,) arrays where there are no parts."""
        parts = parts or [Evaluation(np.empty(0, np.int64), np.empty(0, np.int64), no_results())]
        names = [name for name in parts[0].results if all(name in part.results for part in parts)]
        return Evaluation(
            np.concatenate([part.sample_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            {name: np.concatenate([part.results[name] for part in parts]) for name in names},
        )


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    to_input: Callable[[Tensor], Tensor],
    on_batch: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
    float_model: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Classify every image of `batches`.

    Args:
        model: (B, 3, S, S) float32 -> (B, classes) logits.
        to_input: uint8 images (B, S, S, 3) -> what the model takes, on the model's device.
        on_batch: sees every batch and its logits, for progress or for keeping them.
        float_model: what the model is compared with, run on the same images; None: what the batches know of it.
    """
    model.eval()

    def on_variant(name: str, batch: Batch, logits: Tensor) -> None:
        if name == "model":
            on_batch(batch, logits)

    variants: dict[str, Callable[[Tensor], Tensor]] = {"model": model}
    if float_model is not None:
        variants["float"] = float_model
    return evaluate_variants(variants, batches, to_input, on_variant)["model"]


def evaluate_variants(
    variants: Mapping[str, Callable[[Tensor], Tensor]],
    batches: Iterable[Batch],
    to_input: Callable[[Tensor], Tensor],
    on_batch: Callable[[str, Batch, Tensor], None] = lambda name, batch, logits: None,
) -> dict[str, Evaluation]:
    """Classify every image with several models in one pass over the images: the only evaluation loop there is.

    Args:
        variants: {name: what makes logits (B, classes) of a batch's images}; all in evaluation mode. The one named
            `float` is the float model: it runs first, and the others are compared with it.
        to_input, on_batch: as in `evaluate`; `on_batch` is also told which variant.

    Batches without images, which a reader may give where all were broken, are passed over.
    """
    parts: dict[str, list[Evaluation]] = {name: [] for name in variants}
    with torch.inference_mode():
        for batch in batches:
            if len(batch.labels) == 0:
                continue
            images, known = to_input(batch.images), batch.float_logits
            for name in sorted(variants, key=lambda name: name != FLOAT):
                logits = variants[name](images)
                parts[name].append(Evaluation.of_logits(logits, batch.labels, batch.sample_ids, known))
                on_batch(name, batch, logits)
                known = logits if name == FLOAT else known
    return {name: Evaluation.concatenate(rows) for name, rows in parts.items()}


def in_points(difference: float) -> float:
    """A difference of accuracies, in percentage points; 5 images of 1,000 are half a point, not a bit more of it."""
    return round(100 * difference, 9)


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
    "Above chance" means that the 99 % interval of top-1 lies above it. `min_top1` is a fraction. Without labels nothing
    is known.
    """
    if not evaluation.has_accuracy:
        return None
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
