"""Which files of a split's folder are images, and what else lies there. Nothing is decoded.

An image is a file of a class folder whose name ends as names of images do, or whose first bytes are those of an image.
Where there are no class folders, it is a file of the split's folder. Whether it can be decoded shows when it is read.
Everything else is left out, counted and named: hidden files, folders of tools, copies that editors keep, files that
are no images, files outside of class folders, and what a link shows a second time.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from pyarrow import fs

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line, resolve

_IMAGE_NAME = re.compile(r".*\.(jpe?g|jpe|jfif|a?png|bmp|dib|webp|avif|gif|tiff?|p[pgbn]m|jp2|j2k)", re.I | re.S)
_FIRST_BYTES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|P[1-6][\s#]|\0\0\0\x0cjP  |\xff\x4f\xff\x51"
    rb"|....ftypavi[fs]|BM............[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    re.DOTALL,
)
CLASS_ORDERS = ("name", "number")
_HEAD = 32  # bytes that are looked at
_OF_TOOLS = re.compile(
    r"__macosx|@eadir|@tmp|#recycle|#snapshot|\$recycle\.bin|system volume information|lost\+found|thumbs\.db"
    r"|desktop\.ini",
    re.I,
)
_FILE, _FOLDER, _GONE, _LOOP, _OTHER = "file", "folder", "gone", "loop", "other"
# Path below the folder, kind, bytes, place: the same for all names of one file, 0 where that is unknown.
Entry = tuple[str, str, int, int]


@dataclass(frozen=True)
class LeftOut:
    """What of a split is no image of it: how many, why, and the first by name."""

    reason: str
    count: int
    first: str


def left_out(names: Iterable[tuple[str, str]]) -> tuple[LeftOut, ...]:
    """Counted by reason, from (name, reason)."""
    found: dict[str, tuple[int, str]] = {}
    for name, reason in names:
        count, first = found.get(reason, (0, name))
        found[reason] = count + 1, min(first, name)
    return tuple(LeftOut(reason, count, printable(first)) for reason, (count, first) in sorted(found.items()))


def left_out_text(rows: Iterable[LeftOut]) -> str:
    """E.g. `20 are hidden or of a tool (first: a/.cache)`."""
    return "; ".join(f"{row.count} {row.reason} (first: {row.first})" for row in rows)


def printable(name: str) -> str:
    """A name that can be printed: bytes that are not UTF-8 as a replacement character."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def class_numbers(folder: str, order: str | None) -> dict[str, int]:
    """{name of a class folder, composed (NFC): its number}. `order` is one of `CLASS_ORDERS`.

    Raises InputError where names are numbers whose order is not that of text and no order is given: `1, 2, …, 10` of a
    data set is one, `1, 10, 2, …` of torchvision's `ImageFolder` another.
    """
    names = sorted(path for path, kind, _, _ in _entries(folder, recursive=False) if kind == _FOLDER)
    are_numbers = all(name.isascii() and name.isdigit() for name in names)
    if order == "number" and not are_numbers:
        other = next(name for name in names if not (name.isascii() and name.isdigit()))
        raise InputError(f"{folder}/{printable(other)}: is not named by a number; expected class order name")
    by_number = sorted(names, key=int) if are_numbers else names
    if order is None and by_number != names:
        text, value = (", ".join((*some[:3], "…")) for some in (names, by_number))
        raise InputError(
            f"{folder}: class folders are named by numbers, whose order as text ({text}) is not their own ({value}); "
            "expected --class-order number, or --class-order name if the model was trained so"
        )
    numbers = {}
    for number, name in enumerate(by_number if order == "number" else names):
        if composed(name) in numbers:
            raise InputError(f"{folder}/{printable(name)}: there are two class folders of this name, spelled alike")
        numbers[composed(name)] = number
    return numbers


def composed(name: str) -> str:
    """Letters and their accents as one character (NFC): a Mac writes them as two."""
    return unicodedata.normalize("NFC", name)


def has_class_folders(folder: str) -> bool:
    """Whether anything but files lies there; hidden folders and those of tools do not count."""
    return any(kind == _FOLDER for _, kind, _, _ in _entries(folder, recursive=False))


def images_in(folder: str) -> tuple[list[tuple[str, int]], tuple[LeftOut, ...]]:
    """(name, bytes) of every image right in a folder, sorted by name; what is left out. Folders are not looked into."""
    images, out = [], []
    for entry in _entries(folder, recursive=False):
        reason = _problem(folder, entry, in_class=False)
        if reason is None:
            images.append(entry)
        elif reason:
            out.append((entry[0], reason))
    return _once(folder, sorted(images), out)


def image_files(folder: str) -> tuple[list[tuple[str, int]], tuple[LeftOut, ...]]:
    """(path below the split, bytes) of every image in a class folder, sorted by class, then by path; what is left out.

    A link to nothing with the name of an image is one that cannot be read.
    """
    images, out = [], []
    for entry in _entries(folder, recursive=True):
        reason = _problem(folder, entry)
        if reason is None:
            images.append(entry)
        elif reason:
            out.append((entry[0], reason))
    images.sort(key=lambda entry: (entry[0].split("/", 1)[0], entry[0]))
    return _once(folder, images, out)


def _once(
    folder: str, images: list[Entry], out: list[tuple[str, str]]
) -> tuple[list[tuple[str, int]], tuple[LeftOut, ...]]:
    """(path, bytes) of the images, each under its first name only; what is left out, with what was already."""
    again = _seen_before(folder, images)
    out = out + [(images[i][0], "are another name of an image") for i in again]
    kept = [(path, size) for i, (path, _, size, _) in enumerate(images) if i not in again]
    return kept, left_out(out)


def _problem(folder: str, entry: Entry, in_class: bool = True) -> str | None:
    """Why an entry is no image, in words behind "files that"; "" for folders, None for an image."""
    path, kind, _, _ = entry
    name = path.rpartition("/")[2]
    if kind == _FOLDER:
        return ""
    if _is_hidden(path):
        return "are hidden or of a tool"
    if kind == _LOOP:
        return "are links to a folder above them"
    if kind == _OTHER:
        return "are no regular files"
    if in_class and "/" not in path:
        return "lie in no class folder"
    if is_image_name(name):
        return None
    if is_image_name(os.path.splitext(name)[0]) or name.endswith("~"):
        return "are copies or parts of an image"
    if kind == _GONE:
        return "are links to nothing"
    return None if _FIRST_BYTES.match(_head(folder, path)) else "are no images"


def is_image_name(name: str) -> bool:
    """Whether a name ends as names of images do."""
    return _IMAGE_NAME.fullmatch(name) is not None


def _is_hidden(path: str) -> bool:
    """Hidden, or of a tool: .ipynb_checkpoints, __MACOSX and the like would be classes, or images counted twice."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or ("/" not in path and name.startswith("__")) or bool(_OF_TOOLS.fullmatch(name))


def _seen_before(folder: str, images: list[Entry]) -> set[int]:
    """Which of them are further names of a file before them: linked to, or reached by another way.

    Raises InputError where the two are of different classes.
    """
    places = np.array([place for _, _, _, place in images], np.uint64)
    order = np.argsort(places, kind="stable")
    same = np.flatnonzero((np.diff(places[order]) == 0) & (places[order][1:] != 0)) + 1
    again = set()
    for at in same.tolist():
        first, second = images[order[at - 1]], images[order[at]]
        if _class_of(first[0]) != _class_of(second[0]):
            names = [printable(name) for name, *_ in (second, first)]
            raise InputError(f"{folder}/{names[0]}: is the same file as {names[1]}; expected one class for each image")
        again.add(int(order[at]))
    return again


def _class_of(path: str) -> str:
    return path.rpartition("/")[0].partition("/")[0]


# Listing ------------------------------------------------------------------------------------------------------------


def _entries(folder: str, recursive: bool) -> Iterator[Entry]:
    """Everything in a folder; what is hidden is listed, but not what lies in it. InputError where a class is gone."""
    filesystem, inner = resolve(folder)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    try:
        for entry in _local_entries(inner, recursive) if is_local else _remote_entries(filesystem, inner, recursive):
            path, kind = entry[:2]
            if kind == _GONE and "/" not in path and not (_is_hidden(path) or is_image_name(path)):
                raise InputError(f"{folder}/{printable(path)}: is a link to nothing; expected a class folder")
            yield entry
    except (OSError, UnicodeDecodeError) as error:  # the latter from afar, for names that are not UTF-8
        raise InputError(f"{folder}: cannot be listed: {one_line(error)}") from None


def _local_entries(folder: str, recursive: bool) -> Iterator[Entry]:
    root = os.fsencode(folder)
    todo: list[tuple[bytes, tuple[int, ...]]] = [(b"", (_place(os.stat(root)),))]
    while todo:
        below, above = todo.pop()
        with os.scandir(os.path.join(root, below)) as found:
            for entry in found:
                name = below + entry.name
                path = name.decode(errors="surrogateescape")
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing, or in a circle
                    yield path, _GONE, 0, 0
                    continue
                place = _place(status)
                if _is_hidden(path):
                    yield path, _OTHER, 0, 0
                elif stat.S_ISREG(status.st_mode):
                    yield path, _FILE, status.st_size, place
                elif not stat.S_ISDIR(status.st_mode):
                    yield path, _OTHER, 0, 0
                elif place in above:
                    yield path, _LOOP, 0, 0
                else:
                    yield path, _FOLDER, 0, 0
                    if recursive:
                        todo.append((name + b"/", (*above, place)))


def _place(status: os.stat_result) -> int:
    """A number for (device, inode), 64 bits; 0 where the file system numbers nothing."""
    if not status.st_ino:
        return 0
    return (status.st_ino ^ (status.st_dev * 0x9E3779B97F4A7C15)) % 2**64


def _remote_entries(filesystem: fs.FileSystem, folder: str, recursive: bool) -> Iterator[Entry]:
    kinds = {fs.FileType.File: _FILE, fs.FileType.Directory: _FOLDER}
    hidden = set()
    for found in filesystem.get_file_info(fs.FileSelector(folder, recursive=recursive)):
        path = found.path[len(folder) :].lstrip("/")
        parts = path.split("/")
        above = next((top for n in range(1, len(parts) + 1) if _is_hidden(top := "/".join(parts[:n]))), None)
        if above is None:
            yield path, kinds.get(found.type, _OTHER), found.size or 0, 0
        elif above not in hidden:
            hidden.add(above)
            yield above, _OTHER, 0, 0


def _head(folder: str, path: str) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    filesystem, inner = resolve(folder)
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            return local_bytes(inner, path.encode(errors="surrogateescape"), _HEAD)
        with filesystem.open_input_file(f"{inner}/{path}") as file:
            data: bytes = file.read(_HEAD)
            return data
    except OSError:
        return b""


def local_bytes(folder: str, path: bytes, most: int = -1) -> bytes:
    """A file below a local folder, whatever bytes its name has."""
    with open(os.path.join(os.fsencode(folder), path), "rb") as file:
        return file.read(most)
