"""Batches in a given order, decoded by Ray Data's workers: `loader.iter_batches` on a cluster, image for image.

    ids -> contiguous runs -> one read task each, in parallel -> blocks of rows as they are decoded, in the order of ids
    index -> object store, once -> mapped without a copy by every worker, which opens the archive once

A task gets its run of ids and a reference: the index itself is never in a closure. A broken image is a row like any
other, with zeros for pixels and its reason in the column `error`. So nothing is lost or reordered on the way, and the
driver raises the error, or skips the image and lists it, exactly where the threads of `iter_batches` would. Images
are never collected: Ray Data starts no task while those of two tasks per CPU, and at most half of the object store,
are in work or wait for the consumer.

Needs a running Ray; several nodes need a path that all of them see, or an `s3://` URI.
Legend: B images of a batch, S image size in pixels.
"""

from __future__ import annotations

import gc
import socket
import threading
import time
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

from vitq_ray.base.config import InputError, require_choice, require_int
from vitq_ray.base.files import patiently, resolve
from vitq_ray.cluster.start import closed_with_ray
from vitq_ray.data.loader import ON_BAD_IMAGE, Batch, Pixels, collect
from vitq_ray.data.samples import BadImageError, Ids, SampleIndex
from vitq_ray.data.transforms import Transform, image_bytes

# Between two tasks a worker waits for the driver, so a task decodes many images; it hands them over in blocks, so that
# the first ones come soon. In order: what a second task has decoded waits until the first task is through.
_TASK_IMAGES = 640
_TASK_BYTES = 96 << 20  # no task decodes more
_MANY_TASKS = 4096  # of a large split, tasks decode more images instead
_BLOCK_IMAGES = 128
_BLOCK_BYTES = 24 << 20  # no block is larger
_TASKS_AHEAD = 2  # per CPU of the cluster: decoded images that may wait for the consumer or be in work
_LEAST_AHEAD = 8 << 20  # bytes per CPU, however small the images
_KNOWN_RAY = "2.60."  # versions that `hurried_ray_data` knows
_FIRST_LOOK_S, _POLL_INTERVAL_S = 0.05, 0.05  # of Ray Data's scheduler


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
        self.block_bytes = _block_images(transform) * image_bytes(transform)

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
        return ReadTask(partial(_read_run, self._shared, self._transform, run), metadata, None, row_limit)


def stream_batches(
    index: SampleIndex,
    ids: Iterable[int],
    transform: Transform,
    batch_size: int,
    on_bad_image: str = "error",
    bad_images: list[tuple[str, str]] | None = None,
    shared: ray.ObjectRef[SampleIndex] | None = None,
    num_tasks: int | None = None,
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
        num_tasks: read tasks in all; by default as many as make runs of ids of a convenient length.
        num_cpus: CPUs that Ray reserves for each read task; tasks run only while CPUs are free. 0 where the caller
            itself may hold all of them.
        max_tasks: read tasks at once; by default as many as CPUs are free.
    """
    require_int("batch size", batch_size, 1)
    require_choice("on bad image", on_bad_image, ON_BAD_IMAGE)
    wanted = np.fromiter(ids, np.int64)
    if num_tasks is None:
        num_tasks = _num_tasks(len(wanted), transform, *_cpus_and_store())
    require_int("number of tasks", num_tasks, 0 if len(wanted) == 0 else 1)
    if len(wanted) == 0:
        return
    source = SampleDatasource(share(index) if shared is None else shared, wanted, transform)
    dataset = _dataset(source, min(num_tasks, len(wanted)), num_cpus, max_tasks)
    with hurried_ray_data, closing(closed_with_ray(_decoded(dataset))) as decoded:
        yield from collect(index, decoded, batch_size, on_bad_image, bad_images, move_up)


# Workers ------------------------------------------------------------------------------------------------------------


def _read_run(shared: ray.ObjectRef[SampleIndex], transform: Transform, run: Ids) -> Iterator[Block]:
    index = _local_index(shared)
    size = _block_images(transform)
    for start in range(0, len(run), size):
        yield _read_block(index, transform, run[start : start + size])


def _block_images(transform: Transform) -> int:
    return max(1, min(_BLOCK_IMAGES, _BLOCK_BYTES // image_bytes(transform)))


def _read_block(index: SampleIndex, transform: Transform, run: Ids) -> Block:
    images = np.empty((len(run), *transform.shape), transform.dtype)
    errors: dict[int, InputError] = {}
    for row, sample_id in enumerate(run.tolist()):
        try:
            _require_here(index.source)
            images[row] = transform.decode(index.read(sample_id), index.where(sample_id), sample_id)
        except InputError as error:  # as data: an exception would be annotated, logged and wrapped by Ray
            errors[row] = error
            images[row] = 0
    columns = {
        "image": images,
        "label": index.labels[run].astype(np.int64),
        "sample_id": run,
        "error": np.array([str(errors.get(row, "")) for row in range(len(run))]),
        "fatal": np.array([row in errors and not isinstance(errors[row], BadImageError) for row in range(len(run))]),
    }
    return BlockAccessor.batch_to_arrow_block(columns)


@lru_cache(maxsize=2)  # train and val; their arrays stay in the object store
def _local_index(shared: ray.ObjectRef[SampleIndex]) -> SampleIndex:
    """This process's view of a shared index: one for all its tasks, so that the archive is opened once."""
    index: SampleIndex = ray.get(shared)
    return index


@lru_cache(maxsize=2)
def _require_here(path: str) -> None:
    """An archive that this node does not have is an error of the set-up, not a lot of broken images to skip."""
    filesystem, inner = resolve(path)
    if patiently(path, lambda: filesystem.get_file_info(inner)).type == fs.FileType.NotFound:
        raise InputError(
            f"{path}: not there on node {socket.gethostname()}; expected a path that all nodes see, or a URI"
        )


# Driver -------------------------------------------------------------------------------------------------------------


def _cpus_and_store() -> tuple[int, int]:
    """CPUs of the cluster, at least 1, and bytes of its object store."""
    resources = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1))), int(resources.get("object_store_memory", 0))


def _num_tasks(num_images: int, transform: Transform, cpus: int, store_bytes: int) -> int:
    """Enough for runs of a convenient length; of few tasks, equally many for every CPU, so that all end together.

    Ray starts a task on every CPU before it knows how large their images are, and lets each come to its end: together
    they must not take more than a quarter of the object store.
    """
    room = min(_TASK_BYTES, store_bytes // (4 * cpus)) // image_bytes(transform)
    longest = max(1, min(max(_TASK_IMAGES, num_images // _MANY_TASKS), room))
    least = -(-num_images // longest)
    balanced = -(-least // cpus) * cpus
    return max(least, min(balanced, num_images // min(longest, _block_images(transform))))


class _Hurry:
    """Shortens two delays of Ray 2.60 that no option shortens, while streams are open; with other versions nothing.

    Ray Data first believes that the cluster has no CPU, and so runs one task at a time, until it looks again after a
    second. And it sleeps 0.1 s between two looks at its tasks, of which the end of a task takes two. Both are
    attributes of `ray.data._internal` in this process; they are as before once the last open stream has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams = 0
        self._before: list[tuple[Any, str, Any]] = []  # (where, attribute, value)

    def __enter__(self) -> None:
        with self._lock:
            if self._streams == 0 and ray.__version__.startswith(_KNOWN_RAY):
                self._shorten()
            self._streams += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._streams -= 1
            if self._streams == 0:
                for owner, name, value in self._before:
                    setattr(owner, name, value)
                self._before = []

    def _shorten(self) -> None:
        from ray.data._internal.execution import resource_manager, streaming_executor_state

        manager: Any = resource_manager.ResourceManager
        interval = manager.GLOBAL_LIMITS_UPDATE_INTERVAL_S

        def until_next_look(self: Any) -> float:
            began = self.__dict__.setdefault("_first_look", time.monotonic())
            limits = getattr(self, "_global_limits", None)
            knows_nothing = limits is not None and not limits.cpu and time.monotonic() - began < interval
            return _FIRST_LOOK_S if knows_nothing else float(interval)

        self._set(manager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", property(until_next_look))
        self._set(streaming_executor_state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", _POLL_INTERVAL_S)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


hurried_ray_data = _Hurry()


def _dataset(source: SampleDatasource, num_tasks: int, num_cpus: float, max_tasks: int | None) -> Dataset:
    limits = {"num_cpus": num_cpus, "concurrency": max_tasks}
    dataset: Dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks, **limits)
    context = dataset.context  # this data set's own copy
    cpus, _ = _cpus_and_store()
    ahead = cpus * max(_LEAST_AHEAD, _TASKS_AHEAD * -(-source.estimate_inmemory_data_size() // num_tasks))
    context.execution_options = ExecutionOptions(
        resource_limits=ExecutionResources.for_limits(object_store_memory=ahead), preserve_order=True
    )
    # Ray joins blocks below this, and cuts those of one and a half times: ours it hands over as they are.
    context.target_max_block_size = max(1, source.block_bytes * 3 // 4)
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
