"""Against `zipfile` and torchvision's `ImageFolder`; whatever is cut or flipped must show."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from tests.conftest import ROOT, make_project
from tests.data.test_tables import FOLDER, Member, zip_bytes
from vitq_ray.base.config import InputError
from vitq_ray.base.files import resolve
from vitq_ray.data import samples
from vitq_ray.data.samples import (
    BadImageError,
    SampleIndex,
    has_split,
    open_split,
)

CLOTHING = ROOT.parent / "shared" / "data" / "clothing-zip"
STORED = Member(b"cat/1.jpg", b"a stored image")
DEFLATED = Member(b"dog/2.jpg", b"a deflated image " * 9, zipfile.ZIP_DEFLATED)
EMPTY = Member(b"dog/empty.jpg", b"")
MEMBERS = [STORED, DEFLATED, EMPTY]
MAP = "cat/1.jpg\t0\ndog/2.jpg\t1\ndog/empty.jpg\t1\n"


def write_split(root: Path, archive: bytes, lines: str | bytes = MAP, split: str = "train") -> Path:
    (root / f"{split}.zip").write_bytes(archive)
    (root / f"{split}_map.txt").write_bytes(lines.encode() if isinstance(lines, str) else lines)
    return root


def open_members(root: Path, members: Sequence[Member] = MEMBERS, lines: str | bytes = MAP) -> SampleIndex:
    return open_split(str(write_split(root, zip_bytes(list(members)), lines)), "train")


def expect_error(root: Path, message: str, split: str = "train", num_classes: int | None = None) -> None:
    """The message, in full, with the data's folder written as `<root>`; on one line."""
    with pytest.raises(InputError) as caught:
        open_split(str(root), split, num_classes)
    assert str(caught.value).replace(str(root), "<root>") == message


def write_images(root: Path, *paths: str) -> None:
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (i, 0, 0)).save(root / path, "PNG")


# Reading zips -------------------------------------------------------------------------------------------------------


def test_members_read_as_zipfile_reads_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a b/stored.jpg", b"1")
        archive.writestr("deflated.jpg", bytes(range(256)) * 50, zipfile.ZIP_DEFLATED)
        archive.mkdir("folder")
        with archive.open("folder/forced 64.jpg", "w", force_zip64=True) as file:
            file.write(b"3" * 500)
        archive.writestr("ünïcode/写真.jpg", b"4")
        archive.writestr("nothing.jpg", b"")
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
    order = names[::-1]  # the map's order counts, not the archive's
    (tmp_path / "train_map.txt").write_text("".join(f"{name}\t{k}\n" for k, name in enumerate(order)))
    index = open_split(str(tmp_path), "train", num_classes=5)
    assert (len(index), index.num_classes_seen, index.labels.tolist()) == (5, 5, [0, 1, 2, 3, 4])
    with zipfile.ZipFile(tmp_path / "train.zip") as archive:
        for i, name in enumerate(order):
            assert index.name(i) == name
            assert index.where(i) == f"{tmp_path}/train.zip!{name}"
            assert index.read(i) == archive.read(name)
            assert index.sizes[i] == archive.getinfo(name).file_size


file_names = st.text(st.characters(codec="utf-8", exclude_characters="\0\t\n\ufeff"), min_size=1, max_size=9).filter(
    lambda name: not name.endswith("/") and not name.rpartition("/")[2].startswith("._")
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(file_names, st.binary(max_size=300), st.booleans()), min_size=1, max_size=6),
    st.binary(max_size=20),
    st.binary(max_size=20).filter(lambda comment: b"PK" not in comment),  # zipfile would take it for the end record
)
@example([("twice", b"old", False), ("twice", b"new", False)], b"", b"")
def test_any_archive_reads_as_with_zipfile(files: list[tuple[str, bytes, bool]], stub: bytes, comment: bytes) -> None:
    members = [
        Member(name.encode(), data, zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED, flags=0x800)
        for name, data, deflated in files
    ]
    with tempfile.TemporaryDirectory() as folder:
        names = list(dict.fromkeys(name for name, _, _ in files))
        lines = "".join(f"{name}\t{k}\n" for k, name in enumerate(names))
        root = write_split(Path(folder), zip_bytes(members, stub, comment), lines.encode())
        index = open_split(folder, "train")
        with zipfile.ZipFile(root / "train.zip") as archive:
            for i, name in enumerate(names):
                assert (index.name(i), index.read(i)) == (name, archive.read(name))


def test_of_duplicate_members_the_last_counts(tmp_path: Path) -> None:
    index = open_members(tmp_path, [STORED, replace(STORED, data=b"newer"), EMPTY], "cat/1.jpg\t0\n")
    assert index.read(0) == b"newer"


@pytest.mark.parametrize("top", [b"", b"train/", b"two words/"])
def test_one_extra_top_folder(tmp_path: Path, top: bytes) -> None:
    folders = [replace(FOLDER, name=top), replace(FOLDER, name=top + b"dog/")] if top else []
    index = open_members(tmp_path, folders + [replace(m, name=top + m.name) for m in MEMBERS])
    assert [index.read(i) for i in range(3)] == [m.data for m in MEMBERS]
    assert index.name(1) == "dog/2.jpg"


def test_a_local_extra_field_longer_than_what_is_read_ahead(tmp_path: Path) -> None:
    index = open_members(tmp_path, [replace(STORED, local_extra=b"\x34\x12\xfc\x01" + bytes(508)), DEFLATED, EMPTY])
    assert [index.read(i) for i in range(3)] == [m.data for m in MEMBERS]


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_names_without_the_utf8_flag(tmp_path: Path, encoding: str) -> None:
    index = open_members(tmp_path, [STORED, replace(EMPTY, name="é/ü.jpg".encode(encoding), data=b"x")], "é/ü.jpg\t0\n")
    assert (index.name(0), index.read(0)) == ("é/ü.jpg", b"x")


def test_a_name_that_is_not_utf8_can_be_read_and_told(tmp_path: Path) -> None:
    index = open_members(tmp_path, [replace(STORED, name=b"\xe9.jpg")], b"\xe9.jpg\t0\n")
    assert index.read(0) == STORED.data
    assert index.name(0) == "\ufffd.jpg"


def test_from_several_threads_at_once(tmp_path: Path) -> None:
    members = [Member(b"%d" % i, b"%d " % i * 500, (0, 8)[i % 2]) for i in range(200)]
    index = open_members(tmp_path, members, "".join(f"{i}\t0\n" for i in range(200)))
    order = np.random.default_rng(0).integers(200, size=2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(index.read, order))
    assert found == [members[i].data for i in order]
    assert len(index._file) == 1


@pytest.mark.skipif(not CLOTHING.is_dir(), reason="the clothing data (../shared/data) are not on this machine")
@pytest.mark.parametrize("split", ["train", "val"])
def test_clothing(split: str) -> None:
    index = open_split(str(CLOTHING), split, num_classes=10)
    rows = [line.split("\t") for line in (CLOTHING / f"{split}_map.txt").read_text().splitlines()]
    assert [(index.name(i), str(index.labels[i])) for i in range(len(index))] == [tuple(row) for row in rows]
    with zipfile.ZipFile(CLOTHING / f"{split}.zip") as archive:
        member = {name.split("/", 1)[-1] if name not in dict(rows) else name: name for name in archive.namelist()}
        for i, (name, _) in enumerate(rows):
            assert index.read(i) == archive.read(member[name]), name


# Damage -------------------------------------------------------------------------------------------------------------


def outcome(root: Path, data: bytes) -> str:
    """How a damaged archive shows itself: never as other bytes, never as another exception."""
    (root / "train.zip").write_bytes(data)
    try:
        index = open_split(str(root), "train")
    except InputError as error:
        message = str(error)
        beginning, kind = str(root), "refused"
    else:
        message = beginning = ""
        kind = "whole"
        for i, member in enumerate(MEMBERS):
            try:
                found = index.read(i)
            except BadImageError as error:
                message = str(error)
                beginning, kind = f"{root}/train.zip!{member.name.decode()}: ", "bad image"
            else:
                assert found == member.data
    assert message.startswith(beginning)
    assert "\n" not in message
    return kind


WIDE = [replace(m, zip64=("size", "stored", "offset")) for m in MEMBERS]


@pytest.mark.parametrize("whole", [zip_bytes(MEMBERS), zip_bytes(WIDE, zip64=True)], ids=["zip", "zip64"])
def test_cut_anywhere(tmp_path: Path, whole: bytes) -> None:
    write_split(tmp_path, whole)
    assert outcome(tmp_path, whole) == "whole"
    assert {outcome(tmp_path, whole[:n]) for n in range(len(whole))} == {"refused"}
    # Cut in the middle, the end still there: all that lies behind the cut is gone or moved.
    assert "whole" not in {outcome(tmp_path, whole[:n] + whole[n + 20 :]) for n in range(0, len(whole) - 60, 3)}


@pytest.mark.parametrize("whole", [zip_bytes(MEMBERS), zip_bytes(WIDE, zip64=True)], ids=["zip", "zip64"])
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_flip_anywhere(tmp_path: Path, whole: bytes, mask: int) -> None:
    write_split(tmp_path, whole)
    seen = Counter(outcome(tmp_path, whole[:n] + bytes([whole[n] ^ mask]) + whole[n + 1 :]) for n in range(len(whole)))
    assert set(seen) == {"whole", "refused", "bad image"}  # whole: dates, attributes and the like
    data_bytes = sum(len(m.packed()) for m in MEMBERS)
    assert seen["bad image"] >= data_bytes - 1


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (replace(STORED, crc=1), "corrupt: size or checksum is not that of the zip's directory"),
        (replace(DEFLATED, crc=1), "corrupt: size or checksum is not that of the zip's directory"),
        (replace(STORED, size=13), "corrupt: size or checksum is not that of the zip's directory"),
        (replace(DEFLATED, size=200), "corrupt: size or checksum is not that of the zip's directory"),
        (replace(DEFLATED, size=100), "corrupt: inflates to more than the 100 bytes of the directory"),
        (replace(EMPTY, data=b"\0" * 9, size=0), "corrupt: size or checksum is not that of the zip's directory"),
    ],
)
def test_lying_members(tmp_path: Path, member: Member, message: str) -> None:
    index = open_members(tmp_path, [member, Member(b"fine", b"fine")], f"{member.name.decode()}\t0\nfine\t1\n")
    with pytest.raises(BadImageError, match="^" + re.escape(f"{index.where(0)}: {message}") + "$"):
        index.read(0)
    assert index.read(1) == b"fine"


def test_garbage_instead_of_deflated_bytes(tmp_path: Path) -> None:
    data = zip_bytes([DEFLATED]).replace(DEFLATED.packed(), b"\xff" * len(DEFLATED.packed()))
    index = open_split(str(write_split(tmp_path, data, "dog/2.jpg\t0\n")), "train")
    with pytest.raises(BadImageError, match=r"train\.zip!dog/2\.jpg: cannot be read: Error -3 while decompressing"):
        index.read(0)


def test_a_bomb_stops_at_the_promised_size(tmp_path: Path) -> None:
    index = open_members(tmp_path, [Member(b"bomb", bytes(5_000_000), 8, size=1000)], "bomb\t0\n")
    tracemalloc.start()
    with pytest.raises(BadImageError, match="inflates to more than the 1000 bytes"):
        index.read(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_an_archive_that_shrinks_or_goes_after_opening(tmp_path: Path) -> None:
    index = open_members(tmp_path)
    archive = tmp_path / "train.zip"
    archive.write_bytes(archive.read_bytes()[:45])
    with pytest.raises(BadImageError, match=r"train\.zip!cat/1\.jpg: truncated: 6 of 14 bytes are there"):
        index.read(0)
    with pytest.raises(BadImageError, match=r"dog/2\.jpg: corrupt: no local header at byte 53; is the zip truncated"):
        index.read(1)
    archive.unlink()
    with pytest.raises(BadImageError, match=r"train\.zip!cat/1\.jpg: cannot be read: .*No such file"):
        pickle.loads(pickle.dumps(index)).read(0)


def test_members_that_cannot_be_read(tmp_path: Path) -> None:
    write_split(tmp_path, zip_bytes([STORED, replace(DEFLATED, flags=1), EMPTY]))
    expect_error(tmp_path, "<root>/train.zip!dog/2.jpg: is encrypted; expected a stored (0) or deflated (8) member")
    write_split(tmp_path, zip_bytes([STORED, DEFLATED, replace(EMPTY, method=12)]))
    expect_error(
        tmp_path,
        "<root>/train.zip!dog/empty.jpg: has compression method 12; expected a stored (0) or deflated (8) member",
    )
    write_split(tmp_path, zip_bytes([STORED, DEFLATED, replace(EMPTY, method=12)]), "cat/1.jpg\t0\n")
    assert open_split(str(tmp_path), "train").read(0) == STORED.data  # what the map does not name may be anything


# Map files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        MAP,
        MAP.rstrip("\n"),
        MAP.replace("\n", "\r\n"),
        "\ufeff" + MAP,
        "\n \n" + MAP.replace("\n", "\n\n\r\n\t\n"),
        MAP.replace("\t", "\t  ").replace("\n", " \n"),
    ],
    ids=["plain", "no last line feed", "crlf", "byte order mark", "blank lines", "spaces around labels"],
)
def test_forms_of_a_map(tmp_path: Path, lines: str) -> None:
    index = open_members(tmp_path, MEMBERS, lines)
    assert [index.name(i) for i in range(len(index))] == ["cat/1.jpg", "dog/2.jpg", "dog/empty.jpg"]
    assert index.labels.tolist() == [0, 1, 1]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert index.fingerprint == open_members(plain).fingerprint


def test_spaces_and_tabs_in_names(tmp_path: Path) -> None:
    names = [b" a  b .jpg ", b"c\td.jpg"]
    index = open_members(tmp_path, [Member(name, name) for name in names], b"".join(n + b"\t7\n" for n in names))
    assert [index.read(i) for i in range(2)] == names
    assert index.labels.tolist() == [7, 7]


FORM = "expected relative/path<TAB>label, a label from 0 to"


@pytest.mark.parametrize(
    ("lines", "num_classes", "message"),
    [
        ("", None, "lists no image; expected lines of relative/path<TAB>label"),
        ("\n \r\n", None, "lists no image; expected lines of relative/path<TAB>label"),
        ("\n\ncat/1.jpg 0\n", 5, f"line 3: no tab in 'cat/1.jpg 0'; {FORM} 4"),
        ("cat/1.jpg\t0\r\ndog/2.jpg\tdog\r\n", None, rf"line 2: {{}} in 'dog/2.jpg\tdog'; {FORM} 2147483647"),
        ("cat/1.jpg\t-1", 5, rf"line 1: {{}} in 'cat/1.jpg\t-1'; {FORM} 4"),
        ("cat/1.jpg\t1.0", 5, rf"line 1: {{}} in 'cat/1.jpg\t1.0'; {FORM} 4"),
        ("cat/1.jpg\t", 5, rf"line 1: {{}} in 'cat/1.jpg\t'; {FORM} 4"),
        ("\t1", 5, rf"line 1: {{}} in '\t1'; {FORM} 4"),
        (MAP, 1, rf"line 2: label out of range in 'dog/2.jpg\t1'; {FORM} 0"),
        ("cat/1.jpg\t2147483648", None, rf"line 1: label out of range in 'cat/1.jpg\t2147483648'; {FORM} 2147483647"),
        ("cat/1.jpg\t4294967296", 9, rf"line 1: label out of range in 'cat/1.jpg\t4294967296'; {FORM} 8"),
        (
            MAP + "\ncat/3.jpg\t1\n",
            None,
            "line 5: 'cat/3.jpg' is not in <root>/train.zip (3 members); expected the path of a member",
        ),
        ("dog/\t1", None, "line 1: 'dog/' is not in <root>/train.zip (3 members); expected the path of a member"),
    ],
)
def test_errors_in_a_map(tmp_path: Path, lines: str, num_classes: int | None, message: str) -> None:
    write_split(tmp_path, zip_bytes([FOLDER, *MEMBERS]), lines)
    problem = message.format("the label is not a non-negative integer")
    expect_error(tmp_path, f"<root>/train_map.txt: {problem}", num_classes=num_classes)


def test_missing_files(tmp_path: Path) -> None:
    expect_error(tmp_path, "<root>: has no train split; expected train.zip with train_map.txt, or a folder train")
    assert not has_split(str(tmp_path), "train")
    write_split(tmp_path, zip_bytes(MEMBERS))
    assert has_split(f"{tmp_path}/", "train")
    assert not has_split(str(tmp_path), "val")
    (tmp_path / "train_map.txt").unlink()
    assert not open_split(str(tmp_path), "train").has_labels
    (tmp_path / "train.zip").write_bytes(b"GIF89a")
    expect_error(tmp_path, "<root>/train.zip: not a zip, or truncated: no end-of-directory record in its last bytes")
    expect_error(tmp_path, "split: 'test' is not one of train, val", split="test")


# Folders ------------------------------------------------------------------------------------------------------------


def test_folders_are_numbered_as_image_folder_does(tmp_path: Path) -> None:
    write_images(
        tmp_path / "train", "b/2.png", "b/10.PNG", "a c/x.jpg", "a/deep/er/y.jpeg", "Z/z.webp", "é/1.bmp", "a/m.jpg"
    )
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/stray.jpg").write_text("in no class")
    index = open_split(str(tmp_path), "train", num_classes=5)
    theirs = ImageFolder(str(tmp_path / "train"))
    found = [(index.where(i), int(index.labels[i])) for i in range(len(index))]
    assert sorted(found) == sorted(theirs.samples)
    assert [label for _, label in found] == [0, 1, 1, 2, 3, 3, 4]
    assert [index.name(i) for i in (1, 2, 4, 5)] == ["a/deep/er/y.jpeg", "a/m.jpg", "b/10.PNG", "b/2.png"]
    for i in range(len(index)):
        assert index.read(i) == Path(index.where(i)).read_bytes()
        assert index.sizes[i] == len(index.read(i))


def test_folders_of_tools_are_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/1.png", "train/b/2.png", "train/.ipynb_checkpoints/1.png", "train/__MACOSX/a/1.png")
    index = open_split(str(tmp_path), "train", num_classes=2)
    assert [(index.name(i), int(index.labels[i])) for i in range(len(index))] == [("a/1.png", 0), ("b/2.png", 1)]


def test_val_has_the_numbers_of_train(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/b/2.png")
    index = open_split(str(tmp_path), "val", num_classes=3)
    assert [(index.name(i), int(index.labels[i])) for i in range(2)] == [("b/2.png", 1), ("c/1.png", 2)]
    write_images(tmp_path, "val/d/1.png")
    expect_error(tmp_path, "<root>/val/d/1.png: its class is not among the 3 folders of <root>/train", split="val")


def test_val_alone_numbers_itself(tmp_path: Path) -> None:
    write_images(tmp_path, "val/c/1.png", "val/b/2.png")
    assert open_split(str(tmp_path), "val").labels.tolist() == [0, 1]


def test_errors_of_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png")
    expect_error(
        tmp_path,
        "<root>: 3 class folders, but the model has 2 classes; folders are numbered by name, "
        "so there must be one for each",
        num_classes=2,
    )
    (tmp_path / "val/a").mkdir(parents=True)
    (tmp_path / "val/a/readme.md").write_text("")
    expect_error(
        tmp_path,
        "<root>/val: no images; expected val/<class>/*.jpg or another format. "
        "Left out: 1 are no images (first: a/readme.md)",
        split="val",
    )
    index = open_split(str(tmp_path), "train")
    (tmp_path / "train/b/1.png").unlink()
    with pytest.raises(BadImageError, match=r"train/b/1\.png: cannot be read: .*No such file"):
        index.read(1)


# The index as a value -----------------------------------------------------------------------------------------------


def test_pickle_is_small_and_reads_on(tmp_path: Path) -> None:
    count = 1000
    members = [Member(b"%d" % i, b"%d" % i) for i in range(count)]
    index = open_members(tmp_path, members, "".join(f"{i}\t{i % 7}\n" for i in range(count)))
    index.read(0)
    fingerprint = index.fingerprint
    assert len(index._file) == 1
    pickled = pickle.dumps(index)
    assert len(pickled) < 100 * count
    copy = pickle.loads(pickled)
    assert copy._file == []
    assert [copy.read(i) for i in (0, 17, 999)] == [b"0", b"17", b"999"]
    assert copy.fingerprint == fingerprint
    np.testing.assert_array_equal(copy.labels, index.labels)
    for value in (index, copy):
        with pytest.raises(ValueError, match="read-only"):
            value.labels[0] = 1


def test_uri_and_path_give_the_same_index(tmp_path: Path) -> None:
    write_split(tmp_path, zip_bytes(MEMBERS))
    write_images(tmp_path, "val/a/1.png", "val/b c/1.png")
    for split, separator in (("train", ".zip!"), ("val", "/")):
        by_path, by_uri = (open_split(root, split) for root in (str(tmp_path), f"file://{tmp_path}/"))
        assert has_split(f"file://{tmp_path}", split)
        assert by_uri.fingerprint == by_path.fingerprint
        assert by_uri.labels.tolist() == by_path.labels.tolist()
        for i in range(len(by_path)):
            assert by_uri.read(i) == by_path.read(i)
            assert by_uri.where(i) == f"file://{tmp_path}/{split}{separator}{by_path.name(i)}"


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", "train/a/1.png")
    monkeypatch.chdir(tmp_path)
    indices = [open_split(path, "train") for path in ("data", "./data//", "data/../data")]
    assert [index.name(0) for index in indices] == ["a/1.png"] * 3
    monkeypatch.chdir("/")  # as a worker may have it
    assert len({index.read(0) for index in indices}) == 1


def test_options_of_a_uri_stay_at_its_end() -> None:
    uri = samples._join("s3://bucket/data/?region=us-east-1&scheme=http", "val.zip")
    assert uri == "s3://bucket/data/val.zip?region=us-east-1&scheme=http"
    filesystem, path = resolve(uri)
    assert (filesystem.region, path) == ("us-east-1", "bucket/data/val.zip")
    assert samples._join("/data/what?", "val.zip") == "/data/what?/val.zip"


def test_a_file_system_is_made_once_not_for_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "train/a/1.png", "train/b/2.png")
    index, calls = open_split(str(tmp_path), "train"), []
    monkeypatch.setattr(samples, "resolve", lambda path: calls.append(path) or resolve(path))
    assert [len(index.read(i)) for i in (0, 1, 0)] == index.sizes[[0, 1, 0]].tolist()
    assert calls == [f"{tmp_path}/train"]


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/a{300}/train\.zip: cannot be read: .*File name too long"):
        open_split(f"{tmp_path}/{'a' * 300}", "train")
    write_images(tmp_path, "train/a/1.png")
    (Path(os.fsdecode(bytes(tmp_path) + b"/train/a/\xe9.png"))).write_bytes(b"not UTF-8")
    index = open_split(str(tmp_path), "train")
    assert (index.name(1), index.read(1)) == ("a/\ufffd.png", b"not UTF-8")


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(members: Sequence[Member] = MEMBERS, lines: str = MAP, stub: bytes = b"") -> str:
        write_split(tmp_path, zip_bytes(list(members), stub), lines)
        return open_split(str(tmp_path), "train").fingerprint

    (tmp_path / "elsewhere").mkdir()
    same = [
        fingerprint(),
        fingerprint(MEMBERS[::-1], stub=b"stub"),
        fingerprint([*MEMBERS, Member(b"not in the map", b"")]),
        fingerprint([replace(STORED, method=8), *MEMBERS[1:]]),
        fingerprint(lines=MAP + "cat/1.jpg\t0\n"),
        open_members(tmp_path / "elsewhere").fingerprint,
    ]
    assert len(set(same)) == 1
    assert re.fullmatch("[0-9a-f]{64}", same[0])
    others = [
        fingerprint([replace(STORED, data=b"A stored image"), *MEMBERS[1:]]),
        fingerprint([replace(STORED, name=b"cat/3.jpg"), *MEMBERS[1:]], MAP.replace("cat/1", "cat/3")),
        fingerprint(lines=MAP.replace("\t0", "\t2")),
        fingerprint(lines="".join(MAP.splitlines(True)[::-1])),
    ]
    assert len({same[0], *others}) == 5


def test_fingerprint_of_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "one/train/a/1.png", "one/train/b/1.png")
    write_images(tmp_path, "two/train/a/1.png", "two/train/b/1.png")
    one, two = (open_split(str(tmp_path / name), "train").fingerprint for name in ("one", "two"))
    assert one == two
    (tmp_path / "two/train/b/1.png").write_bytes(b"another size")
    assert open_split(str(tmp_path / "two"), "train").fingerprint != one


def test_a_server_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute long; and then it is no broken image, which could be skipped."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    index = replace(open_split(str(make_project(tmp_path).folder), "val", 7), source="s3://bucket/val.zip")
    right, answers = (
        b"image",
        [OSError("AWS Error NETWORK_CONNECTION during GetObject"), OSError("AWS SLOW_DOWN"), None],
    )

    def read(i: int) -> bytes:
        if (error := answers.pop(0)) is not None:
            raise error
        return right

    monkeypatch.setattr(type(index), "_read", lambda self, i: read(i))
    assert index.read(0) == right
    assert pauses == [0.5, 1]
    answers += [OSError("AWS Error ACCESS_DENIED during GetObject")]
    with pytest.raises(BadImageError, match="ACCESS_DENIED"):
        index.read(0)
    answers += [OSError("AWS Error NETWORK_CONNECTION")] * 8
    with pytest.raises(InputError, match="NETWORK_CONNECTION") as raised:
        index.read(0)
    assert not isinstance(raised.value, BadImageError)
    assert 60 < sum(pauses[2:]) < 70
