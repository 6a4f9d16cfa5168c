"""Ray Data's workers against the pixels that were stored, and against the threads of `iter_batches`."""

from __future__ import annotations

import io
import os
import pickle
import re
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.resource_manager import ResourceManager

from tests.conftest import encode_png
from tests.data.test_tables import Member, zip_bytes
from vitq_ray.base.config import InputError
from vitq_ray.cluster import stream as source
from vitq_ray.cluster.stream import SampleDatasource, share, stream_batches
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import BadImageError, SampleIndex, open_split
from vitq_ray.data.transforms import EvalTransform

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray's own: a DataContext warns of its old options when Ray itself sets or copies them.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data"),
]

SIZE = 16
TRANSFORM = EvalTransform(SIZE)
PIXELS = np.random.default_rng(0).integers(0, 256, (23, SIZE, SIZE, 3), np.uint8)
LABELS = [i % 4 for i in range(len(PIXELS))]
NAMES = [f"c{label}/{i:02d}.png" for i, label in enumerate(LABELS)]


def write_zip(root: Path, images: list[bytes], method: int = zipfile.ZIP_STORED, zip64: bool = False) -> SampleIndex:
    members = [Member(name.encode(), data, method) for name, data in zip(NAMES, images, strict=False)]
    return open_archive(root, zip_bytes(members, zip64=zip64), len(images))


def open_archive(root: Path, archive: bytes, count: int) -> SampleIndex:
    (root / "val.zip").write_bytes(archive)
    lines = (f"{name}\t{label}\n" for name, label in zip(NAMES[:count], LABELS, strict=False))
    (root / "val_map.txt").write_text("".join(lines))
    return open_split(str(root), "val")


def write_folder(root: Path, images: list[bytes]) -> SampleIndex:
    for name, data in zip(NAMES, images, strict=True):
        (root / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "val" / name).write_bytes(data)
    return open_split(str(root), "val")


def encoded() -> list[bytes]:
    return [encode_png(pixels) for pixels in PIXELS]


def photos(count: int) -> list[bytes]:
    """JPEGs of all shapes, none of them square."""
    rng = np.random.default_rng(1)
    shapes = [(int(h), int(h) + int(w)) for h, w in rng.integers(1, 90, (count, 2))]
    buffers = [io.BytesIO() for _ in shapes]
    for buffer, (height, width) in zip(buffers, shapes, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "JPEG")
    return [buffer.getvalue() for buffer in buffers]


def bomb() -> bytes:
    """A PNG of 225 million pixels, by its header."""
    png = bytearray(encode_png(PIXELS[0]))
    png[16:24] = (15_000).to_bytes(4, "big") * 2
    png[29:33] = zipfile.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def assert_equal(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        for x, y in ((a.images, b.images), (a.labels, b.labels), (a.sample_ids, b.sample_ids)):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def until_error(batches: Iterator[Batch]) -> tuple[list[Batch], InputError]:
    seen = []
    try:
        for batch in batches:
            seen.append(batch)
    except InputError as error:
        return seen, error
    pytest.fail("no error")


# What comes out -----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Path], SampleIndex]] = {
    "stored": lambda root: write_zip(root, encoded()),
    "deflated": lambda root: write_zip(root, encoded(), zipfile.ZIP_DEFLATED),
    "zip64": lambda root: write_zip(root, encoded(), zip64=True),
    "folder": lambda root: write_folder(root, encoded()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_those_that_were_stored(layout: str, tmp_path: Path) -> None:
    index = LAYOUTS[layout](tmp_path)
    of_name = {index.name(i): i for i in range(len(index))}  # folders are sorted by class
    ids = np.random.default_rng(2).permutation(len(index))
    batches = list(stream_batches(index, ids, TRANSFORM, 5, num_tasks=4))
    assert [len(batch.labels) for batch in batches] == [5, 5, 5, 5, 3]
    images, labels, sample_ids = (
        torch.cat([getattr(b, field) for b in batches]).numpy() for field in ("images", "labels", "sample_ids")
    )
    assert sample_ids.tolist() == ids.tolist()
    stored_as = np.argsort([of_name[name] for name in NAMES])
    assert np.array_equal(images, PIXELS[stored_as[ids]])
    assert labels.tolist() == [LABELS[stored_as[i]] for i in ids]


@pytest.mark.parametrize(("batch_size", "num_tasks"), [(7, 4), (1, 2), (100, 3), (4, 1), (3, 1000), (8, None)])
def test_same_batches_as_the_threads_and_again(batch_size: int, num_tasks: int | None, tmp_path: Path) -> None:
    index = write_zip(tmp_path, photos(23))
    ids = np.random.default_rng(batch_size).integers(0, 23, 40)  # some twice
    wanted = list(iter_batches(index, ids, TRANSFORM, batch_size))
    shared = share(index)
    for _ in range(2):
        assert_equal(
            list(stream_batches(index, ids, TRANSFORM, batch_size, shared=shared, num_tasks=num_tasks)), wanted
        )


def test_crop_and_interpolation_reach_the_workers(tmp_path: Path) -> None:
    index = write_zip(tmp_path, photos(6))
    transform = EvalTransform(24, interpolation="bicubic", crop_pct=0.8)
    assert_equal(list(stream_batches(index, range(6), transform, 4)), list(iter_batches(index, range(6), transform, 4)))


def test_order_holds_where_later_blocks_are_ready_first(tmp_path: Path) -> None:
    slow = encode_png(np.random.default_rng(3).integers(0, 256, (2500, 2500, 3), np.uint8))
    index = write_zip(tmp_path, [slow, *encoded()[1:]])
    ids = [1, 0, *range(2, 23)]
    found = stream_batches(index, iter(ids), TRANSFORM, 1, num_tasks=len(ids))
    assert [int(batch.sample_ids) for batch in found] == ids


def test_batches_are_their_own_memory(tmp_path: Path) -> None:
    batch = next(iter(stream_batches(write_zip(tmp_path, encoded()), range(23), TRANSFORM, 4)))
    batch.images.zero_()  # the object store is read-only


def test_no_ids_no_batches(tmp_path: Path) -> None:
    assert list(stream_batches(write_zip(tmp_path, encoded()), [], TRANSFORM, 4)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size: expected an integer >= 1, got 0"),
        ({"num_tasks": 0}, "number of tasks: expected an integer >= 1, got 0"),
        ({"on_bad_image": "ignore"}, "on bad image: 'ignore' is not one of error, skip"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str, tmp_path: Path) -> None:
    index = write_zip(tmp_path, encoded())
    with pytest.raises(InputError, match=re.escape(message)):
        list(stream_batches(index, range(4), TRANSFORM, **{"batch_size": 2, **options}))  # type: ignore[arg-type]


# Broken images ------------------------------------------------------------------------------------------------------

REASONS = {
    3: "not a readable image: cannot identify image file",
    4: "not a readable image: Image size (225000000 pixels) exceeds limit",
    9: "corrupt: size or checksum is not that of the zip's directory",
    10: "corrupt: inflates to more than the 20 bytes of the directory",
    17: "not a readable image: image file is truncated",
    22: "truncated: ",
}


@pytest.fixture
def broken(tmp_path: Path) -> SampleIndex:
    """Six images broken in six ways: no image, a bomb, a wrong checksum, a deflate bomb, half a PNG, half a member."""
    members = [Member(name.encode(), data) for name, data in zip(NAMES, encoded(), strict=True)]
    members[3] = Member(NAMES[3].encode(), b"a text")
    members[4] = Member(NAMES[4].encode(), bomb())
    members[9] = Member(NAMES[9].encode(), members[9].data, crc=1)
    members[10] = Member(NAMES[10].encode(), members[10].data, zipfile.ZIP_DEFLATED, size=20)
    members[17] = Member(NAMES[17].encode(), members[17].data[:300])
    archive = zip_bytes(members)
    index = open_archive(tmp_path, archive, len(NAMES))
    assert index.members is not None
    # Cut only now: without its directory at the end, a zip cannot be opened.
    os.truncate(index.source, int(index.members["offset"][22]) + 400)
    return index


def test_skipped_images_are_listed_and_later_ones_move_up(broken: SampleIndex) -> None:
    ids = np.random.default_rng(4).permutation(23)
    bad: list[tuple[str, str]] = []
    batches = list(stream_batches(broken, ids, TRANSFORM, 4, "skip", bad, num_tasks=5))
    good = [i for i in ids.tolist() if i not in REASONS]
    assert [batch.sample_ids.tolist() for batch in batches] == [good[i : i + 4] for i in range(0, len(good), 4)]
    assert np.array_equal(torch.cat([batch.images for batch in batches]).numpy(), PIXELS[good])

    listed = [i for i in ids.tolist() if i in REASONS]
    assert [where for where, _ in bad] == [f"{broken.source}!{NAMES[i]}" for i in listed]
    for i, (where, reason) in zip(listed, bad, strict=True):
        assert reason.startswith(f"{where}: {REASONS[i]}")
        assert "\n" not in reason
    by_threads: list[tuple[str, str]] = []
    assert_equal(batches, list(iter_batches(broken, ids, TRANSFORM, 4, 2, "skip", by_threads)))
    assert bad == by_threads


@pytest.mark.parametrize("i", REASONS)
def test_the_first_broken_image_in_order_is_the_error(broken: SampleIndex, i: int) -> None:
    ids = [0, 1, 2, i, 5, 6, *REASONS]
    seen, error = until_error(stream_batches(broken, ids, TRANSFORM, 2, num_tasks=3))
    wanted, message = until_error(iter_batches(broken, ids, TRANSFORM, 2))
    assert_equal(seen, wanted)  # the batch before it, and not the half one
    assert type(error) is BadImageError
    assert str(error) == str(message)
    assert str(error).startswith(f"{broken.source}!{NAMES[i]}: {REASONS[i]}")
    assert error.__cause__ is error.__context__ is None


def test_nothing_but_broken_images(broken: SampleIndex) -> None:
    bad: list[tuple[str, str]] = []
    assert list(stream_batches(broken, list(REASONS), TRANSFORM, 2, "skip", bad)) == []
    assert len(bad) == len(REASONS)
    assert list(stream_batches(broken, list(REASONS), TRANSFORM, 2, "skip")) == []  # nobody wants the list


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_node_without_the_archive_is_no_broken_image(on_bad_image: str, tmp_path: Path) -> None:
    index = write_zip(tmp_path, encoded())
    os.rename(index.source, tmp_path / "elsewhere.zip")
    seen, error = until_error(stream_batches(index, range(23), TRANSFORM, 4, on_bad_image))
    assert seen == []
    assert type(error) is InputError
    assert re.fullmatch(
        re.escape(index.source) + r": not there on node \S+; expected a path that all nodes see, or a URI", str(error)
    )
    assert error.__cause__ is error.__context__ is None


# What it costs ------------------------------------------------------------------------------------------------------


def test_the_index_is_not_in_the_tasks(tmp_path: Path) -> None:
    rows = 100_000
    index = SampleIndex(
        source=str(tmp_path),
        labels=np.arange(rows, dtype=np.int32),
        names=np.zeros(10 * rows, np.uint8),
        name_start=10 * np.arange(rows),
        name_length=np.full(rows, 10, np.int32),
        sizes=np.arange(rows),
    )
    assert len(pickle.dumps(index)) > 3_000_000
    ids = np.random.default_rng(0).permutation(rows)
    datasource = SampleDatasource(share(index), ids, TRANSFORM)
    tasks = datasource.get_read_tasks(source._num_tasks(rows, TRANSFORM, 2, 10**10))
    assert len(tasks) > 100
    assert max(len(ray.cloudpickle.dumps(task)) for task in tasks) < 20_000
    assert sum(task.metadata.num_rows or 0 for task in tasks) == rows


@pytest.mark.parametrize(
    ("images", "size", "cpus", "store", "tasks"),
    [
        (1, 224, 2, 10**10, 1),
        (300, 224, 2, 10**10, 2),
        (700, 224, 2, 10**10, 2),
        (1300, 224, 2, 10**10, 4),
        (1300, 224, 3, 10**10, 3),
        (640, 448, 1, 10**10, 4),
        (1000, 224, 8, 10**10, 7),  # no task of less than a block
        (10_000, 224, 2, 3 * 10**8, 42),  # a task on every CPU takes no more than a quarter of the store
    ],
)
def test_few_tasks_are_equally_many_for_every_cpu(images: int, size: int, cpus: int, store: int, tasks: int) -> None:
    assert source._num_tasks(images, EvalTransform(size), cpus, store) == tasks


@pytest.mark.parametrize(("size", "rows"), [(64, [128, 128, 44]), (384, [56] * 5 + [20])])
def test_a_task_hands_over_its_images_in_blocks(size: int, rows: list[int], tmp_path: Path) -> None:
    index, ids = write_zip(tmp_path, encoded()), np.arange(300) % 23
    dataset = source._dataset(SampleDatasource(share(index), ids, EvalTransform(size)), 1, 1, None)
    blocks = list(source._blocks(dataset))
    assert [len(block["sample_id"]) for block in blocks] == rows
    assert np.concatenate([block["sample_id"] for block in blocks]).tolist() == ids.tolist()


def constants() -> tuple[object, object]:
    """What of Ray Data is shortened: the class attribute itself, and the number of seconds."""
    attribute = ResourceManager.__dict__["GLOBAL_LIMITS_UPDATE_INTERVAL_S"]
    return attribute, streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S


@pytest.mark.skipif(not ray.__version__.startswith(source._KNOWN_RAY), reason="another Ray is left alone")
def test_ray_data_is_hurried_while_a_stream_is_open_and_as_before_afterwards(tmp_path: Path) -> None:
    index, before = write_zip(tmp_path, encoded()), constants()
    streams = [stream_batches(index, np.arange(20), TRANSFORM, 5) for _ in range(2)]
    for stream in streams:
        next(stream)
    attribute, seconds = constants()
    assert isinstance(attribute, property)
    assert seconds == 0.05
    streams[0].close()  # type: ignore[attr-defined]
    assert constants() == (attribute, seconds), "the other stream is still open"
    list(streams[1])
    assert constants() == before
    with pytest.raises(RuntimeError, match="in the middle"), source.hurried_ray_data:
        raise RuntimeError("in the middle")
    assert constants() == before


def test_an_unknown_ray_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.99.0")
    before = constants()
    with source.hurried_ray_data:
        assert constants() == before
    assert constants() == before


def test_processes_share_the_arrays_of_an_index(tmp_path: Path) -> None:
    shared = share(write_zip(tmp_path, encoded()))
    local, again = source._local_index(shared), source._local_index(shared)
    assert local is again
    assert np.shares_memory(local.labels, ray.get(shared).labels)


def readers(path: str) -> Counter[int]:
    """{process: how often it has the file open}, without this process."""
    found: Counter[int] = Counter()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found[int(link.parts[2])] += os.readlink(link) == path
        except OSError:  # closed meanwhile
            continue
    del found[os.getpid()]
    return +found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files in /proc")
def test_workers_open_the_archive_once_and_outlive_a_pass_left_early(tmp_path: Path) -> None:
    index = write_zip(tmp_path, photos(23))
    shared, ids = share(index), np.arange(2300) % 23
    list(stream_batches(index, ids, TRANSFORM, 100, shared=shared))
    first = readers(index.source)
    with closing(stream_batches(index, ids, TRANSFORM, 10, shared=shared)) as left_early:
        next(left_early)
    list(stream_batches(index, ids, TRANSFORM, 100, shared=shared))
    again = readers(index.source)
    assert set(first.values()) == set(again.values()) == {1}
    assert set(first) & set(again), "Ray may end one that is idle, but not all"


def stored_bytes() -> float:
    """Bytes in use in the object store."""
    return ray.cluster_resources()["object_store_memory"] - ray.available_resources().get("object_store_memory", 0.0)


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_memory_is_bounded_for_a_slow_consumer_and_given_back(tmp_path: Path) -> None:
    index, transform = write_zip(tmp_path, encoded()), EvalTransform(224)
    ids = np.arange(3000) % 23  # 450 MB of pixels, more than the whole store
    before = stored_bytes()
    task = 75 * 3 * 224 * 224
    stream = stream_batches(index, ids, transform, 10, num_tasks=40)
    next(stream)
    assert eventually(lambda: stored_bytes() - before > 2 * task)  # they do work ahead
    time.sleep(2)
    cpus = int(ray.cluster_resources()["CPU"])
    assert stored_bytes() - before < (source._TASKS_AHEAD + 2) * cpus * task
    stream.close()  # type: ignore[attr-defined]
    assert eventually(lambda: stored_bytes() - before < task)


# S3 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def upload(root: Path, endpoint: str, bucket: str) -> str:
    """The URI of `root` as uploaded to a new bucket."""
    boto3 = pytest.importorskip("boto3")
    access = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **access)
    client.create_bucket(Bucket=bucket)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        client.upload_file(str(path), bucket, f"data/{path.relative_to(root)}")
    client.close()
    query = f"endpoint_override={quote(endpoint, safe='')}&scheme=http&region=us-east-1"
    return f"s3://key:secret@{bucket}/data?{query}"


@pytest.mark.parametrize("layout", ["deflated", "folder"])
def test_s3(layout: str, s3_endpoint: str, tmp_path: Path) -> None:
    local = LAYOUTS[layout](tmp_path)
    index = open_split(upload(tmp_path, s3_endpoint, f"test-{layout}"), "val")
    assert index.fingerprint == local.fingerprint
    ids = np.random.default_rng(5).permutation(23)
    assert_equal(
        list(stream_batches(index, ids, TRANSFORM, 4, num_tasks=5)), list(iter_batches(local, ids, TRANSFORM, 4))
    )
