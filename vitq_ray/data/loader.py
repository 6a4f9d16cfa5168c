"""Batches in a given order, decoded by threads. No Ray: the same samples in the same order as the streaming source.

Decoders release the GIL, so threads use the cores; work is handed out a few batches ahead and no further.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vitq_ray.base.config import InputError, require_choice, require_int
from vitq_ray.data.samples import BadImageError, SampleIndex
from vitq_ray.data.transforms import Transform

if TYPE_CHECKING:
    from torch import Tensor

ON_BAD_IMAGE = ("error", "skip")
_AHEAD_PER_THREAD = 16  # images in flight

Pixels = npt.NDArray[Any]  # what `Transform.decode` makes of an image


@dataclass(frozen=True)
class Batch:
    """Images (B, …) as their transform decodes them, e.g. uint8 (B, S, S, 3); int64 labels and sample ids (B,).

    `float_logits` (B, classes) are the float model's, where they are known already. Without labels, all are `NO_LABEL`.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    float_logits: Tensor | None = None


def iter_batches(
    index: SampleIndex,
    ids: Iterable[int],
    transform: Transform,
    batch_size: int,
    num_threads: int = 2,
    on_bad_image: str = "error",
    bad_images: list[tuple[str, str]] | None = None,
    move_up: bool = True,
) -> Iterator[Batch]:
    """The images of `ids`, in that order, in full batches; the last one may be smaller.

    A broken image is an error (BadImageError), or with `on_bad_image="skip"` left out and appended to `bad_images`
    as (address, reason). Later images then move up, or without `move_up` leave its batch smaller.
    """
    require_int("batch size", batch_size, 1)
    require_int("number of threads", num_threads, 1)
    require_choice("on bad image", on_bad_image, ON_BAD_IMAGE)
    with closing(_decoded(index, ids, transform, num_threads)) as decoded:
        yield from collect(index, decoded, batch_size, on_bad_image, bad_images, move_up)


def collect(
    index: SampleIndex,
    decoded: Iterable[tuple[int, Pixels | InputError]],
    batch_size: int,
    on_bad_image: str,
    bad_images: list[tuple[str, str]] | None,
    move_up: bool,
) -> Iterator[Batch]:
    """Batches of decoded images, and what becomes of the broken ones: the rules of `iter_batches`.

    Without `move_up`, batch i is made of the i-th `batch_size` ids, and comes without images if all are broken.
    """
    rows: list[tuple[int, Pixels]] = []
    taken = 0  # images of this batch, and without `move_up` also those it lost
    for sample_id, pixels in decoded:
        if isinstance(pixels, InputError):
            if on_bad_image == "error" or not isinstance(pixels, BadImageError):
                raise pixels
            if bad_images is not None:
                bad_images.append((index.where(sample_id), str(pixels)))
            taken += not move_up
        else:
            rows.append((sample_id, pixels))
            taken += 1
        if taken == batch_size:
            yield _batch(index, rows)
            rows, taken = [], 0
    if taken:
        yield _batch(index, rows)


def _decoded(
    index: SampleIndex, ids: Iterable[int], transform: Transform, num_threads: int
) -> Generator[tuple[int, Pixels | BadImageError], None, None]:
    """(sample id, pixels or what was wrong with them) in the order of `ids`."""

    def decode(sample_id: int) -> Pixels | BadImageError:
        try:
            return transform.decode(index.read(sample_id), index.where(sample_id), sample_id)
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
    import torch  # not for who only decodes: see transforms.py

    ids = np.array([sample_id for sample_id, _ in rows], np.int64)
    images = torch.from_numpy(np.stack([pixels for _, pixels in rows]) if rows else np.empty((0, 0, 0, 3), np.uint8))
    return Batch(images, torch.from_numpy(index.labels[ids].astype(np.int64)), torch.from_numpy(ids))
