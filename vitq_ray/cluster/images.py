"""Decoded images in Ray's object store: put there as they come, mapped without a copy by every trial.

The driver keeps labels and sample ids, and at most one part of the images on their way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ray
import torch

from vitq_ray.base.config import InputError
from vitq_ray.data.loader import Batch

PART_BYTES = 32 << 20  # images that are put at a time

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """Decoded images at hand: parts of uint8 (n, S, S, 3), N in all, labels (N,), sample ids (N,)."""

    parts: Sequence[Pixels]
    labels: Ints
    sample_ids: Ints

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, start: int = 0, end: int | None = None) -> Iterator[Batch]:
        """Images `start` to `end` in batches of `size`."""
        end = len(self) if end is None else end
        for first in range(start, end, size):
            last = min(first + size, end)
            # Copies: what the object store holds is read-only, and PyTorch wants memory it may write to.
            arrays = (self._pixels(first, last), self.labels[first:last].copy(), self.sample_ids[first:last].copy())
            yield Batch(*map(torch.from_numpy, arrays))

    def _pixels(self, start: int, end: int) -> Pixels:
        found, first = [], 0
        for part in self.parts:
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

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self) -> ImageSet:
        """The images, mapped from this node's object store; read-only."""
        return ImageSet(ray.get(list(self.parts)), self.labels, self.sample_ids)


class ImageStore:
    """Puts batches into the object store. Needs a running Ray."""

    def __init__(self, part_bytes: int = PART_BYTES) -> None:
        self._part_bytes = part_bytes
        self._waiting: list[Pixels] = []
        self._parts: list[ray.ObjectRef[Pixels]] = []
        self._labels: list[Ints] = []
        self._sample_ids: list[Ints] = []

    def passing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each stored before it is passed on."""
        for batch in batches:
            self.add(batch)
            yield batch

    def add(self, batch: Batch) -> None:
        self._waiting.append(batch.images.numpy())
        self._labels.append(batch.labels.numpy())
        self._sample_ids.append(batch.sample_ids.numpy())
        if sum(images.nbytes for images in self._waiting) >= self._part_bytes:
            self._put()

    def _put(self) -> None:
        if self._waiting:
            self._parts.append(ray.put(np.concatenate(self._waiting)))
            self._waiting = []

    def stored(self) -> StoredImages:
        """All that was added. InputError where that is nothing."""
        self._put()
        if not self._parts:
            raise InputError("selection: no readable image")
        return StoredImages(tuple(self._parts), np.concatenate(self._labels), np.concatenate(self._sample_ids))
