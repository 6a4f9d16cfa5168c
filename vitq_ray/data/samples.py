"""An index of images in zip or folder layout, with labels or without. No Ray, no decoding.

    zip layout      <root>/{train,val}.zip with {train,val}_map.txt; a map line is relative/path<TAB>label
    folder layout   <root>/{train,val}/<class>/*.jpg, classes numbered by name (`folders`)
    without labels  <root>/{train,val}.zip without a map; <root>/{train,val}/*.jpg; <root>/*.jpg, which is val

A sample is a row of the map (or of the sorted folder); its position there is its `sample_id`. An index is a handful
of NumPy arrays: where each member lies in the zip, how long it is, its label. ImageNet's 1.28 million rows are read
and joined by compiled loops (`zip_directory`, `map_lines`, `match_names`) in about a second, and the arrays can be
shared between processes as they are. Zip members are read by offset, never extracted.
"""

from __future__ import annotations

import codecs
import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from pyarrow import NativeFile, fs

from vitq_ray.base.config import InputError, require_choice
from vitq_ray.base.files import one_line, passing, patiently, read_bytes, resolve
from vitq_ray.base.uris import without_keys
from vitq_ray.data import folders, tables
from vitq_ray.data.folders import LeftOut

SPLITS = ("train", "val")
NO_LABEL = -1  # of every image of a split without labels
_STORED, _DEFLATED = 0, 8
_LOCAL_HEADER = 30
_READERS = 16  # threads, where many files are read: a store far away answers late
_EXTRA_SLACK = 128  # local extra fields are read along with the data; longer ones cost a second read

Ids = npt.NDArray[np.int64]


class BadImageError(InputError):
    """One image that cannot be read or decoded; the message names it and the reason."""


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Where every image of a split is, and its label; a value that pickles cheaply. The arrays are read-only.

    Attributes:
        source: the archive or folder that images are read from (absolute path or URI).
        labels: (N,) int32; all of them `NO_LABEL` where the split has none.
        names: all relative paths, UTF-8, end to end, as bytes of an array; name i is
            `names[name_start[i] : name_start[i] + name_length[i]]`.
        sizes: (N,) int64, bytes of the encoded image.
        members: where each image lies in the archive, (N,) rows; None for folders.
        left_out: what lies there and is no image of the split, counted.
    """

    source: str
    labels: npt.NDArray[np.int32]
    names: npt.NDArray[np.uint8]
    name_start: npt.NDArray[np.int64]
    name_length: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    members: npt.NDArray[np.void] | None = None
    left_out: tuple[LeftOut, ...] = ()
    _file: list[NativeFile] = field(default_factory=list, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        for value in self.__dict__.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_file", "_lock", "_place")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _file=[], _lock=Lock())
        self.__post_init__()  # unpickled arrays are writable

    @property
    def has_labels(self) -> bool:
        """All images of a split have a label, or none has."""
        return bool(self.labels[0] != NO_LABEL)

    @property
    def no_labels(self) -> str:
        """For messages, of a split without labels: which, and why."""
        kind = "class folders" if self.members is None else "map beside it"
        return f"{without_keys(self.source)} has no labels, since it has no {kind}"

    @property
    def num_classes_seen(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of names, labels, sizes and (in zips) checksums: of the content, wherever it lies."""
        digest = hashlib.sha256()
        arrays: list[npt.NDArray[Any]] = [self._names_in_order(), self.labels, self.sizes]
        if self.members is not None:
            arrays.append(np.ascontiguousarray(self.members["crc"]))
        for array in arrays:
            digest.update(array.data)
            digest.update(b"|")
        return digest.hexdigest()

    def _names_in_order(self) -> npt.NDArray[np.uint8]:
        return tables.gather(self.names, self.name_start, self.name_length)

    def name(self, i: int) -> str:
        """Relative path of an image, as the map or the folder has it."""
        return self._name_bytes(i).decode(errors="replace")

    def _name_bytes(self, i: int) -> bytes:
        start = int(self.name_start[i])
        return self.names[start : start + int(self.name_length[i])].tobytes()

    def where(self, i: int) -> str:
        """An image's full address, for messages: `archive!member` or `folder/path`."""
        return f"{without_keys(self.source)}{'/' if self.members is None else '!'}{self.name(i)}"

    def read(self, i: int) -> bytes:
        """The encoded image. BadImageError where it is truncated, corrupt or gone, InputError where the server of a URI
        does not answer for a minute: that is no broken image. Safe to call from threads."""
        try:
            return patiently(self.source, lambda: self._read(i))
        except (OSError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            kind = InputError if isinstance(error, OSError) and passing(error) else BadImageError
            raise kind(f"{self.where(i)}: cannot be read: {one_line(reason)}") from None

    def _read(self, i: int) -> bytes:
        return self._read_file(i) if self.members is None else self._read_member(i, self.members[i])

    def checksums(self, ids: Ids) -> Ids:
        """CRC-32 of the encoded images; -1 where one cannot be read. A zip's directory has them; files are read."""
        if self.members is not None:
            return self.members["crc"][ids].astype(np.int64)

        def checksum(i: int) -> int:
            try:
                return zlib.crc32(self.read(i))
            except BadImageError:
                return -1

        with ThreadPoolExecutor(_READERS) as pool:
            return np.fromiter(pool.map(checksum, ids.tolist()), np.int64, len(ids))

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        # Kept: a client of S3 for every image would cost more than the image.
        return resolve(self.source)

    def _read_file(self, i: int) -> bytes:
        filesystem, root = self._place
        if isinstance(filesystem, fs.LocalFileSystem):
            return folders.local_bytes(root, self._name_bytes(i))
        with filesystem.open_input_file(f"{root}/{self.name(i)}") as file:
            data: bytes = file.read()
            return data

    def _read_member(self, i: int, member: Any) -> bytes:
        raw = self._raw_member(i, member)
        data = raw if member["method"] == _STORED else self._inflate(i, raw, int(member["size"]))
        if len(data) != member["size"] or zlib.crc32(data) != member["crc"]:
            raise BadImageError(f"{self.where(i)}: corrupt: size or checksum is not that of the zip's directory")
        return data

    def _raw_member(self, i: int, member: Any) -> bytes:
        """The member's bytes as they lie in the archive, in one read where its local extra field is short."""
        offset, stored = int(member["offset"]), int(member["stored"])
        guess = _LOCAL_HEADER + int(member["name_length"]) + _EXTRA_SLACK
        head = self._read_at(offset, guess + stored)
        if len(head) < _LOCAL_HEADER or head[:4] != b"PK\x03\x04":
            raise BadImageError(f"{self.where(i)}: corrupt: no local header at byte {offset}; is the zip truncated?")
        start = _LOCAL_HEADER + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        raw = head[start : start + stored] if start <= guess else self._read_at(offset + start, stored)
        if len(raw) != stored:
            raise BadImageError(f"{self.where(i)}: truncated: {len(raw)} of {stored} bytes are there")
        return raw

    def _inflate(self, i: int, raw: bytes, size: int) -> bytes:
        # Never more than the directory promises: a deflate bomb stops here.
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(raw, size + 1)
        if len(data) > size:
            raise BadImageError(f"{self.where(i)}: corrupt: inflates to more than the {size} bytes of the directory")
        return data

    def _read_at(self, offset: int, length: int) -> bytes:
        if not self._file:
            with self._lock:
                if not self._file:
                    filesystem, path = self._place
                    self._file.append(filesystem.open_input_file(path))
        data: bytes = self._file[0].read_at(length, offset)
        return data


def has_split(data_path: str, split: str) -> bool:
    """Whether `data_path` has `<split>.zip` or a folder `<split>`."""
    return _has_split(_root(data_path), split)


def _has_split(root: str, split: str) -> bool:
    return _kind(_join(root, f"{split}.zip")) == fs.FileType.File or _is_folder(_join(root, split))


def open_split(
    data_path: str, split: str, num_classes: int | None = None, class_order: str | None = None
) -> SampleIndex:
    """Index one split of a data set in either layout.

    Args:
        data_path: local path or URI (`s3://…`) of the folder that holds the splits.
        split: `train` or `val`.
        num_classes: labels must be below it; not checked where None.
        class_order: how class folders that are named by numbers are numbered, one of `folders.CLASS_ORDERS`.

    Raises:
        InputError: for anything missing, unreadable, inconsistent or empty; the message names file, line and value.
    """
    require_choice("split", split, SPLITS)
    root = _root(data_path)
    if _kind(_join(root, f"{split}.zip")) == fs.FileType.File:
        _require_no_order(class_order, f"{data_path} has maps, which say labels")
        archive, map_path = _join(root, f"{split}.zip"), _join(root, f"{split}_map.txt")
        beside = [(split, "are folders beside the zip that is read")] if _is_folder(_join(root, split)) else []
        if _kind(map_path) == fs.FileType.NotFound:
            return _open_bare_zip(archive, beside)
        return _open_zip(archive, map_path, num_classes, beside)
    if _is_folder(_join(root, split)):
        if folders.has_class_folders(_join(root, split)):
            return _open_folder(root, split, num_classes, class_order)
        _require_no_order(class_order, f"{_join(root, split)} has no class folders")
        return _open_bare_folder(_join(root, split))
    if split == "val" and not _has_split(root, "train") and _holds_images(root):
        _require_no_order(class_order, f"{root} has no class folders")
        return _open_bare_folder(root)
    raise InputError(
        f"{data_path}: has no {split} split; expected {split}.zip with {split}_map.txt, or a folder {split}"
    )


def _holds_images(root: str) -> bool:
    try:
        return _is_folder(root) and bool(folders.images_in(root)[0])
    except InputError:  # a link to nothing, which may have been meant as a split
        return False


def _require_no_order(class_order: str | None, why: str) -> None:
    if class_order is not None:
        raise InputError(f"class order: {class_order} given, but {why}")


def _root(data_path: str) -> str:
    """Absolute, so that an index can be read in a process with another working directory."""
    if "://" in data_path:
        return data_path
    try:
        data_path.encode()
        return str(Path(data_path).expanduser().absolute())
    except (RuntimeError, UnicodeEncodeError) as error:  # ~nobody; a path that is not UTF-8
        raise InputError(f"{folders.printable(data_path)}: {one_line(error)}; expected a folder") from None


def _join(root: str, name: str) -> str:
    """`root/name`; what a URI has after its `?` (`s3://bucket/data?region=…`) stays at its end."""
    base, mark, query = root.partition("?") if "://" in root else (root, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def _kind(path: str) -> fs.FileType:
    filesystem, inner = resolve(path)
    try:
        return filesystem.get_file_info(inner).type
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from None


def _is_folder(path: str) -> bool:
    return bool(_kind(path) == fs.FileType.Directory)


# Zip layout ---------------------------------------------------------------------------------------------------------


def _open_zip(archive: str, map_path: str, num_classes: int | None, out: list[tuple[str, str]]) -> SampleIndex:
    """`out` is what was left out already: (name, reason)."""
    members, member_names = _read_directory(archive)
    text = _map_text(map_path)
    lines = tables.map_lines(text)
    _check_lines(map_path, text, lines, num_classes)
    of_mac = tables.left_by_a_mac(text, lines["start"], lines["length"])
    out = out + [(_name_of(text, line), "were left by a Mac") for line in lines[of_mac]]
    lines = lines[~of_mac]
    if len(lines) == 0:
        raise InputError(f"{map_path}: lists no image; expected lines of relative/path<TAB>label")
    rows = _rows_of(archive, map_path, text, lines, member_names, members)
    del member_names  # a hundred megabytes of ImageNet's
    chosen = members[rows]
    del members, rows
    _check_members(archive, text, lines["start"], lines["length"], chosen)
    again = _listed_before(map_path, text, lines, chosen["offset"])
    if again.any():
        out += [(_name_of(text, line), "were listed before") for line in lines[again]]
        lines, chosen = lines[~again], chosen[~again]
    return SampleIndex(
        source=archive,
        labels=lines["label"].astype(np.int32),
        names=text,
        name_start=lines["start"].copy(),
        name_length=lines["length"].copy(),
        sizes=chosen["size"].astype(np.int64),
        members=chosen,
        left_out=folders.left_out(out),
    )


def _open_bare_zip(archive: str, out: list[tuple[str, str]]) -> SampleIndex:
    """A zip without a map: its images are those members whose names end as names of images do, sorted by name."""
    members, names = _read_directory(archive)
    hidden = tables.left_by_a_mac(names, members["name_start"], members["name_length"], hidden=True)
    found: dict[bytes, int] = {}  # of several members with one name the last counts, as in `zipfile`
    for row in range(len(members)):
        start = int(members["name_start"][row])
        name = names[start : start + int(members["name_length"][row])].tobytes()
        text = name.decode(errors="surrogateescape")
        if hidden[row]:
            out = [*out, (text, "are hidden or of a tool")]
        elif not folders.is_image_name(text):
            out = [*out, (text, "are no images")]
        else:
            found[name] = row
    if not found:
        raise InputError(f"{archive}: no images" + _left_out_hint(folders.left_out(out)))
    chosen = members[[found[name] for name in sorted(found)]]
    _check_members(archive, names, chosen["name_start"], chosen["name_length"], chosen)
    return SampleIndex(
        source=archive,
        labels=np.full(len(chosen), NO_LABEL, np.int32),
        names=names,
        name_start=chosen["name_start"].astype(np.int64),
        name_length=chosen["name_length"].astype(np.int32),
        sizes=chosen["size"].astype(np.int64),
        members=chosen,
        left_out=folders.left_out(out),
    )


def _map_text(map_path: str) -> npt.NDArray[np.uint8]:
    """The map in UTF-8, without a byte order mark. Windows writes UTF-16 with one."""
    what = "lines of relative/path<TAB>label"
    data = read_bytes(map_path, what)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode()
        except UnicodeError:
            raise InputError(f"{map_path}: begins as UTF-16 and is not; expected UTF-8, {what}") from None
    if b"\0" in data:
        raise InputError(f"{map_path}: has NUL bytes, as UTF-16 and binary files have; expected UTF-8, {what}")
    return np.frombuffer(data.removeprefix(codecs.BOM_UTF8), np.uint8)


def _name_of(text: npt.NDArray[np.uint8], line: np.void) -> str:
    return tables.text_of(text, line["start"], line["length"])


def _listed_before(
    map_path: str, text: npt.NDArray[np.uint8], lines: npt.NDArray[np.void], places: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which lines name an image that an earlier one named. InputError where the two have different labels."""
    order = np.argsort(places, kind="stable")
    same = np.flatnonzero(np.diff(places[order]) == 0)
    again = np.zeros(len(lines), np.bool_)
    again[order[same + 1]] = True
    first, second = lines[order[same]], lines[order[same + 1]]
    if len(other := np.flatnonzero(first["label"] != second["label"])):
        a, b = first[other[0]], second[other[0]]
        numbers = [tables.line_number(text, line) for line in (b, a)]
        raise InputError(
            f"{map_path}: line {numbers[0]}: {_name_of(text, b)!r} has label {b['label']}, but {a['label']} in line "
            f"{numbers[1]}; expected one label for each image"
        )
    return again


def _read_directory(archive: str) -> tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]:
    """The archive's central directory: (members,) rows of `tables.MEMBER`, and the bytes their names point into."""
    filesystem, path = resolve(archive)
    try:
        with filesystem.open_input_file(path) as file:
            size = file.size()
            end = tables.find_directory(archive, size, lambda offset, length: file.read_at(length, offset))
            raw = np.frombuffer(file.read_at(end.size, end.offset), np.uint8)
    except OSError as error:
        raise InputError(f"{archive}: cannot be read: {one_line(error)}") from None
    return tables.zip_directory(archive, raw, end), raw


def _check_lines(
    map_path: str, text: npt.NDArray[np.uint8], lines: npt.NDArray[np.void], num_classes: int | None
) -> None:
    largest = tables.MAX_LABEL if num_classes is None else num_classes - 1
    bad = (lines["problem"] != tables.FINE) | (lines["label"] > largest)
    if bad.any():
        line = lines[int(np.argmax(bad))]
        content = tables.text_of(text, line["start"], line["line_length"])
        problem = {
            tables.FINE: f"label out of range in {content!r}",
            tables.NO_TAB: f"no tab in {content!r}",
            tables.BAD_LABEL: f"the label is not a non-negative integer in {content!r}",
        }[int(line["problem"])]
        raise InputError(
            f"{map_path}: line {tables.line_number(text, line)}: {problem}; "
            f"expected relative/path<TAB>label, a label from 0 to {largest}"
        )


def _rows_of(
    archive: str,
    map_path: str,
    text: npt.NDArray[np.uint8],
    lines: npt.NDArray[np.void],
    member_names: npt.NDArray[np.uint8],
    members: npt.NDArray[np.void],
) -> npt.NDArray[np.int64]:
    """Row of `members` for every map line, also where all members lie under one extra top folder."""
    rows = tables.match_names(text, lines["start"], lines["length"], member_names, members, skip=0)
    if (rows < 0).any():
        beside = tables.left_by_a_mac(member_names, members["name_start"], members["name_length"], hidden=True)
        below = np.flatnonzero(~beside)
        if skip := tables.common_top_folder(member_names, members[below]):
            found = tables.match_names(text, lines["start"], lines["length"], member_names, members[below], skip)
            rows = np.where(rows < 0, np.where(found < 0, -1, below[found]), rows)
    if (rows < 0).any():
        line = lines[int(np.argmax(rows < 0))]
        name, number = tables.text_of(text, line["start"], line["length"]), tables.line_number(text, line)
        raise InputError(
            f"{map_path}: line {number}: {name!r} is not in {archive} ({len(members)} members); "
            "expected the path of a member"
        )
    return rows


def _check_members(
    archive: str,
    names: npt.NDArray[np.uint8],
    start: npt.NDArray[np.int64],
    length: npt.NDArray[np.int32],
    chosen: npt.NDArray[np.void],
) -> None:
    encrypted = (chosen["flags"] & 1) != 0
    unknown = (chosen["method"] != _STORED) & (chosen["method"] != _DEFLATED)
    if not (encrypted | unknown).any():
        return
    i = int(np.argmax(encrypted | unknown))
    name = tables.text_of(names, start[i], length[i])
    found = "is encrypted" if encrypted[i] else f"has compression method {chosen['method'][i]}"
    raise InputError(f"{archive}!{name}: {found}; expected a stored (0) or deflated (8) member")


_NO_IMAGES = "no images; expected {}/<class>/*.jpg or another format"


# Folder layout ------------------------------------------------------------------------------------------------------


def _open_folder(root: str, split: str, num_classes: int | None, class_order: str | None) -> SampleIndex:
    folder, of_train = _join(root, split), _join(root, "train")
    numbered_by = of_train if _is_folder(of_train) else folder
    number = folders.class_numbers(numbered_by, class_order)
    if num_classes is not None and len(number) != num_classes:
        raise InputError(
            f"{root}: {len(number)} class folders, but the model has {num_classes} classes; folders are numbered by "
            "name, so there must be one for each"
        )
    images, left_out = folders.image_files(folder)
    if not images:
        raise InputError(f"{folder}: {_NO_IMAGES.format(split)}" + _left_out_hint(left_out))
    labels = []
    for name, _ in images:
        label = number.get(folders.composed(name.split("/", 1)[0]))
        if label is None:
            raise InputError(
                f"{folder}/{folders.printable(name)}: its class is not among the {len(number)} folders of {numbered_by}"
            )
        labels.append(label)
    return _folder_index(folder, images, labels, left_out)


def _open_bare_folder(folder: str) -> SampleIndex:
    """A folder of images without class folders."""
    images, left_out = folders.images_in(folder)
    if not images:
        raise InputError(f"{folder}: {_NO_IMAGES.format(folder.rpartition('/')[2])}" + _left_out_hint(left_out))
    return _folder_index(folder, images, [NO_LABEL] * len(images), left_out)


def _left_out_hint(left_out: tuple[LeftOut, ...]) -> str:
    return f". Left out: {folders.left_out_text(left_out)}" if left_out else ""


def _folder_index(
    folder: str, images: list[tuple[str, int]], labels: list[int], left_out: tuple[LeftOut, ...]
) -> SampleIndex:
    names = [name.encode(errors="surrogateescape") for name, _ in images]
    lengths = np.array([len(name) for name in names], np.int32)
    return SampleIndex(
        source=folder,
        labels=np.array(labels, np.int32),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_start=np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]),
        name_length=lengths,
        sizes=np.array([size for _, size in images], np.int64),
        left_out=left_out,
    )
