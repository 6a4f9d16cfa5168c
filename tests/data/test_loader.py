"""Against decoding one image after the other."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_tables import Member, zip_bytes
from vitq_ray.base.config import InputError
from vitq_ray.data.loader import Batch, iter_batches
from vitq_ray.data.samples import BadImageError, SampleIndex, open_split
from vitq_ray.data.transforms import EvalTransform

COUNT, SIZE = 23, 8
BROKEN = {4: b"no image", 5: b"", 19: b"\xff\xd8\xff"}
TRANSFORM = EvalTransform(SIZE)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_index(root: Path, broken: dict[int, bytes]) -> SampleIndex:
    members = [Member(b"%d.png" % i, broken.get(i, png(i))) for i in range(COUNT)]
    (root / "val.zip").write_bytes(zip_bytes(members))
    (root / "val_map.txt").write_text("".join(f"{i}.png\t{(i * 5) % 7}\n" for i in range(COUNT)))
    return open_split(str(root), "val")


@pytest.fixture
def index(tmp_path: Path) -> SampleIndex:
    return make_index(tmp_path, {})


@pytest.fixture
def broken_index(tmp_path: Path) -> SampleIndex:
    return make_index(tmp_path, BROKEN)


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def check(batches: list[Batch], ids: list[int], batch_size: int) -> None:
    """The batches hold these images, in full batches but for the last."""
    sizes = [len(batch.labels) for batch in batches]
    assert sizes == [len(ids[k : k + batch_size]) for k in range(0, len(ids), batch_size)]
    for batch in batches:
        n = len(batch.labels)
        assert (batch.images.shape, batch.images.dtype) == ((n, SIZE, SIZE, 3), torch.uint8)
        assert (batch.labels.dtype, batch.sample_ids.dtype) == (torch.int64, torch.int64)
    if not batches:
        return
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == ids
    assert torch.cat([batch.labels for batch in batches]).tolist() == [i * 5 % 7 for i in ids]
    expected = np.stack([TRANSFORM.decode(png(i), "x") for i in ids])
    np.testing.assert_array_equal(torch.cat([batch.images for batch in batches]).numpy(), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_batches_follow_the_ids(index: SampleIndex, num_threads: int, batch_size: int) -> None:
    ids = np.random.default_rng(0).permutation(COUNT)
    batches = list(iter_batches(index, ids, TRANSFORM, batch_size, num_threads))
    check(batches, ids.tolist(), batch_size)
    assert decoders() == []


def test_ids_may_repeat_be_few_or_none(index: SampleIndex) -> None:
    for ids in ([3, 3, 0], [22], []):
        check(list(iter_batches(index, ids, TRANSFORM, 2)), ids, 2)


def test_more_images_than_are_in_flight(index: SampleIndex) -> None:
    ids = list(range(COUNT)) * 5
    check(list(iter_batches(index, iter(ids), TRANSFORM, 10, num_threads=1)), ids, 10)


def test_work_is_handed_out_a_few_batches_ahead(index: SampleIndex) -> None:
    taken: list[int] = []
    ids = (taken.append(i) or i % COUNT for i in range(10**6))  # type: ignore[func-returns-value]
    batches = iter_batches(index, ids, TRANSFORM, 4, num_threads=2)
    next(batches)
    assert len(taken) < 60
    next(batches)
    assert len(taken) < 60
    batches.close()
    assert decoders() == []


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_skipped_images_are_listed_and_later_ones_move_up(broken_index: SampleIndex, num_threads: int) -> None:
    bad: list[tuple[str, str]] = []
    batches = list(iter_batches(broken_index, range(COUNT), TRANSFORM, 6, num_threads, "skip", bad))
    check(batches, [i for i in range(COUNT) if i not in BROKEN], 6)
    assert [address for address, _ in bad] == [broken_index.where(i) for i in BROKEN]
    assert all(reason.startswith(f"{address}: not a readable image: ") for address, reason in bad)


def test_skipping_without_a_list(broken_index: SampleIndex) -> None:
    check(list(iter_batches(broken_index, [3, 4, 6], TRANSFORM, 6, on_bad_image="skip")), [3, 6], 6)
    assert list(iter_batches(broken_index, [4, 5], TRANSFORM, 6, on_bad_image="skip")) == []


def test_members_that_cannot_be_read_are_skipped_too(tmp_path: Path, index: SampleIndex) -> None:
    archive = tmp_path / "val.zip"
    data = bytearray(archive.read_bytes())
    data[int(index.members["offset"][7]) + 60] ^= 1
    archive.write_bytes(bytes(data))
    bad: list[tuple[str, str]] = []
    batches = list(iter_batches(index, range(COUNT), TRANSFORM, 6, 2, "skip", bad))
    check(batches, [i for i in range(COUNT) if i != 7], 6)
    reason = f"{index.where(7)}: corrupt: size or checksum is not that of the zip's directory"
    assert bad == [(index.where(7), reason)]


def test_a_broken_image_is_an_error_that_leaves_no_thread(broken_index: SampleIndex) -> None:
    batches = iter_batches(broken_index, range(COUNT), TRANSFORM, 3)
    assert next(batches).sample_ids.tolist() == [0, 1, 2]
    with pytest.raises(BadImageError, match=r"val\.zip!4\.png: not a readable image: cannot identify image file"):
        next(batches)
    assert decoders() == []
    with pytest.raises(StopIteration):
        next(batches)


def test_an_unexpected_error_is_not_taken_for_a_broken_image(
    index: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: EvalTransform, data: bytes, name: str, sample_id: int = 0) -> None:
        raise RuntimeError(f"a mistake in the program at {name}")

    monkeypatch.setattr(EvalTransform, "decode", fail)
    with pytest.raises(RuntimeError, match=r"a mistake in the program at .*0\.png"):
        list(iter_batches(index, range(COUNT), TRANSFORM, 3, on_bad_image="skip"))
    assert decoders() == []


def test_closing_early_stops_the_threads(index: SampleIndex) -> None:
    batches = iter_batches(index, range(COUNT), TRANSFORM, 3, num_threads=3)
    next(batches)
    assert decoders() != []
    batches.close()
    assert decoders() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size: expected an integer >= 1, got 0"),
        ({"num_threads": 0}, "number of threads: expected an integer >= 1, got 0"),
        ({"on_bad_image": "ignore"}, "on bad image: 'ignore' is not one of error, skip"),
    ],
)
def test_impossible_options(index: SampleIndex, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        next(iter_batches(index, range(3), TRANSFORM, **{"batch_size": 2, **options}))
    assert str(caught.value) == message
