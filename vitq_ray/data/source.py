"""Batches in a given order, decoded by Ray Data's workers: `loader.iter_batches` on a cluster, image for image.

    ids -> contiguous runs -> one read task each, in parallel -> blocks of rows, in the order of ids -> batches
    index -> object store, once -> mapped without a copy by every worker, which opens the archive once

A task gets its run of ids and a reference: the index itself is never in a closure. A broken image is a row like any
other, with zeros for pixels and its reason in the column `error`. So nothing is lost or reordered on the way, and the
driver raises the error, or skips the image and lists it, exactly where the threads of `iter_batches` would. Images
are never collected: Ray Data stops reading while a few blocks per CPU wait for the consumer.

Needs a running Ray; several nodes need a path that all of them see, or an `s3://` URI.
Legend: B images of a batch, S image size in pixels.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from pyarrow import fs
from ray.data import DataContext, Dataset, Datasource, ExecutionOptions, ExecutionResources, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from vitq_ray.config import InputError, require_choice, require_int
from vitq_ray.data.loader import ON_BAD_IMAGE, Batch, Pixels, collect
from vitq_ray.data.samples import BadImageError, Ids, SampleIndex
from vitq_ray.data.transforms import Transform, image_bytes
from vitq_ray.files import resolve

# A task of Ray costs a few milliseconds, as much as decoding a photo, and half of that before the first task starts.
# So a block is many images, though few enough that the first one comes soon; more where there would be many blocks.
_BLOCK_IMAGES = 160
_BLOCK_BYTES = 32 << 20  # no block is larger
_SMALL_BLOCK_BYTES = 1 << 20  # smaller ones count as this when memory is bounded
_MANY_BLOCKS = 4096
_BLOCKS_AHEAD = 4  # decoded blocks per CPU of the cluster that may wait for the consumer or be in work


def share(index: SampleIndex) -> ray.ObjectRef[SampleIndex]:
    """Put an index into the object store, for several passes over it (`shared=` below)."""
    return ray.put(index)


class SampleDatasource(Datasource):
    """The images of `ids` as a Ray Data source: one row per id, in that order within and across read tasks.

    Columns: `image` as `transform.decode` has it, e.g. uint8 (S, S, 3), `label` int64, `sample_id` int64, `error`
    string, `fatal` bool. A row with a non-empty `error` has zeros for pixels, which must not be used: the image is
    broken, or, where `fatal`, the worker could read no image at all.
    """

    def __init__(self, shared: ray.ObjectRef[SampleIndex], ids: Ids, transform: Transform) -> None:
        super().__init__()
        self._shared = shared
        self._ids = ids
        self._transform = transform

    def estimate_inmemory_data_size(self) -> int:
        return len(self._ids) * image_bytes(self._transform)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """At most `parallelism` tasks, none of them empty, whose runs of ids differ in length by at most one."""
        runs = np.array_split(self._ids, max(1, min(parallelism, len(self._ids))))
        return [self._read_task(run, per_task_row_limit) for run in runs if len(run)]

    def _read_task(self, run: Ids, row_limit: int | None) -> ReadTask:
        size = len(run) * image_bytes(self._transform)
        metadata = BlockMetadata(num_rows=len(run), size_bytes=size, exec_stats=None, input_files=None)
        return ReadTask(partial(_read_block, self._shared, self._transform, run), metadata, None, row_limit)


def stream_batches(
    index: SampleIndex,
    ids: Iterable[int],
    transform: Transform,
    batch_size: int,
    on_bad_image: str = "error",
    bad_images: list[tuple[str, str]] | None = None,
    shared: ray.ObjectRef[SampleIndex] | None = None,
    num_blocks: int | None = None,
    num_cpus: float = 1,
    move_up: bool = True,
    max_tasks: int | None = None,
) -> Iterator[Batch]:
    """The images of `ids`, in that order, in full batches; the last one may be smaller. As `loader.iter_batches`.

    A broken image is an error (BadImageError), or with `on_bad_image="skip"` left out and appended to `bad_images`
    as (address, reason). Later images then move up, or without `move_up` leave its batch smaller. Closing the iterator
    stops the workers.

    Args:
        shared: what `share(index)` returned, so that further passes neither copy the index nor reopen its archive.
        num_blocks: read tasks in all; by default as many as make blocks of a convenient size.
        num_cpus: CPUs that Ray reserves for each read task; tasks run only while CPUs are free. 0 where the caller
            itself may hold all of them.
        max_tasks: read tasks at once; by default as many as CPUs are free.
    """
    require_int("batch size", batch_size, 1)
    require_choice("on bad image", on_bad_image, ON_BAD_IMAGE)
    wanted = np.fromiter(ids, np.int64)
    if num_blocks is None:
        num_blocks = _num_blocks(len(wanted), transform)
    require_int("number of blocks", num_blocks, 0 if len(wanted) == 0 else 1)
    if len(wanted) == 0:
        return
    source = SampleDatasource(share(index) if shared is None else shared, wanted, transform)
    with closing(_decoded(_dataset(source, min(num_blocks, len(wanted)), num_cpus, max_tasks))) as decoded:
        yield from collect(index, decoded, batch_size, on_bad_image, bad_images, move_up)


# Workers ------------------------------------------------------------------------------------------------------------


def _read_block(shared: ray.ObjectRef[SampleIndex], transform: Transform, run: Ids) -> list[Block]:
    index = _local_index(shared)
    images = np.zeros((len(run), *transform.shape), transform.dtype)
    errors: dict[int, InputError] = {}
    for row, sample_id in enumerate(run.tolist()):
        try:
            _require_here(index.source)
            images[row] = transform.decode(index.read(sample_id), index.where(sample_id), sample_id)
        except InputError as error:  # as data: an exception would be annotated, logged and wrapped by Ray
            errors[row] = error
    columns = {
        "image": images,
        "label": index.labels[run].astype(np.int64),
        "sample_id": run,
        "error": np.array([str(errors.get(row, "")) for row in range(len(run))]),
        "fatal": np.array([row in errors and not isinstance(errors[row], BadImageError) for row in range(len(run))]),
    }
    return [BlockAccessor.batch_to_arrow_block(columns)]


@lru_cache(maxsize=2)  # train and val; their arrays stay in the object store
def _local_index(shared: ray.ObjectRef[SampleIndex]) -> SampleIndex:
    """This process's view of a shared index: one for all its tasks, so that the archive is opened once."""
    index: SampleIndex = ray.get(shared)
    return index


@lru_cache(maxsize=2)
def _require_here(path: str) -> None:
    """An archive that this node does not have is an error of the set-up, not a lot of broken images to skip."""
    filesystem, inner = resolve(path)
    if filesystem.get_file_info(inner).type == fs.FileType.NotFound:
        raise InputError(
            f"{path}: not there on node {socket.gethostname()}; expected a path that all nodes see, or a URI"
        )


# Driver -------------------------------------------------------------------------------------------------------------


def _num_blocks(num_images: int, transform: Transform) -> int:
    block = max(_BLOCK_IMAGES, num_images // _MANY_BLOCKS)
    return -(-num_images // max(1, min(block, _BLOCK_BYTES // image_bytes(transform))))


def _dataset(source: SampleDatasource, num_blocks: int, num_cpus: float, max_tasks: int | None) -> Dataset:
    dataset = ray.data.read_datasource(source, override_num_blocks=num_blocks, num_cpus=num_cpus, concurrency=max_tasks)
    context = dataset.context  # this data set's own copy
    block_bytes = max(_SMALL_BLOCK_BYTES, -(-source.estimate_inmemory_data_size() // num_blocks))
    ahead = _BLOCKS_AHEAD * block_bytes * ray.cluster_resources().get("CPU", 1)
    context.execution_options = ExecutionOptions(
        resource_limits=ExecutionResources.for_limits(object_store_memory=ahead), preserve_order=True
    )
    context.target_max_block_size = 2 * block_bytes  # what Ray expects of a task before it has seen one
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return dataset


def _decoded(dataset: Dataset) -> Generator[tuple[int, Pixels | InputError], None, None]:
    """(sample id, pixels or what was wrong with them) in order; the pixels are views of the object store."""
    with closing(_blocks(dataset)) as blocks:
        for block in blocks:
            rows = zip(block["sample_id"], block["image"], block["error"], block["fatal"], strict=True)
            for sample_id, pixels, error, fatal in rows:
                wrong = (InputError if fatal else BadImageError)(error) if error else None
                yield int(sample_id), wrong or pixels


def _blocks(dataset: Dataset) -> Generator[dict[str, npt.NDArray[Any]], None, None]:
    # Not `iter_batches`: left early, that kills the workers that are reading, and the next pass waits seconds for new
    # ones to import everything. This iterator interrupts their tasks when it is dropped.
    bundles = dataset.iter_internal_ref_bundles()
    try:
        for bundle in bundles:
            for ref in bundle.block_refs:
                yield BlockAccessor.for_block(ray.get(ref)).to_batch_format("numpy")
    except BaseException:
        del bundles
        gc.collect()  # Ray's executor is full of cycles, which would keep the waiting blocks in the object store
        raise
