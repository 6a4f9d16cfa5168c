"""What is measured of every image: one table, which evaluation, logs, tables and summaries read.

    logits (B, K), and labels (B,) or the float model's logits (B, K), or both
        ──► one value per image and metric ──► total and mean in summaries

Images without labels have the metrics against the float model only; where its logits are not at hand, there are only
those against labels. A further metric is one row of `METRICS` and its function. Evaluations, results that workers
send, events of a log, the columns of a table and the summaries of result files then have it, too. What was written
before has not: readers take the metrics that are there.

Legend: B images, K classes; KL in nats.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.data.samples import NO_LABEL
from vitq_ray.measure.fidelity import agrees, kl_to_float

LABELS, FLOAT = "labels", "float"  # what logits are compared with
Column = npt.NDArray[Any]
Results = Mapping[str, Column]  # {metric: (images,) values}


@dataclass(frozen=True)
class Metric:
    """One result per image.

    Attributes:
        of: logits (B, K) and what they are compared with, on the same device -> (B,) values.
        dtype: of the values when they are kept.
        total: name of their sum in summaries, an integer for bool.
        mean: name of their mean in summaries.
        against: `LABELS`, (B,), or `FLOAT`, the float model's logits (B, K).
    """

    of: Callable[[Tensor, Tensor], Tensor]
    dtype: npt.DTypeLike
    total: str
    mean: str
    against: str = LABELS


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, 5) bool: whether the label is at each of the first five places; fewer places with fewer classes."""
    places: Tensor = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return places == labels[:, None]


def _is_first(logits: Tensor, labels: Tensor) -> Tensor:
    return _hits(logits, labels)[:, 0]


def _is_among_five(logits: Tensor, labels: Tensor) -> Tensor:
    return _hits(logits, labels).any(dim=1)


METRICS: dict[str, Metric] = {
    "correct": Metric(_is_first, np.bool_, total="top1_correct", mean="top1"),
    "correct5": Metric(_is_among_five, np.bool_, total="top5_correct", mean="top5"),
    "kl": Metric(kl_to_float, np.float32, total="kl_total", mean="kl", against=FLOAT),
    "agree": Metric(agrees, np.bool_, total="agreed", mean="agreement", against=FLOAT),
}


def measure(logits: Tensor, labels: Tensor, float_logits: Tensor | None = None) -> Results:
    """Every metric of a batch that can be: labels may be missing, and the float model's logits not at hand.

    Both may be on another device.
    """
    known = {LABELS: None if bool((labels == NO_LABEL).any()) else labels, FLOAT: float_logits}
    there = {what: other.to(logits.device) for what, other in known.items() if other is not None}
    return {
        name: metric.of(logits, there[metric.against]).cpu().numpy().astype(metric.dtype)
        for name, metric in METRICS.items()
        if metric.against in there
    }


def no_results(images: int = 0) -> dict[str, Column]:
    """A column of zeros for every metric."""
    return {name: np.zeros(images, metric.dtype) for name, metric in METRICS.items()}


def total_of(values: Column) -> int | float:
    """The sum: of bool an exact integer, of others in float64."""
    return int(values.sum()) if values.dtype == np.bool_ else float(values.sum(dtype=np.float64))


# Packed, for sending and for logs -----------------------------------------------------------------------------------


def pack(results: Results) -> dict[str, bytes]:
    """{metric: bytes}: eight images a byte for bool, little-endian numbers for others."""
    return {name: _pack(values) for name, values in results.items()}


def unpack(packed: Mapping[str, bytes], images: int) -> dict[str, Column]:
    """The inverse of `pack`, for `images` images; of what is in `packed`, the metrics of the table."""
    return {name: _unpack(packed[name], metric.dtype, images) for name, metric in METRICS.items() if name in packed}


def pack_text(results: Results) -> dict[str, str]:
    """As `pack`, in base64, for an event of a log."""
    return {name: base64.b64encode(data).decode() for name, data in pack(results).items()}


def unpack_text(event: Mapping[str, Any], images: int) -> dict[str, Column]:
    """The inverse of `pack_text`; an event may hold other entries, too.

    Raises InputError where a text is not base64, or not that of `images` images.
    """
    packed = {name: _decoded(name, event[name], METRICS[name], images) for name in METRICS if name in event}
    return unpack(packed, images)


def _decoded(name: str, text: Any, metric: Metric, images: int) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise InputError(f"{name}: not base64") from None
    flags = np.dtype(metric.dtype) == np.bool_
    size = -(-images // 8) if flags else images * np.dtype(metric.dtype).itemsize
    spare = data[-1] & (0xFF >> (images - 1) % 8 + 1) if flags and data and images % 8 else 0
    if len(data) != size or spare:
        raise InputError(f"{name}: not the results of {images} images")
    return data


def _pack(values: Column) -> bytes:
    if values.dtype == np.bool_:
        return np.packbits(values).tobytes()
    return values.astype(values.dtype.newbyteorder("<")).tobytes()


def _unpack(data: bytes, dtype: npt.DTypeLike, images: int) -> Column:
    if np.dtype(dtype) == np.bool_:
        return np.unpackbits(np.frombuffer(data, np.uint8), count=images).astype(bool)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), images).astype(dtype)
