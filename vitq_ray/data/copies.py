"""Which images are the same bytes under several names: these must not be divided between selection and report.

Equal means: the same size and CRC-32. A zip's directory has both. Files of a folder are read, but only those that have
their size in common with another, and only up to `MOST_READ` of them: of more, names alone tell images apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vitq_ray.data.samples import Ids, SampleIndex

MOST_READ = 50_000
_FIRST_CHUNK = 1024


def first_copies(index: SampleIndex) -> Ids:
    """(N,) for every image the first one of the same bytes, which most often is itself."""
    first = np.arange(len(index))
    _, inverse, counts = np.unique(index.sizes, return_inverse=True, return_counts=True)
    ids = np.flatnonzero(counts[inverse] > 1)
    if _is_affordable(index, ids):
        ids, keys = _keys(index, ids)
        _, where, inverse = np.unique(keys, return_index=True, return_inverse=True)
        first[ids] = ids[where[inverse]]
    return first


def without_images_of(other: SampleIndex, index: SampleIndex, ids: Ids) -> Iterator[int]:
    """Those of `ids` whose images are not in `other` too, in order, looked at as they are asked for."""
    start, size = 0, _FIRST_CHUNK
    while start < len(ids):
        chunk = ids[start : start + size]
        yield from chunk[~_are_in(other, index, chunk)].tolist()
        start, size = start + size, 2 * size


def _are_in(other: SampleIndex, index: SampleIndex, ids: Ids) -> npt.NDArray[np.bool_]:
    mine = ids[np.isin(index.sizes[ids], other.sizes)]
    theirs = np.flatnonzero(np.isin(other.sizes, index.sizes[mine]))
    if len(mine) == 0 or not (_is_affordable(index, mine) and _is_affordable(other, theirs)):
        return np.zeros(len(ids), np.bool_)
    mine, keys = _keys(index, mine)
    return np.isin(ids, mine[np.isin(keys, _keys(other, theirs)[1])])


def _is_affordable(index: SampleIndex, ids: Ids) -> bool:
    return index.members is not None or len(ids) <= MOST_READ


def _keys(index: SampleIndex, ids: Ids) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Those of `ids` that can be read, and for each its size and checksum in 64 bits."""
    sums = index.checksums(ids)
    ids, sums = ids[sums >= 0], sums[sums >= 0]
    return ids, (index.sizes[ids] << 32) ^ sums
