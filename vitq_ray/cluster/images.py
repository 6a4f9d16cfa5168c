"""Decoded images, and what the float model says of them, in Ray's object store: put there as they come, mapped without
a copy by every trial.

The driver keeps labels and sample ids, and at most one part of the images on their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from vitq_ray.base.config import InputError
from vitq_ray.data.loader import Batch

PART_BYTES = 32 << 20  # images that are put at a time

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Rows = TypeVar("Rows", bound=np.generic)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images at hand: parts of uint8 (n, S, S, 3), N in all, labels (N,), sample ids (N,), and parts of
    (n, classes) logits of the float model."""

    parts: Sequence[Pixels]
    labels: Ints
    sample_ids: Ints
    float_logits: Sequence[Logits]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, start: int = 0, end: int | None = None) -> Iterator[Batch]:
        """Images `start` to `end` in batches of `size`."""
        end = len(self) if end is None else end
        for first in range(start, end, size):
            last = min(first + size, end)
            # Copies: what the object store holds is read-only, and PyTorch wants memory it may write to.
            arrays = (
                _rows(self.parts, first, last),
                self.labels[first:last].copy(),
                self.sample_ids[first:last].copy(),
                _rows(self.float_logits, first, last),
            )
            yield Batch(*map(torch.from_numpy, arrays))


def _rows(parts: Sequence[npt.NDArray[Rows]], start: int, end: int) -> npt.NDArray[Rows]:
    """Rows `start` to `end` of all parts, copied."""
    found, first = [], 0
    for part in parts:
        if first < end and start < first + len(part):
            found.append(part[max(0, start - first) : end - first])
        first += len(part)
    return np.concatenate(found)


@dataclass(frozen=True)
class StoredImages:
    """An `ImageSet` whose parts are in the object store: small enough to travel with every trial."""

    parts: tuple[ray.ObjectRef[Pixels], ...]
    labels: Ints
    sample_ids: Ints
    float_logits: tuple[ray.ObjectRef[Logits], ...]

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self) -> ImageSet:
        """The images, mapped from this node's object store; read-only."""
        pixels, logits = ray.get(list(self.parts)), ray.get(list(self.float_logits))
        return ImageSet(pixels, self.labels, self.sample_ids, logits)


class ImageStore:
    """Puts batches into the object store. Needs a running Ray."""

    def __init__(self, part_bytes: int = PART_BYTES) -> None:
        self._part_bytes = part_bytes
        self._waiting: list[tuple[Pixels, Logits]] = []
        self._parts: list[tuple[ray.ObjectRef[Pixels], ray.ObjectRef[Logits]]] = []
        self._labels: list[Ints] = []
        self._sample_ids: list[Ints] = []

    def add(self, batch: Batch, float_logits: Tensor) -> None:
        """One more batch, and the float model's logits (B, classes) of it."""
        self._waiting.append((batch.images.numpy(), float_logits.float().cpu().numpy()))
        self._labels.append(batch.labels.numpy())
        self._sample_ids.append(batch.sample_ids.numpy())
        if sum(pixels.nbytes for pixels, _ in self._waiting) >= self._part_bytes:
            self._put()

    def _put(self) -> None:
        if self._waiting:
            pixels, logits = map(np.concatenate, zip(*self._waiting, strict=True))
            self._parts.append((ray.put(pixels), ray.put(logits)))
            self._waiting = []

    def stored(self) -> StoredImages:
        """All that was added. InputError where that is nothing."""
        self._put()
        if not self._parts:
            raise InputError("selection: no readable image")
        pixels, logits = zip(*self._parts, strict=True)
        return StoredImages(pixels, np.concatenate(self._labels), np.concatenate(self._sample_ids), logits)
