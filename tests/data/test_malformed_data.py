"""A table of what people have instead of clean data: each row is a one-line error that names the thing, or the right
images and labels. Everything is made here, and nothing starts a process."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import fs

from tests.data.test_tables import FOLDER, Member, parse, zip_bytes
from vitq_ray.base.config import InputError
from vitq_ray.data import copies, folders, samples
from vitq_ray.data.folders import left_out_text
from vitq_ray.data.samples import BadImageError, open_split
from vitq_ray.data.splits import make_splits
from vitq_ray.data.transforms import EvalTransform, load_rgb

Found = dict[str, int | str]  # {name of an image: its label, or what is wrong with it}


def png(shade: int = 0) -> bytes:
    return encoded("PNG", shade)


def encoded(form: str, shade: int = 0, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).convert(mode).save(stream, form)
    return stream.getvalue()


def noise(form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


NOISE = noise()


@dataclass(frozen=True)
class Case:
    """A folder, and what comes of it: an error, `<root>` for the folder, or images and what is left out."""

    make: Callable[[Path], object]
    wanted: str | Found
    left_out: str = ""
    classes: int | None = None
    order: str | None = None
    split: str = "val"


def outcome(root: Path, case: Case) -> tuple[str | Found, str]:
    """What comes of it indeed; every image is read and decoded."""
    try:
        index = open_split(str(root), case.split, case.classes, case.order)
    except InputError as error:
        return str(error).replace(str(root), "<root>"), ""
    found: Found = {}
    for i in range(len(index)):
        try:
            EvalTransform(4).decode(index.read(i), index.where(i), i)
            found[index.name(i)] = int(index.labels[i])
        except BadImageError as error:
            address, _, reason = str(error).partition(": ")
            assert address == index.where(i)
            found[index.name(i)] = reason
    assert len(found) == len(index)
    return found, left_out_text(index.left_out)


def check(root: Path, case: Case) -> None:
    found, left_out = outcome(root, case)
    assert found == case.wanted
    assert left_out == case.left_out
    assert "\n" not in str(found)
    if isinstance(found, str):
        assert len(found) < 600
        assert found.isprintable()


# Folders ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    to: str  # from the link's own folder


def tree_of(files: dict[str, bytes | Link | None]) -> Callable[[Path], None]:
    """A maker of files and links; None is a folder."""

    def make(root: Path) -> None:
        for path, content in files.items():
            target = os.path.join(os.fsencode(root), path.encode(errors="surrogateescape"))
            os.makedirs(target if content is None else os.path.dirname(target), exist_ok=True)
            if isinstance(content, Link):
                os.symlink(content.to, target)
            elif content is not None:
                with open(target, "wb") as file:
                    file.write(content)

    return make


def val(files: dict[str, bytes | Link | None]) -> Callable[[Path], None]:
    return tree_of({f"val/{path}": content for path, content in files.items()})


def hard_link(first: str, second: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        val({first: png(), f"{os.path.dirname(second)}/other.png": png(1)})(root)
        os.link(root / "val" / first, root / "val" / second)

    return make


def pipe(root: Path) -> None:
    val({"a/1.png": png()})(root)
    os.mkfifo(root / "val/a/2.png")


NO_TEXT = "1 are no images (first: 2.txt)"
ONE: dict[str, bytes | Link | None] = {"a/1.png": png()}
GONE = "cannot be read: No such file or directory"
NO_IMAGE = "not a readable image: cannot identify image file"
HIDDEN = "are hidden or of a tool"
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
NO_IMAGES = "<root>/val: no images; expected val/<class>/*.jpg or another format"
NUMBERS = {str(n): n - 1 for n in range(1, 12)}
NUMBERED = val({f"{n}/x.png": png(n) for n in range(1, 12)})

FOLDERS: dict[str, Case] = {
    "nothing at all": Case(
        lambda root: None, "<root>: has no val split; expected val.zip with val_map.txt, or a folder val"
    ),
    "val is a file": Case(
        tree_of({"val": b""}), "<root>: has no val split; expected val.zip with val_map.txt, or a folder val"
    ),
    "an empty val": Case(tree_of({"val": None}), NO_IMAGES),
    "empty class folders": Case(val({"a": None, "b": None}), NO_IMAGES),
    "an empty class folder beside another": Case(val({**ONE, "b": None}), {"a/1.png": 0}),
    "no class folders": Case(val({"1.png": png(), "3.png": png(), "2.txt": b""}), {"1.png": -1, "3.png": -1}, NO_TEXT),
    "images and nothing else": Case(
        tree_of({"1.png": png(), "2.txt": b"", "out/3.png": png()}), {"1.png": -1}, NO_TEXT
    ),
    "hidden folders beside images": Case(
        val({"1.png": png(), ".x/2.png": png()}), {"1.png": -1}, f"1 {HIDDEN} (first: .x)"
    ),
    "stray images": Case(val({**ONE, "2.png": png()}), {"a/1.png": 0}, "1 lie in no class folder (first: 2.png)"),
    "only text": Case(val({"a/1.txt": b"x"}), f"{NO_IMAGES}. Left out: 1 are no images (first: a/1.txt)"),
    "text beside images": Case(
        val({**ONE, "a/z.txt": b"x", "a/b.json": b"{}"}), {"a/1.png": 0}, "2 are no images (first: a/b.json)"
    ),
    "an empty file without a suffix": Case(val({**ONE, "a/2": b""}), {"a/1.png": 0}, "1 are no images (first: a/2)"),
    "an image without a suffix": Case(val({"a/1": png()}), {"a/1": 0}),
    "a jpeg with a strange suffix": Case(val({"a/1.jpg_large": encoded("JPEG")}), {"a/1.jpg_large": 0}),
    "jfif": Case(val({"a/1.jfif": encoded("JPEG"), "a/2.JPE": encoded("JPEG", 1)}), {"a/1.jfif": 0, "a/2.JPE": 0}),
    "pgm, pbm and pnm": Case(
        val({"a/1.pgm": encoded("PPM", 0, "L"), "a/2.pbm": encoded("PPM", 0, "1"), "a/3.pnm": encoded("PPM", 3)}),
        {"a/1.pgm": 0, "a/2.pbm": 0, "a/3.pnm": 0},
    ),
    "webp, tiff, gif, bmp without a suffix": Case(
        val({f"a/{form}": encoded(form) for form in ("BMP", "GIF", "TIFF", "WEBP")}),
        {"a/BMP": 0, "a/GIF": 0, "a/TIFF": 0, "a/WEBP": 0},
    ),
    "suffixes in capitals": Case(val({"a/1.PNG": png(), "a/2.JPEG": encoded("JPEG")}), {"a/1.PNG": 0, "a/2.JPEG": 0}),
    "a png named jpg": Case(val({"a/1.jpg": png()}), {"a/1.jpg": 0}),
    "a web page named jpg": Case(val({"a/1.jpg": b"<html>404</html>"}), {"a/1.jpg": NO_IMAGE}),
    "PostScript named jpg": Case(
        val({"a/1.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"}),
        {"a/1.jpg": NO_IMAGE},
    ),
    "PostScript named eps": Case(
        val({**ONE, "a/2.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}),
        {"a/1.png": 0},
        "1 are no images (first: a/2.eps)",
    ),
    "an empty jpg": Case(val({"a/1.jpg": b""}), {"a/1.jpg": NO_IMAGE}),
    "copies of editors, halves of downloads": Case(
        val({**ONE, "a/1.png~": png(), "a/1.png.bak": png(), "a/2.jpg.part": encoded("JPEG")[:50]}),
        {"a/1.png": 0},
        "3 are copies or parts of an image (first: a/1.png.bak)",
    ),
    "checkpoints of notebooks": Case(
        val({**ONE, "a/.ipynb_checkpoints/1-checkpoint.png": png(), ".ipynb_checkpoints/1.png": png()}),
        {"a/1.png": 0},
        f"2 {HIDDEN} (first: .ipynb_checkpoints)",
    ),
    "thumbnails of a NAS": Case(
        val({**ONE, "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.png": png(), "@eaDir/x/y.png": png()}),
        {"a/1.png": 0},
        f"2 {HIDDEN} (first: @eaDir)",
    ),
    "what a Mac leaves": Case(
        val({**ONE, "a/._1.png": b"\0\5\x16\7", ".DS_Store": b"x", "__MACOSX/a/._1.png": b"\0\5\x16\7"}),
        {"a/1.png": 0},
        f"3 {HIDDEN} (first: .DS_Store)",
    ),
    "what Windows leaves": Case(
        val({**ONE, "a/Thumbs.db": b"x", "a/desktop.ini": b"x", "$RECYCLE.BIN/a/1.png": png()}),
        {"a/1.png": 0},
        f"3 {HIDDEN} (first: $RECYCLE.BIN)",
    ),
    "a hidden image": Case(val({**ONE, "a/.2.png": png()}), {"a/1.png": 0}, f"1 {HIDDEN} (first: a/.2.png)"),
    "folders in class folders": Case(
        val({"a/x/1.png": png(), "a/y/z/2.png": png(1)}), {"a/x/1.png": 0, "a/y/z/2.png": 0}
    ),
    "a folder named as an image": Case(val({"a/1.png/2.png": png()}), {"a/1.png/2.png": 0}),
    "a link to nothing": Case(val({**ONE, "a/2.png": Link("gone.png")}), {"a/1.png": 0, "a/2.png": GONE}),
    "a link in a circle": Case(
        val({**ONE, "a/2.png": Link("2.png")}),
        {"a/1.png": 0, "a/2.png": "cannot be read: Too many levels of symbolic links"},
    ),
    "a link to nothing without a suffix": Case(
        val({**ONE, "a/2": Link("gone")}), {"a/1.png": 0}, "1 are links to nothing (first: a/2)"
    ),
    "a class that is a link to nothing": Case(
        val({**ONE, "b": Link("gone")}), "<root>/val/b: is a link to nothing; expected a class folder"
    ),
    "a class of train that is a link to nothing": Case(
        tree_of({"train/a/1.png": png(), "train/b": Link("gone"), "val/a/1.png": png()}),
        "<root>/train/b: is a link to nothing; expected a class folder",
    ),
    "links to files elsewhere": Case(
        tree_of({"store/1.png": png(), "val/a/1.png": Link("../../store/1.png"), "val/b/2.png": png(1)}),
        {"a/1.png": 0, "b/2.png": 1},
    ),
    "a class that is a link": Case(
        tree_of({"store/1.png": png(), "val/a": Link("../store"), "val/b/2.png": png(1)}), {"a/1.png": 0, "b/2.png": 1}
    ),
    "a link to the folder itself": Case(
        val({**ONE, "a/loop": Link(".")}), {"a/1.png": 0}, "1 are links to a folder above them (first: a/loop)"
    ),
    "a link to the folder above": Case(
        val({**ONE, "a/up": Link("..")}), {"a/1.png": 0}, "1 are links to a folder above them (first: a/up)"
    ),
    "a file linked twice in its class": Case(
        val({**ONE, "a/2.png": Link("1.png"), "a/3.png": Link("1.png")}),
        {"a/1.png": 0},
        "2 are another name of an image (first: a/2.png)",
    ),
    "a file linked into two classes": Case(
        val({**ONE, "b/2.png": Link("../a/1.png")}),
        "<root>/val/b/2.png: is the same file as a/1.png; expected one class for each image",
    ),
    "a class linked to another": Case(
        val({**ONE, "b": Link("a")}),
        "<root>/val/b/1.png: is the same file as a/1.png; expected one class for each image",
    ),
    "a hard link in its class": Case(
        hard_link("a/1.png", "a/2.png"),
        {"a/1.png": 0, "a/other.png": 0},
        "1 are another name of an image (first: a/2.png)",
    ),
    "a hard link into another class": Case(
        hard_link("a/1.png", "b/2.png"),
        "<root>/val/b/2.png: is the same file as a/1.png; expected one class for each image",
    ),
    "a copy under another name is an image": Case(val({**ONE, "a/2.png": png()}), {"a/1.png": 0, "a/2.png": 0}),
    "a pipe named as an image": Case(pipe, {"a/1.png": 0}, "1 are no regular files (first: a/2.png)"),
    "a name that is not UTF-8": Case(val({"a/\udce9.png": png()}), {"a/\ufffd.png": 0}),
    "a class that is not UTF-8": Case(
        val({"a/1.png": png(), "\udce9/1.png": png(1)}), {"a/1.png": 0, "\ufffd/1.png": 1}
    ),
    "a name with a line feed": Case(val({"a/1\n2.png": png()}), {"a/1\n2.png": 0}),
    "accents apart in val, composed in train": Case(
        tree_of({"train/b/1.png": png(), f"train/{NFC}/1.png": png(), f"val/{NFD}/1.png": png()}), {f"{NFD}/1.png": 1}
    ),
    "accents composed in val, apart in train": Case(
        tree_of({"train/b/1.png": png(), f"train/{NFD}/1.png": png(), f"val/{NFC}/1.png": png()}), {f"{NFC}/1.png": 1}
    ),
    "two classes that look alike": Case(
        val({f"{NFC}/1.png": png(), f"{NFD}/1.png": png()}),
        f"<root>/val/{NFC}: there are two class folders of this name, spelled alike",
    ),
    "numbered folders": Case(
        NUMBERED,
        "<root>/val: class folders are named by numbers, whose order as text (1, 10, 11, …) is not their own "
        "(1, 2, 3, …); expected --class-order number, or --class-order name if the model was trained so",
    ),
    "numbered folders, by number": Case(
        NUMBERED, {f"{n}/x.png": label for n, label in NUMBERS.items()}, order="number"
    ),
    "numbered folders, by name": Case(
        NUMBERED, {f"{n}/x.png": label for label, n in enumerate(sorted(NUMBERS))}, order="name"
    ),
    "numbers whose order is plain": Case(val({f"{n}/x.png": png(n) for n in (3, 7)}), {"3/x.png": 0, "7/x.png": 1}),
    "numbers with zeros before them": Case(
        val({f"{n:02}/x.png": png(n) for n in (2, 10)}), {"02/x.png": 0, "10/x.png": 1}
    ),
    "by number, of names": Case(
        val(ONE), "<root>/val/a: is not named by a number; expected class order name", order="number"
    ),
    "a class that train lacks": Case(
        tree_of({"train/a/1.png": png(), "val/b/1.png": png()}),
        "<root>/val/b/1.png: its class is not among the 1 folders of <root>/train",
    ),
    "fewer classes than the model": Case(
        val(ONE),
        "<root>: 1 class folders, but the model has 3 classes; folders are numbered by name, so there must be one for "
        "each",
        classes=3,
    ),
    "a truncated image": Case(
        val({"a/1.png": NOISE[:300]}), {"a/1.png": "not a readable image: image file is truncated"}
    ),
}


@pytest.mark.parametrize("case", FOLDERS.values(), ids=FOLDERS)
def test_folders(case: Case, tmp_path: Path) -> None:
    case.make(tmp_path)
    check(tmp_path, case)


# Zips and maps ------------------------------------------------------------------------------------------------------

CAT, DOG = Member(b"a/1.png", png()), Member(b"b/2.png", png(1), zipfile.ZIP_DEFLATED)
MAP = b"a/1.png\t0\nb/2.png\t1\n"
BOTH: Found = {"a/1.png": 0, "b/2.png": 1}
WHOLE = zip_bytes([CAT, DOG])
FORM = "expected relative/path<TAB>label, a label from 0 to"


def packed(archive: bytes, lines: bytes = MAP) -> Callable[[Path], None]:
    return tree_of({"val.zip": archive, "val_map.txt": lines})


def zipped(members: list[Member], lines: bytes = MAP, **more: int) -> Callable[[Path], None]:
    return packed(zip_bytes(members, **more), lines)


def renamed(name: str, encoding: str = "utf-8", flags: int = 0) -> Callable[[Path], None]:
    """The second image under a name with an accent, which the map has composed."""
    return zipped([CAT, replace(DOG, name=name.encode(encoding), flags=flags)], f"{NFC}/2.png\t1\n".encode())


def in_map(line: bytes) -> Callable[[Path], None]:
    return packed(WHOLE, MAP + line)


def mapped(lines: bytes) -> Callable[[Path], None]:
    return packed(WHOLE, lines)


def bad_label(text: str, line: int = 3) -> str:
    problem = f"the label is not a non-negative integer in {text!r}"
    return f"<root>/val_map.txt: line {line}: {problem}; {FORM} 2147483647"


MAC = [replace(FOLDER, name=b"top/"), *(replace(m, name=b"top/" + m.name) for m in (CAT, DOG))]
RESOURCE = Member(b"__MACOSX/top/a/._1.png", b"\0\5\x16\7")
NOT_THERE = "is not in <root>/val.zip (2 members); expected the path of a member"
NO_ZIP = "<root>/val.zip: not a zip, or truncated: no end-of-directory record in its last bytes"
NO_LINES = "<root>/val_map.txt: lists no image; expected lines of relative/path<TAB>label"
NULS = (
    "<root>/val_map.txt: has NUL bytes, as UTF-16 and binary files have; expected UTF-8, lines of "
    "relative/path<TAB>label"
)

ZIPS: dict[str, Case] = {
    "a plain zip": Case(packed(WHOLE), BOTH),
    "an empty file": Case(packed(b""), NO_ZIP),
    "a web page": Case(packed(b"<html>404 Not Found</html>"), NO_ZIP),
    "a tar": Case(packed(b"a/1.png".ljust(512, b"\0") + bytes(1024)), NO_ZIP),
    "a zip cut at its end": Case(packed(WHOLE[:-1]), NO_ZIP),
    "a zip cut at its beginning": Case(
        packed(WHOLE[100:]), "<root>/val.zip: truncated or corrupt: its directory would begin 100 bytes before the file"
    ),
    "bytes behind the end": Case(packed(WHOLE + b"\n"), NO_ZIP),
    "an empty zip": Case(zipped([]), f"<root>/val_map.txt: line 1: 'a/1.png' {NOT_THERE}".replace("(2 ", "(0 ")),
    "no map": Case(tree_of({"val.zip": WHOLE}), dict.fromkeys(BOTH, -1)),
    "no map, and what is no image": Case(
        tree_of({"val.zip": zip_bytes([RESOURCE, DOG, Member(b"a/x.txt", b""), CAT])}),
        dict.fromkeys(BOTH, -1),
        "1 are hidden or of a tool (first: __MACOSX/top/a/._1.png); 1 are no images (first: a/x.txt)",
    ),
    "no map and no image": Case(
        tree_of({"val.zip": zip_bytes([Member(b"x.txt", b"")])}),
        "<root>/val.zip: no images. Left out: 1 are no images (first: x.txt)",
    ),
    "no map, encrypted": Case(
        tree_of({"val.zip": zip_bytes([replace(DOG, flags=1)])}),
        "<root>/val.zip!b/2.png: is encrypted; expected a stored (0) or deflated (8) member",
    ),
    "a map that is a folder": Case(
        tree_of({"val.zip": WHOLE, "val_map.txt": None}),
        "<root>/val_map.txt: is a folder; expected lines of relative/path<TAB>label",
    ),
    "a zip that is a link to nothing": Case(
        tree_of({"val.zip": Link("gone.zip"), "val_map.txt": MAP}),
        "<root>: has no val split; expected val.zip with val_map.txt, or a folder val",
    ),
    "a folder beside the zip": Case(
        tree_of({"val.zip": WHOLE, "val_map.txt": MAP, "val/a/3.png": png()}),
        BOTH,
        "1 are folders beside the zip that is read (first: val)",
    ),
    "several disks": Case(zipped([CAT, DOG], disk=1), "<root>/val.zip: is part of a multi-disk zip; expected one file"),
    "a count too high": Case(
        zipped([CAT, DOG], count=3),
        "<root>/val.zip: corrupt directory: 3 members do not fit into its 106 bytes",
    ),
    "a count too low": Case(
        zipped([CAT, DOG], count=1), "<root>/val.zip: corrupt directory: its 1 members take 53 of its 106 bytes"
    ),
    "an absurd count": Case(
        zipped([CAT, DOG], count=60000),
        "<root>/val.zip: corrupt directory: 60000 members do not fit into its 106 bytes",
    ),
    "an encrypted member": Case(
        zipped([CAT, replace(DOG, flags=1)]),
        "<root>/val.zip!b/2.png: is encrypted; expected a stored (0) or deflated (8) member",
    ),
    "lzma": Case(
        zipped([CAT, replace(DOG, method=14)]),
        "<root>/val.zip!b/2.png: has compression method 14; expected a stored (0) or deflated (8) member",
    ),
    "a wrong checksum": Case(
        zipped([replace(CAT, crc=1), DOG]),
        {**BOTH, "a/1.png": "corrupt: size or checksum is not that of the zip's directory"},
    ),
    "a deflate bomb": Case(
        zipped([CAT, Member(b"b/2.png", bytes(100_000), 8, size=90)]),
        {**BOTH, "b/2.png": "corrupt: inflates to more than the 90 bytes of the directory"},
    ),
    "more than deflate can pack": Case(
        zipped([CAT, replace(DOG, size=10**8)]),
        f"<root>/val.zip: corrupt directory: 'b/2.png' would be 100000000 bytes, packed in {len(DOG.packed())} from "
        f"byte {len(CAT.local())} on; expected them before byte {len(CAT.local() + DOG.local())}",
    ),
    "a member that is no image": Case(zipped([CAT, replace(DOG, data=b"text")]), {**BOTH, "b/2.png": NO_IMAGE}),
    "an empty member": Case(zipped([CAT, Member(b"b/2.png", b"")]), {**BOTH, "b/2.png": NO_IMAGE}),
    "a folder instead of an image": Case(
        zipped([CAT, replace(DOG, name=b"b/2.png/")]),
        "<root>/val_map.txt: line 2: 'b/2.png' is not in <root>/val.zip (1 members); expected the path of a member",
    ),
    "two members of one name: the last": Case(zipped([replace(CAT, data=b"old"), CAT, DOG]), BOTH),
    "one extra top folder": Case(zipped(MAC), BOTH),
    "a Mac's zip": Case(zipped([*MAC, Member(b"top/.DS_Store", b"x"), RESOURCE]), BOTH),
    "a Mac's zip, .DS_Store beside": Case(zipped([Member(b".DS_Store", b"x"), RESOURCE, *MAC]), BOTH),
    "a Mac's files in the map": Case(
        zipped([*MAC, RESOURCE], MAP + b"__MACOSX/top/a/._1.png\t0\na/._1.png\t0\n"),
        BOTH,
        "2 were left by a Mac (first: __MACOSX/top/a/._1.png)",
    ),
    "nothing but a Mac's files": Case(zipped([RESOURCE], b"__MACOSX/top/a/._1.png\t0\n"), NO_LINES),
    "accents apart, marked as UTF-8": Case(renamed(f"{NFD}/2.png", flags=0x800), {f"{NFC}/2.png": 1}),
    "accents apart, not marked": Case(renamed(f"{NFD}/2.png"), {f"{NFC}/2.png": 1}),
    "accents composed": Case(renamed(f"{NFC}/2.png", flags=0x800), {f"{NFC}/2.png": 1}),
    "accents in code page 437": Case(renamed(f"{NFC}/2.png", "cp437"), {f"{NFC}/2.png": 1}),
    "accents in Latin-1": Case(
        renamed(f"{NFC}/2.png", "latin-1"), f"<root>/val_map.txt: line 1: '{NFC}/2.png' {NOT_THERE}"
    ),
    "a class order, of a map": Case(
        packed(WHOLE), "class order: name given, but <root> has maps, which say labels", order="name"
    ),
    "UTF-8 with a byte order mark": Case(mapped(b"\xef\xbb\xbf" + MAP), BOTH),
    "UTF-16 of Windows": Case(mapped(b"\xff\xfe" + MAP.replace(b"\n", b"\r\n").decode().encode("utf-16-le")), BOTH),
    "UTF-16, big end first": Case(mapped(b"\xfe\xff" + MAP.decode().encode("utf-16-be")), BOTH),
    "UTF-16 without a mark": Case(mapped(MAP.decode().encode("utf-16-le")), NULS),
    "half a UTF-16": Case(
        mapped(b"\xff\xfea"),
        "<root>/val_map.txt: begins as UTF-16 and is not; expected UTF-8, lines of relative/path<TAB>label",
    ),
    "UTF-32": Case(mapped(b"\xff\xfe\0\0" + MAP.decode().encode("utf-32-le")), NULS),
    "the zip as its map": Case(mapped(WHOLE), NULS),
    "line ends of Windows": Case(mapped(MAP.replace(b"\n", b"\r\n")), BOTH),
    "line ends of old Macs": Case(
        mapped(MAP.replace(b"\n", b"\r")), rf"<root>/val_map.txt: line 1: 'a/1.png\t0\rb/2.png' {NOT_THERE}"
    ),
    "no last line feed": Case(mapped(MAP.rstrip()), BOTH),
    "blank lines": Case(mapped(b"\n\t\n" + MAP.replace(b"\n", b"\n\r\n")), BOTH),
    "an empty map": Case(mapped(b""), NO_LINES),
    "a header": Case(mapped(b"path\tlabel\n" + MAP), bad_label("path\tlabel", 1)),
    "commas": Case(mapped(b"a/1.png,0\n"), f"<root>/val_map.txt: line 1: no tab in 'a/1.png,0'; {FORM} 2147483647"),
    "spaces": Case(mapped(b"a/1.png 0\n"), f"<root>/val_map.txt: line 1: no tab in 'a/1.png 0'; {FORM} 2147483647"),
    "a negative label": Case(in_map(b"a/1.png\t-1\n"), bad_label("a/1.png\t-1")),
    "a label with a point": Case(in_map(b"a/1.png\t1.0\n"), bad_label("a/1.png\t1.0")),
    "a label in words": Case(in_map(b"a/1.png\tcat\n"), bad_label("a/1.png\tcat")),
    "a label in Arabic digits": Case(in_map("a/1.png\t\u0663\n".encode()), bad_label("a/1.png\t\u0663")),
    "no label": Case(in_map(b"a/1.png\t\n"), bad_label("a/1.png\t")),
    "no path": Case(in_map(b"\t1\n"), bad_label("\t1")),
    "a label beyond 64 bits": Case(
        in_map(b"a/1.png\t99999999999999999999\n"),
        f"<root>/val_map.txt: line 3: label out of range in 'a/1.png\\t99999999999999999999'; {FORM} 2147483647",
    ),
    "a label beyond the model": Case(
        packed(WHOLE), f"<root>/val_map.txt: line 2: label out of range in 'b/2.png\\t1'; {FORM} 0", classes=1
    ),
    "a line of a million letters": Case(
        in_map(b"a" * 10**6 + b"\n"),
        f"<root>/val_map.txt: line 3: no tab in '{'a' * 200}…'; {FORM} 2147483647",
    ),
    "an image that the zip lacks": Case(in_map(b"c/3.png\t1\n"), f"<root>/val_map.txt: line 3: 'c/3.png' {NOT_THERE}"),
    "other capitals": Case(mapped(b"A/1.PNG\t0\n"), f"<root>/val_map.txt: line 1: 'A/1.PNG' {NOT_THERE}"),
    "backslashes": Case(mapped(b"a\\1.png\t0\n"), f"<root>/val_map.txt: line 1: 'a\\\\1.png' {NOT_THERE}"),
    "a map listed twice": Case(mapped(2 * MAP), BOTH, "2 were listed before (first: a/1.png)"),
    "an image with two labels": Case(
        in_map(b"a/1.png\t1\n"),
        "<root>/val_map.txt: line 3: 'a/1.png' has label 1, but 0 in line 1; expected one label for each image",
    ),
    "an image with two labels and two names": Case(
        zipped(MAC, b"top/a/1.png\t0\na/1.png\t1\n"),
        "<root>/val_map.txt: line 2: 'a/1.png' has label 1, but 0 in line 1; expected one label for each image",
    ),
    "the same bytes in two members": Case(zipped([CAT, replace(DOG, data=CAT.data)]), BOTH),
}


@pytest.mark.parametrize("case", ZIPS.values(), ids=ZIPS)
def test_zips_and_maps(case: Case, tmp_path: Path) -> None:
    case.make(tmp_path)
    check(tmp_path, case)


def many(count: int, said: int, zip64: bool = False) -> bytes:
    """A zip that lists one member `count` times, and says that they are `said`."""
    member = Member(b"x", b"")
    return zip_bytes([member], zip64=zip64, count=said, directory=member.central(0) * count)


@pytest.mark.parametrize(("said", "message"), [(2, None), (3, "its 3 members take"), (1, "its 1 members take")])
def test_a_count_of_16_bits_that_wrapped(said: int, message: str | None) -> None:
    """More than 65,535 members, by a writer that knows no zip64: what is left of the count must agree."""
    archive = many(2**16 + 2, said)
    if message is None:
        assert len(parse(archive)[0]) == 2**16 + 2
    else:
        with pytest.raises(InputError, match=rf"^a\.zip: corrupt directory: {message} "):
            parse(archive)


def test_a_count_of_zip64_does_not_wrap() -> None:
    with pytest.raises(InputError, match=r"^a\.zip: corrupt directory: its 2 members take "):
        parse(many(2**16 + 2, said=2, zip64=True))


pieces = st.lists(
    st.sampled_from(
        [b"a/1.png", b"b/2.png", b"\t", b"\n", b"\r\n", b" ", b"0", b"1", b"-", b"\0", b"\xff\xfe", b"\xef\xbb\xbf"]
    )
    | st.binary(max_size=3),
    max_size=12,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pieces)
def test_any_map(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    """A line for the user, or each image once with the label that a line of the map has."""
    root, text = tmp_path_factory.getbasetemp() / "any-map", b"".join(parts)
    root.mkdir(exist_ok=True)
    (root / "val.zip").write_bytes(WHOLE)
    (root / "val_map.txt").write_bytes(text)
    found, _ = outcome(root, Case(packed, {}))
    if isinstance(found, str):
        assert found.startswith("<root>/val_map.txt: ")
        assert found.isprintable()
    else:
        assert found
        readable = text.decode("utf-16") if text.startswith(b"\xff\xfe") else text.decode(errors="replace")
        rows = [line.strip(" \r").rpartition("\t") for line in readable.removeprefix("\ufeff").split("\n")]
        assert found == {name: int(label) for name, _, label in rows if name in BOTH}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_to_a_directory(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes changed, cut out and put in behind the members: refused, or every image is as it was or named as broken."""
    root, damaged = tmp_path_factory.getbasetemp() / "any-zip", bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(len(CAT.local() + DOG.local()), len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    root.mkdir(exist_ok=True)
    (root / "val.zip").write_bytes(damaged)
    (root / "val_map.txt").write_bytes(MAP)
    found, _ = outcome(root, Case(packed, {}))
    if isinstance(found, str):
        assert found.startswith("<root>/val")
        assert found.isprintable()
    else:
        assert {name: found[name] for name in found if found[name] not in (0, 1)}.keys() <= BOTH.keys()
        assert all(isinstance(label, str) or label == BOTH[name] for name, label in found.items())


# Images -------------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int, data: bytes) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + data, b"IEND")
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = noise("JPEG")
RED = (200, 0, 0)
IMAGES: dict[str, tuple[bytes, str | tuple[int, int, int]]] = {
    "nothing": (b"", "cannot identify image file"),
    "one byte": (b"\xff", "cannot identify image file"),
    "zeros": (bytes(500), "cannot identify image file"),
    "a web page": (b"<!DOCTYPE html><html></html>", "cannot identify image file"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg' width='4' height='4'/>", "cannot identify image file"),
    "PDF": (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "cannot identify image file"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", "cannot identify image file"),
    "Photoshop": (b"8BPS\0\1" + bytes(40), "cannot identify image file"),
    "an icon": (b"\0\0\1\0\1\0" + bytes(40), "cannot identify image file"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(30), "cannot identify image file"),
    "NumPy": (b"\x93NUMPY\1\0" + bytes(60), "cannot identify image file"),
    "a zip": (WHOLE, "cannot identify image file"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "runcated"),
    "a JPEG's head": (JPEG[:20], "cannot identify image file"),
    "half a PNG": (NOISE[: len(NOISE) // 2], "image file is truncated"),
    "garbage in a PNG": (png_of(4, 4, b"garbage"), "broken"),
    "too few pixels in a PNG": (png_of(400, 400, zlib.compress(bytes(10))), "image file is truncated"),
    "a bomb": (png_of(20_000, 20_000, b""), "400000000 pixels"),
    "no pixels": (png_of(0, 4, zlib.compress(b"")), ""),
    "GIF cut": (encoded("GIF")[:20], ""),
    "BMP cut": (encoded("BMP")[:60], "image file is truncated"),
    "WEBP cut": (encoded("WEBP")[:20], ""),
    "TIFF cut": (encoded("TIFF")[:20], ""),
    "floating-point pixels": (encoded("TIFF", 200, "F"), "floating-point pixels"),
    "JPEG": (encoded("JPEG", 200), RED),
    "PNG": (encoded("PNG", 200), RED),
    "WEBP": (encoded("WEBP", 200), RED),
    "TIFF": (encoded("TIFF", 200), RED),
    "BMP": (encoded("BMP", 200), RED),
    "PPM": (encoded("PPM", 200), RED),
    "JPEG2000": (encoded("JPEG2000", 200), RED),
    "CMYK": (encoded("JPEG", 200, "CMYK"), RED),
    "palette": (encoded("PNG", 200, "P"), RED),
    "transparent": (encoded("PNG", 200, "RGBA"), RED),
    "a JPEG with bytes behind it": (encoded("JPEG", 200) + b"trailing", RED),
}


@pytest.mark.parametrize(("data", "wanted"), IMAGES.values(), ids=IMAGES)
def test_images(data: bytes, wanted: str | tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing starts a program (Pillow runs Ghostscript for PostScript); colours are right within JPEG's loss."""
    monkeypatch.setattr("subprocess.Popen", lambda *command, **options: pytest.fail(f"started {command}"))
    if isinstance(wanted, str):
        with pytest.raises(BadImageError, match=rf"^here: not a readable image: .*{wanted}") as caught:
            EvalTransform(4).decode(data, "here")
        assert "\n" not in str(caught.value)
    else:
        pixels = np.asarray(load_rgb(data), np.int64)
        assert pixels.shape == (4, 4, 3)
        assert np.abs(pixels - np.array(wanted)).max() <= 25


# Copies and splits --------------------------------------------------------------------------------------------------


def write_zip(root: Path, split: str, contents: list[bytes], names: list[str] | None = None) -> None:
    names = names or [f"{i}.png" for i in range(len(contents))]
    members = [Member(name.encode(), data) for name, data in zip(names, contents, strict=True)]
    lines = "".join(f"{name}\t{i % 2}\n" for i, name in enumerate(names))
    tree_of({f"{split}.zip": zip_bytes(members), f"{split}_map.txt": lines.encode()})(root)


def write_folder(root: Path, split: str, contents: list[bytes]) -> None:
    tree_of({f"{split}/{i % 2}/{i:02}.png": data for i, data in enumerate(contents)})(root)


WRITERS = {"zip": write_zip, "folder": write_folder}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_first_copies(write: Callable[[Path, str, list[bytes]], None], tmp_path: Path) -> None:
    contents = [b"one", b"two", b"one", b"one", b"three", b"two"]  # one and two: of one size
    write(tmp_path, "val", contents)
    index = open_split(str(tmp_path), "val")
    found = [index.read(int(i)) for i in copies.first_copies(index)]
    assert found == [index.read(i) for i in range(len(contents))]
    assert len(set(copies.first_copies(index).tolist())) == 3


def test_images_that_cannot_be_read_are_no_copies(tmp_path: Path) -> None:
    val({f"a/{i}.png": Link("gone") for i in range(3)})(tmp_path)
    assert copies.first_copies(open_split(str(tmp_path), "val")).tolist() == [0, 1, 2]


def test_of_too_many_files_none_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, "val", [b"one", b"two", b"one"])
    monkeypatch.setattr(copies, "MOST_READ", 2)
    assert copies.first_copies(open_split(str(tmp_path), "val")).tolist() == [0, 1, 2]


@pytest.mark.parametrize("calib_split", ["train", "val"])
@pytest.mark.parametrize("write_val", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("write_train", WRITERS.values(), ids=WRITERS)
def test_splits_are_disjoint_by_content(
    write_train: Callable[..., None], write_val: Callable[..., None], calib_split: str, tmp_path: Path
) -> None:
    contents = [png(i) for i in range(20)]
    write_train(tmp_path, "train", [png(100 + i) for i in range(6)] + contents[10:])  # ten are in val too
    write_val(tmp_path, "val", contents + contents[::-1] + contents[5:9])
    calib, v = (open_split(str(tmp_path), split) for split in (calib_split, "val"))
    for seed in range(5):
        splits = make_splits(calib_split, calib, v, seed, 4)
        parts = [[calib.read(i) for i in splits.calibration]]
        parts += [[v.read(i) for i in ids] for ids in (splits.selection, splits.report)]
        assert len(parts[0]) == 4
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not set(parts[a]) & set(parts[b])
        if calib_split == "train":
            assert len(parts[1]) + len(parts[2]) == len(v)
        assert abs(len(set(parts[1])) - len(set(parts[2]))) <= 2  # one for each class


def test_a_train_that_is_val(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_zip(tmp_path, split, [png(i) for i in range(9)])
    calib, v = (open_split(str(tmp_path), split) for split in ("train", "val"))
    with pytest.raises(InputError, match=r"needs 2 images .*; of the 9 images of train, all but 0 are in val too$"):
        make_splits("train", calib, v, 0, 2)


def test_one_image_many_times_cannot_be_halved(tmp_path: Path) -> None:
    write_zip(tmp_path, "val", [png()] * 8)
    index = open_split(str(tmp_path), "val")
    with pytest.raises(InputError, match=r"^val: 1 images cannot be halved into selection and report$"):
        make_splits("val", index, index, 0)


# Places -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/data", r"^~nosuchuser/data: .*home directory.*; expected a folder$"),
        ("/data/\udce9", "^/data/\ufffd: 'utf-8' codec can't encode .*; expected a folder$"),
        (f"/{'a' * 300}", "^/a{300}/val.zip: cannot be read: .*File name too long"),
        ("nosuch://bucket/data", "^nosuch://bucket/data/val.zip: not a readable URI: "),
        ("", "^: has no val split; expected val.zip with val_map.txt, or a folder val$"),
    ],
)
def test_places_of_data(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        open_split(path, "val")
    assert str(caught.value).isprintable()


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val(ONE)(tmp_path)

    def refuse(path: bytes) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match=r"/val: cannot be listed: \[Errno 13\] Permission denied"):
        open_split(str(tmp_path), "val")


AFAR = [name for name in FOLDERS if "link" not in name and "pipe" not in name and "UTF-8" not in name]


@pytest.mark.parametrize("name", AFAR)
def test_folders_afar_are_read_as_those_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a file system that is not local, as S3."""
    FOLDERS[name].make(tmp_path)
    afar = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
    for module in (samples, folders):
        monkeypatch.setattr(module, "resolve", lambda path: (afar, path))
    check(tmp_path, FOLDERS[name])
