"""Batches in a given order, decoded by threads. No Ray: the same samples in the same order as the streaming source.

Decoders release the GIL, so threads use the cores; work is handed out a few batches ahead and no further.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitq_ray.config import require_choice, require_int
from vitq_ray.data.samples import BadImageError, SampleIndex
from vitq_ray.data.transforms import EvalTransform

ON_BAD_IMAGE = ("error", "skip")
_AHEAD_PER_THREAD = 16  # images in flight

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Batch:
    """uint8 images (B, S, S, 3), int64 labels (B,), int64 sample ids (B,)."""

    images: Tensor
    labels: Tensor
    sample_ids: Tensor


def iter_batches(
    index: SampleIndex,
    ids: Iterable[int],
    transform: EvalTransform,
    batch_size: int,
    num_threads: int = 2,
    on_bad_image: str = "error",
    bad_images: list[tuple[str, str]] | None = None,
) -> Iterator[Batch]:
    """The images of `ids`, in that order, in full batches; the last one may be smaller.

    A broken image is an error (BadImageError), or with `on_bad_image="skip"` left out and appended to `bad_images`
    as (address, reason); later images then move up.
    """
    require_int("batch size", batch_size, 1)
    require_int("number of threads", num_threads, 1)
    require_choice("on bad image", on_bad_image, ON_BAD_IMAGE)
    rows: list[tuple[int, Pixels]] = []
    with closing(_decoded(index, ids, transform, num_threads)) as decoded:
        for sample_id, pixels in decoded:
            if isinstance(pixels, BadImageError):
                if on_bad_image == "error":
                    raise pixels
                if bad_images is not None:
                    bad_images.append((index.where(sample_id), str(pixels)))
                continue
            rows.append((sample_id, pixels))
            if len(rows) == batch_size:
                yield _batch(index, rows)
                rows = []
    if rows:
        yield _batch(index, rows)


def _decoded(
    index: SampleIndex, ids: Iterable[int], transform: EvalTransform, num_threads: int
) -> Generator[tuple[int, Pixels | BadImageError], None, None]:
    """(sample id, pixels or what was wrong with them) in the order of `ids`."""

    def decode(sample_id: int) -> Pixels | BadImageError:
        try:
            return transform.decode(index.read(sample_id), index.where(sample_id))
        except BadImageError as error:
            return error

    waiting: deque[tuple[int, Future[Pixels | BadImageError]]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    try:
        for sample_id in map(int, ids):
            waiting.append((sample_id, pool.submit(decode, sample_id)))
            if len(waiting) >= _AHEAD_PER_THREAD * num_threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for sample_id, future in waiting:
            yield sample_id, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batch(index: SampleIndex, rows: list[tuple[int, Pixels]]) -> Batch:
    ids = np.array([sample_id for sample_id, _ in rows], np.int64)
    images = torch.from_numpy(np.stack([pixels for _, pixels in rows]))
    return Batch(images, torch.from_numpy(index.labels[ids].astype(np.int64)), torch.from_numpy(ids))
