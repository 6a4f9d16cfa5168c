"""A zip's central directory, a map file, and the join of both, as arrays: compiled loops over raw bytes.

ImageNet's train.zip lists 1.28 million members. Objects for each (as `zipfile` makes them) take seconds and a
gigabyte; rows of arrays take neither. The format is PKWARE's APPNOTE 6.3.9: end record (4.3.16), zip64 end record and
locator (4.3.14, 4.3.15), central headers (4.3.12), zip64 extra field (4.5.3).
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vitq_ray.base.config import InputError
from vitq_ray.base.kernels import compiled

Bytes = npt.NDArray[np.uint8]

MEMBER = np.dtype(
    [
        ("offset", np.int64),  # of the local header in the archive
        ("stored", np.int64),  # bytes in the archive
        ("size", np.int64),  # bytes once inflated
        ("name_start", np.int64),  # of the name in the directory
        ("crc", np.uint32),
        ("name_length", np.uint16),
        ("method", np.uint16),
        ("flags", np.uint16),
    ]
)
LINE = np.dtype(
    [
        ("start", np.int64),  # of the line and of the path
        ("line_length", np.int32),
        ("length", np.int32),  # of the path
        ("label", np.uint32),
        ("problem", np.uint8),
    ]
)
FINE, NO_TAB, BAD_LABEL = 0, 1, 2
MAX_LABEL = 2**31 - 1  # larger ones are read as MAX_LABEL + 1

_END, _ZIP64_LOCATOR, _ZIP64_END = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_END_SIZE, _LOCATOR_SIZE, _ZIP64_END_SIZE, _LONGEST_COMMENT = 22, 20, 56, 65535
_HEADER_SIZE, _LOCAL_SIZE = 46, 30
_WRAP = 1 << 16
_DEFLATE_RATIO = 1032  # the most that deflate can do: 258 bytes in 2 bits
_UTF8_FLAG = 1 << 11
_SHOWN = 200
_HASHED_AT_ONCE = 1 << 16  # names of a map; all 1.28 million hashes would take 10 MB more


def text_of(data: Bytes, start: int, length: int) -> str:
    """A slice of bytes as text, for messages: at most the first 200 bytes."""
    text = data[int(start) : int(start) + min(int(length), _SHOWN)].tobytes().decode(errors="replace")
    return text if length <= _SHOWN else text + "…"


# Central directory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Directory:
    """Where the central directory lies.

    Attributes:
        count: of members; without zip64 it has 16 bits, and writers that do not know zip64 let it wrap.
        shift: what precedes the archive (a self-extractor's stub), in bytes.
    """

    offset: int
    size: int
    count: int
    shift: int
    zip64: bool


def find_directory(archive: str, size: int, read_at: Callable[[int, int], bytes]) -> Directory:
    """Find the central directory of a zip of `size` bytes from its end. InputError where it is no whole zip."""
    tail_size = min(size, _END_SIZE + _LONGEST_COMMENT)
    tail = read_at(size - tail_size, tail_size)
    place = _find_end(tail)
    if place < 0:
        raise InputError(f"{archive}: not a zip, or truncated: no end-of-directory record in its last bytes")
    end = size - tail_size + place
    disk, directory_disk, _, count, length, offset = struct.unpack_from("<4H2I", tail, place + 4)
    zip64 = None
    if 0xFFFF in (disk, count) or 0xFFFFFFFF in (length, offset):
        zip64 = _find_zip64(archive, end, read_at)
        if zip64 is not None:
            end, disk, directory_disk, count, length, offset = zip64
    if disk or directory_disk:
        raise InputError(f"{archive}: is part of a multi-disk zip; expected one file")
    shift = end - length - offset
    if shift < 0:
        raise InputError(f"{archive}: truncated or corrupt: its directory would begin {-shift} bytes before the file")
    return Directory(offset + shift, length, count, shift, zip64 is not None)


def _find_end(tail: bytes) -> int:
    """Last end record whose comment reaches exactly to the end of the file; a comment may hold the signature too."""
    place = tail.rfind(_END)
    while place >= 0:
        if place + _END_SIZE <= len(tail):
            (comment,) = struct.unpack_from("<H", tail, place + 20)
            if place + _END_SIZE + comment == len(tail):
                return place
        place = tail.rfind(_END, 0, place)
    return -1


def _find_zip64(
    archive: str, end: int, read_at: Callable[[int, int], bytes]
) -> tuple[int, int, int, int, int, int] | None:
    locator = read_at(max(end - _LOCATOR_SIZE, 0), _LOCATOR_SIZE)
    if locator[:4] != _ZIP64_LOCATOR:
        return None  # 65,535 members exactly, without zip64
    (said,) = struct.unpack_from("<Q", locator, 8)
    beside = end - _LOCATOR_SIZE - _ZIP64_END_SIZE  # where it is if bytes precede the archive
    for place in (said, beside):
        record = read_at(place, _ZIP64_END_SIZE) if 0 <= place < end else b""
        if len(record) == _ZIP64_END_SIZE and record[:4] == _ZIP64_END:
            disk, directory_disk, _, count, length, offset = struct.unpack_from("<2I4Q", record, 16)
            return place, disk, directory_disk, count, length, offset
    raise InputError(f"{archive}: corrupt: no zip64 end record at byte {said}")


def zip_directory(archive: str, raw: Bytes, end: Directory) -> npt.NDArray[np.void]:
    """Central directory `raw` as (members,) rows of MEMBER, folders left out. InputError where it is corrupt."""
    count = end.count if end.zip64 else _unwrapped(raw, end.count)
    if count * _HEADER_SIZE > len(raw):
        raise InputError(f"{archive}: corrupt directory: {count} members do not fit into its {len(raw)} bytes")
    members = np.zeros(count, MEMBER)
    found, read = _parse_directory(raw, members, end.shift)
    if found != count:
        raise InputError(f"{archive}: corrupt directory: {found} readable members of the {count} it should list")
    if read != len(raw):
        raise InputError(f"{archive}: corrupt directory: its {count} members take {read} of its {len(raw)} bytes")
    _check_places(archive, raw, members, end.offset)
    ends_in_slash = raw[members["name_start"] + members["name_length"].astype(np.int64) - 1] == ord("/")
    return members[~ends_in_slash] if ends_in_slash.any() else members


def _unwrapped(raw: Bytes, count: int) -> int:
    """The count of members of which the end record has 16 bits: that of the headers, where those bits agree."""
    if len(raw) < (count + _WRAP) * _HEADER_SIZE:
        return count
    headers = int(_count_headers(raw))
    return headers if headers % _WRAP == count else count


@compiled
def _count_headers(raw):  # type: ignore[no-untyped-def]
    at, count = 0, 0
    while at + 46 <= raw.size and _number(raw, at, 4) == 0x02014B50:
        at += 46 + _number(raw, at + 28, 2) + _number(raw, at + 30, 2) + _number(raw, at + 32, 2)
        count += 1
    return count


def _check_places(archive: str, raw: Bytes, members: npt.NDArray[np.void], limit: int) -> None:
    """Refuse members that cannot lie before the directory, at byte `limit`, or that deflate cannot have packed so."""
    offset, stored, size = members["offset"], members["stored"], members["size"]
    lost = (offset < 0) | (stored < 0) | (stored > limit - _LOCAL_SIZE - offset)
    lost |= (size < 0) | (size > _DEFLATE_RATIO * stored)
    if lost.any():
        i = int(np.argmax(lost))
        name = text_of(raw, members["name_start"][i], members["name_length"][i])
        raise InputError(
            f"{archive}: corrupt directory: {name!r} would be {size[i]} bytes, packed in {stored[i]} from byte "
            f"{offset[i]} on; expected them before byte {limit}"
        )


@compiled
def _number(raw, at, size):  # type: ignore[no-untyped-def]
    value = np.int64(0)
    for k in range(size):
        value |= np.int64(raw[at + k]) << (8 * k)
    return value


@compiled
def _parse_directory(raw, members, shift):  # type: ignore[no-untyped-def]
    """Fill `members`; returns how many were readable, and the bytes that they took."""
    at = 0
    for i in range(members.size):
        if at + 46 > raw.size or _number(raw, at, 4) != 0x02014B50:
            return i, at
        member = members[i]
        name_length, extra, comment = _number(raw, at + 28, 2), _number(raw, at + 30, 2), _number(raw, at + 32, 2)
        following = at + 46 + name_length + extra + comment
        if following > raw.size or name_length == 0:
            return i, at
        member.flags, member.method = _number(raw, at + 8, 2), _number(raw, at + 10, 2)
        member.crc = _number(raw, at + 16, 4)
        member.name_start, member.name_length = at + 46, name_length
        stored, size, offset = _number(raw, at + 20, 4), _number(raw, at + 24, 4), _number(raw, at + 42, 4)
        saturated = np.int64(0xFFFFFFFF)
        if stored == saturated or size == saturated or offset == saturated:
            needed = 8 * (int(stored == saturated) + int(size == saturated) + int(offset == saturated))
            field, fields_end = at + 46 + name_length, at + 46 + name_length + extra
            while field + 4 <= fields_end and _number(raw, field, 2) != 1:
                field += 4 + _number(raw, field + 2, 2)
            if field + 4 + needed > fields_end or _number(raw, field + 2, 2) < needed:
                return i, at
            value = field + 4  # zip64: only what is saturated, in this order
            if size == saturated:
                size, value = _number(raw, value, 8), value + 8
            if stored == saturated:
                stored, value = _number(raw, value, 8), value + 8
            if offset == saturated:
                offset = _number(raw, value, 8)
        member.stored, member.size, member.offset = stored, size, offset + shift
        at = following
    return members.size, at


# Map file -----------------------------------------------------------------------------------------------------------


def map_lines(text: Bytes) -> npt.NDArray[np.void]:
    """(lines,) rows of LINE of a map file; blank lines are left out, Windows line ends are fine.

    The path is all before the last tab, the label what follows it, spaces around it allowed.
    """
    lines = np.zeros(int((text == ord("\n")).sum()) + 1, LINE)
    return lines[: _parse_map(text, lines)]


def line_number(text: Bytes, line: np.void) -> int:
    """Of a row of LINE, in the file, from 1."""
    return int((text[: int(line["start"])] == ord("\n")).sum()) + 1


@compiled
def _parse_map(text, lines):  # type: ignore[no-untyped-def]
    rows, start = 0, 0
    while start < text.size:
        end = start
        while end < text.size and text[end] != 10:
            end += 1
        last = end
        while last > start and (text[last - 1] == 13 or text[last - 1] == 32):
            last -= 1
        blank = True
        for k in range(start, last):
            blank &= text[k] == 32 or text[k] == 9
        if not blank:
            row = lines[rows]
            row.start, row.line_length = start, last - start
            _parse_line(text, start, last, row)
            rows += 1
        start = end + 1
    return rows


@compiled
def _parse_line(text, start, end, row):  # type: ignore[no-untyped-def]
    tab = end - 1
    while tab >= start and text[tab] != 9:
        tab -= 1
    if tab < start:
        row.problem = 1
        return
    row.length = tab - start
    first = tab + 1
    while first < end and text[first] == 32:
        first += 1
    if first == end or tab == start:
        row.problem = 2
        return
    label = np.int64(0)
    for k in range(first, end):
        digit = np.int64(text[k]) - 48
        if digit < 0 or digit > 9:
            row.problem = 2
            return
        label = min(10 * label + digit, np.int64(MAX_LABEL + 1))
    row.label = label


# Joining both -------------------------------------------------------------------------------------------------------


def match_names(
    text: Bytes,
    start: npt.NDArray[np.int64],
    length: npt.NDArray[np.int32],
    raw: Bytes,
    members: npt.NDArray[np.void],
    skip: int,
) -> npt.NDArray[np.int64]:
    """Row of the member that each map path names, or -1; the first `skip` bytes of member names do not count.

    By 64-bit hashes, sorted; equal hashes are confirmed byte by byte. Of several members with one name the last
    counts, as in `zipfile`. Names of members without the UTF-8 flag match as UTF-8 bytes, which most tools write, or
    as code page 437, which the standard says. Accents match however they are composed: a Mac writes them apart.
    """
    hashes = _hashes(raw, members["name_start"], members["name_length"], skip)
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    hashes = hashes[order]
    place = np.empty(len(start), np.int32)
    for first in range(0, len(start), _HASHED_AT_ONCE):
        part = slice(first, first + _HASHED_AT_ONCE)
        place[part] = np.searchsorted(hashes, _hashes(text, start[part], length[part], 0), side="right") - 1
    del hashes
    rows: npt.NDArray[np.int64] = _confirmed(
        order, place, text, start, length, raw, members["name_start"], members["name_length"], skip
    )
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        spellings = _other_spellings(raw, members, skip)
        for i in missing if spellings else ():
            name = text[start[i] : start[i] + length[i]].tobytes()
            rows[i] = spellings.get(_composed(name), -1)
    return rows


def _other_spellings(raw: Bytes, members: npt.NDArray[np.void], skip: int) -> dict[bytes, int]:
    """{name, composed: row} of the members whose names are not plain ASCII, as UTF-8 and as code page 437."""
    special = np.flatnonzero(_has_high_byte(raw, members["name_start"], members["name_length"].astype(np.int64)))
    names = {}
    for row in special:
        begin = int(members["name_start"][row])
        name = raw[begin + skip : begin + int(members["name_length"][row])].tobytes()
        names[_composed(name)] = int(row)
        if not members["flags"][row] & _UTF8_FLAG:
            names[_composed(name.decode("cp437").encode())] = int(row)
    return names


def _composed(name: bytes) -> bytes:
    """Letters and their accents as one character each (NFC)."""
    try:
        return unicodedata.normalize("NFC", name.decode()).encode()
    except UnicodeDecodeError:
        return name


def common_top_folder(raw: Bytes, members: npt.NDArray[np.void]) -> int:
    """Length of the top folder, its slash included, if all members lie under one; else 0."""
    if len(members) == 0:
        return 0
    first = members[0]
    start = int(first["name_start"])
    name = raw[start : start + int(first["name_length"])].tobytes()
    length = name.find(b"/") + 1
    if length == 0 or not _all_begin_with(raw, members["name_start"], members["name_length"], length, start):
        return 0
    return length


def left_by_a_mac(
    data: Bytes, start: npt.NDArray[np.int64], length: npt.NDArray[Any], hidden: bool = False
) -> npt.NDArray[np.bool_]:
    """Which paths lie in `__MACOSX/`, or are files `._…`; with `hidden` all files whose name begins with a dot."""
    found: npt.NDArray[np.bool_] = _left_by_a_mac(data, start, length, np.frombuffer(b"__MACOSX/", np.uint8), hidden)
    return found


@compiled
def _left_by_a_mac(data, start, length, folder, hidden):  # type: ignore[no-untyped-def]
    out = np.zeros(start.size, np.bool_)
    for i in range(start.size):
        end = start[i] + length[i]
        in_folder = length[i] >= folder.size
        k = 0
        while in_folder and k < folder.size:
            in_folder = data[start[i] + k] == folder[k]
            k += 1
        base = end
        while base > start[i] and data[base - 1] != 47:
            base -= 1
        dotted = base < end and data[base] == 46 and (hidden or (base + 1 < end and data[base + 1] == 95))
        out[i] = in_folder or dotted
    return out


def gather(data: Bytes, start: npt.NDArray[np.int64], length: npt.NDArray[np.int32]) -> Bytes:
    """The slices, each followed by a line feed, end to end."""
    out = np.empty(int(length.sum(dtype=np.int64)) + len(length), np.uint8)
    _gather(data, start, length, out)
    return out


@compiled
def _gather(data, start, length, out):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(start.size):
        for k in range(length[i]):
            out[at] = data[start[i] + k]
            at += 1
        out[at] = 10
        at += 1


@compiled
def _hashes(data, start, length, skip):  # type: ignore[no-untyped-def]
    """FNV-1a, 64 bits, of every slice but for its first `skip` bytes; shorter ones hash as empty."""
    out = np.empty(start.size, np.uint64)
    prime = np.uint64(0x100000001B3)
    for i in range(start.size):
        value = np.uint64(0xCBF29CE484222325)
        for k in range(skip, length[i]):
            value = (value ^ np.uint64(data[start[i] + k])) * prime
        out[i] = value
    return out


@compiled
def _confirmed(order, place, text, start, length, raw, name_start, name_length, skip):  # type: ignore[no-untyped-def]
    """`order[place]` where the names are the same indeed, else -1."""
    out = np.full(place.size, -1, np.int64)
    for i in range(place.size):
        if place[i] < 0:
            continue
        row = order[place[i]]
        same = np.int64(name_length[row]) - skip == length[i]
        k = 0
        while same and k < length[i]:
            same = text[start[i] + k] == raw[name_start[row] + skip + k]
            k += 1
        if same:
            out[i] = row
    return out


@compiled
def _has_high_byte(data, start, length):  # type: ignore[no-untyped-def]
    out = np.zeros(start.size, np.bool_)
    for i in range(start.size):
        for k in range(length[i]):
            if data[start[i] + k] >= 128:
                out[i] = True
    return out


@compiled
def _all_begin_with(raw, name_start, name_length, length, first):  # type: ignore[no-untyped-def]
    for i in range(name_start.size):
        if name_length[i] <= length:
            return False
        for k in range(length):
            if raw[name_start[i] + k] != raw[first + k]:
                return False
    return True
