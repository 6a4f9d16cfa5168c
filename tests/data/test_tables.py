"""Against `zipfile` for archives, against plain Python for map files and the join of both."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitq_ray.base.config import InputError
from vitq_ray.data import tables

SATURATED = 0xFFFFFFFF
OTHER_FIELD = struct.pack("<HHBI", 0x5455, 5, 3, 0)  # a time stamp, as Info-ZIP writes


@dataclass(frozen=True)
class Member:
    """One member, byte by byte; None means what is true."""

    name: bytes
    data: bytes
    method: int = zipfile.ZIP_STORED
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    zip64: tuple[str, ...] = ()  # which of size, stored, offset are in the zip64 field of the directory
    local_extra: bytes = b""
    extra: bytes = b""

    def packed(self) -> bytes:
        if self.method != zipfile.ZIP_DEFLATED:
            return self.data
        deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return deflater.compress(self.data) + deflater.flush()

    def sums(self) -> tuple[int, int, int]:
        crc = zlib.crc32(self.data) if self.crc is None else self.crc
        return crc, len(self.packed()), len(self.data) if self.size is None else self.size

    def local(self) -> bytes:
        lengths = (len(self.name), len(self.local_extra))
        header = struct.pack("<4s5H3I2H", b"PK\3\4", 45, self.flags, self.method, 0, 33, *self.sums(), *lengths)
        return header + self.name + self.local_extra + self.packed()

    def central(self, offset: int) -> bytes:
        crc, stored, size = self.sums()
        values = {"size": size, "stored": stored, "offset": offset}
        extra = self.extra
        if self.zip64:
            wide = b"".join(struct.pack("<Q", value) for key, value in values.items() if key in self.zip64)
            extra = OTHER_FIELD + struct.pack("<HH", 1, len(wide)) + wide
            values.update(dict.fromkeys(self.zip64, SATURATED))
        versions = (45, 45, self.flags, self.method, 0, 33)
        sizes = (crc, values["stored"], values["size"], len(self.name), len(extra), 0, 0, 0, 0, values["offset"])
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *versions, *sizes) + self.name + extra


def zip_bytes(
    members: list[Member],
    stub: bytes = b"",
    comment: bytes = b"",
    zip64: bool = False,
    count: int | None = None,
    disk: int = 0,
    directory: bytes | None = None,
) -> bytes:
    """An archive; `stub` precedes it uncounted, `zip64` saturates the end record, `count` is what it claims."""
    body, headers = bytearray(), bytearray()
    for member in members:
        headers += member.central(len(body))
        body += member.local()
    directory = bytes(headers) if directory is None else directory
    count = len(members) if count is None else count
    end = b""
    numbers = (count, count, len(directory), len(body))
    if zip64:
        place = len(body) + len(directory)
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, place, 1)
        numbers = (0xFFFF, 0xFFFF, SATURATED, SATURATED)
    end += struct.pack("<4s4H2IH", b"PK\5\6", disk, disk, *numbers, len(comment)) + comment
    return stub + bytes(body) + directory + end


def parse(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(rows of MEMBER, the directory's bytes) of an archive in memory."""
    end = tables.find_directory("a.zip", len(data), lambda offset, length: data[offset : offset + length])
    raw = np.frombuffer(data[end.offset : end.offset + end.size], np.uint8)
    return tables.zip_directory("a.zip", raw, end), raw


def assert_like_zipfile(data: bytes) -> None:
    """Everything that the rows say is what `zipfile` says of the files (not folders) in the archive."""
    members, raw = parse(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
    assert len(members) == len(infos)
    for member, info in zip(members, infos, strict=True):
        name = tables.text_of(raw, member["name_start"], member["name_length"])
        assert name.encode() == info.filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        found = [int(member[key]) for key in ("offset", "stored", "size", "crc", "method", "flags")]
        wanted = [info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type, info.flag_bits]
        assert found == wanted


A = Member(b"a.jpg", b"first image")
B = Member(b"folder/b.jpg", b"second image " * 20, zipfile.ZIP_DEFLATED)
EMPTY = Member(b"empty", b"")
FOLDER = Member(b"folder/", b"")


# Central directory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zip64", [False, True], ids=["plain", "zip64"])
@pytest.mark.parametrize("stub", [b"", b"#!/bin/sh PK\1\2 PK\5\6 \n"], ids=["at 0", "after a stub"])
@pytest.mark.parametrize("comment", [b"", b"made by hand", b"see PK\5\6", b"PK\5\6" * 9, b"x" * 65535])
def test_archive_forms(zip64: bool, stub: bytes, comment: bytes) -> None:
    data = zip_bytes([A, FOLDER, B, EMPTY], stub, comment, zip64)
    if b"PK\5\6" in comment:  # zipfile takes the signature in the comment for the record
        members, _ = parse(data)
        np.testing.assert_array_equal(members, parse(zip_bytes([A, FOLDER, B, EMPTY], stub, b"", zip64))[0])
    else:
        assert_like_zipfile(data)


@pytest.mark.parametrize(
    "saturated", [("size",), ("stored",), ("offset",), ("size", "offset"), ("size", "stored", "offset")], ids=str
)
def test_zip64_fields_hold_only_what_is_saturated(saturated: tuple[str, ...]) -> None:
    assert_like_zipfile(zip_bytes([A, replace(B, zip64=saturated), EMPTY], zip64=True))


def test_zipfile_s_own_archives() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("stored.jpg", b"1")
        archive.writestr("deflated.jpg", b"2" * 1000, zipfile.ZIP_DEFLATED)
        archive.mkdir("folder")
        with archive.open("folder/forced.jpg", "w", force_zip64=True) as file:
            file.write(b"3")
        archive.writestr("ünïcode/写真.jpg", b"4")
        archive.comment = b"a comment"
    assert_like_zipfile(stream.getvalue())


def test_empty_archive_has_no_members() -> None:
    assert len(parse(zip_bytes([]))[0]) == 0


def test_65535_members_need_no_zip64() -> None:
    header = EMPTY.central(0)
    data = EMPTY.local() + header * 65535
    data += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 65535 * len(header), len(EMPTY.local()), 0)
    assert len(parse(data)[0]) == 65535


def huge(**values: int) -> bytes:
    """A zip64 field of the directory with the given 8-byte values."""
    return struct.pack("<HH", 1, 8 * len(values)) + b"".join(struct.pack("<Q", v) for v in values.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a zip, or truncated: no end-of-directory record in its last bytes"),
        (b"text, no archive" * 9, "not a zip, or truncated: no end-of-directory record in its last bytes"),
        (zip_bytes([A, B], comment=b"comment")[:-1], "not a zip, or truncated: no end-of-directory record"),
        (zip_bytes([A, B])[:-1], "not a zip, or truncated: no end-of-directory record"),
        (zip_bytes([A, B])[30:], "truncated or corrupt: its directory would begin 30 bytes before"),
        (zip_bytes([A, B], count=60000), "corrupt directory: 60000 members do not fit into its 109 bytes"),
        (zip_bytes([replace(A, name=b"a" * 99)], count=2), "corrupt directory: 1 readable members of the 2 it should"),
        (zip_bytes([A, B], count=1), "corrupt directory: its 1 members take 51 of its 109 bytes"),
        (zip_bytes([A, B], disk=1), "is part of a multi-disk zip; expected one file"),
        (zip_bytes([replace(A, name=b"")]), "corrupt directory: 0 readable members of the 1 it should list"),
        (zip_bytes([A], zip64=True).replace(b"PK\6\6", b"PK\6\0"), "corrupt: no zip64 end record at byte 97"),
        (zip_bytes([A]).replace(b"PK\1\2", b"PK\1\3"), "corrupt directory: 0 readable members of the 1 it should list"),
        (
            zip_bytes([replace(A, size=1032 * 11 + 1)]),
            r"corrupt directory: 'a.jpg' would be 11353 bytes, packed in 11 from byte 0 on; expected them before byte",
        ),
    ],
)
def test_broken_archives(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"^a\.zip: {message}"):
        parse(data)


@pytest.mark.parametrize("field", ["size", "stored", "offset"])
@pytest.mark.parametrize("value", [2**33, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_impossible_64_bit_numbers(field: str, value: int) -> None:
    whole = zip_bytes([replace(A, zip64=(field,))])
    true = {"size": len(A.data), "stored": len(A.data), "offset": 0}[field]
    wide = struct.pack("<HHQ", 1, 8, true)
    assert whole.count(wide) == 1
    with pytest.raises(InputError, match=r"^a\.zip: corrupt directory: 'a\.jpg' would be .* expected them before byte"):
        parse(whole.replace(wide, struct.pack("<HHQ", 1, 8, value)))


@pytest.mark.parametrize(
    "extra",
    [
        b"",
        OTHER_FIELD,
        huge(size=1),
        huge(size=1, stored=1)[:-1],
        huge(size=1) + OTHER_FIELD,
        struct.pack("<HH", 1, 65535),
        b"\1\0",
        b"\1\0\0\0",
    ],
)
def test_saturated_numbers_without_a_whole_zip64_field(extra: bytes) -> None:
    """The field may not be completed from whatever bytes lie behind it."""
    data = zip_bytes([replace(A, extra=extra)])
    place = data.rindex(b"PK\1\2") + 20
    data = data[:place] + b"\xff" * 8 + data[place + 8 :]
    with pytest.raises(InputError, match=r"^a\.zip: corrupt directory: 0 readable members of the 1"):
        parse(data)


# Map file -----------------------------------------------------------------------------------------------------------


def map_lines_by_hand(text: bytes) -> list[tuple[int, bytes, int, int]]:
    """(line number, path, label, problem) of every line that is not blank."""
    rows = []
    for number, line in enumerate(text.split(b"\n"), 1):
        path, tab, label = line.rstrip(b"\r ").rpartition(b"\t")
        if not (path + label).strip(b" \t"):
            continue
        label = label.lstrip(b" ")
        if not tab:
            rows.append((number, b"", 0, tables.NO_TAB))
        elif not path or not label.isdigit():
            rows.append((number, path, 0, tables.BAD_LABEL))
        else:
            rows.append((number, path, min(int(label), tables.MAX_LABEL + 1), tables.FINE))
    return rows


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"b c", b"\t", b"\n", b"\r\n", b" ", b"0", b"17", b"-1"]), max_size=30))
@example([b""])
@example([b"a\t3", b"\r\n", b"\n", b"  \n", b"\t\n", b"b\tc\t4"])
@example([b"a\t2147483647\nb\t2147483648\nc\t99999999999999999999999999\nd\t000000000000000000000000005"])
@example([b"\t1\n", b"a\t\n", b"a\t1x\n", b"a\t1.5\n", b"a\t+1\n", b"a\t1 2\n", "é\t٣".encode()])
def test_map_lines(pieces: list[bytes]) -> None:
    text = np.frombuffer(b"".join(pieces), np.uint8)
    wanted = map_lines_by_hand(text.tobytes())
    lines = tables.map_lines(text)
    assert lines["problem"].tolist() == [row[3] for row in wanted]
    assert [tables.line_number(text, line) for line in lines] == [row[0] for row in wanted]
    for line, (_, path, label, problem) in zip(lines, wanted, strict=True):
        if problem == tables.FINE:
            assert text[line["start"] :][: line["length"]].tobytes() == path
            assert line["label"] == label


# Joining both -------------------------------------------------------------------------------------------------------

words = st.text("ab/é", min_size=1, max_size=4)


def directory_of(names: list[bytes], flags: int = 0x800) -> tuple[np.ndarray, np.ndarray]:
    return parse(zip_bytes([Member(name, b"", flags=flags) for name in names]))


def match(wanted: list[bytes], raw: np.ndarray, members: np.ndarray, skip: int = 0) -> list[int]:
    lengths = np.array([len(name) for name in wanted], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    return tables.match_names(
        np.frombuffer(b"".join(wanted), np.uint8), starts, lengths, raw, members, skip=skip
    ).tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(words.filter(lambda w: not w.endswith("/")), max_size=12), st.lists(words, min_size=1, max_size=12))
def test_match_names_takes_the_last_of_equals(present: list[str], wanted: list[str]) -> None:
    members, raw = directory_of([name.encode() for name in present])
    last = {name: row for row, name in enumerate(present)}
    assert match([name.encode() for name in wanted], raw, members) == [last.get(name, -1) for name in wanted]


def test_match_names_below_a_top_folder() -> None:
    members, raw = directory_of([b"top/a", b"top/b/a", b"top/c"])
    assert match([b"b/a", b"a", b"top/a", b"", b"c"], raw, members, skip=4) == [1, 0, -1, -1, 2]


def test_match_names_in_code_page_437() -> None:
    members, raw = directory_of(["été".encode("cp437"), "naïve".encode(), b"plain"], flags=0)
    assert match(["naïve".encode(), "été".encode(), b"plain"], raw, members) == [1, 0, 2]
    members, raw = directory_of(["été".encode("cp437")], flags=0x800)  # says it is UTF-8, so it is no code page 437
    assert match(["été".encode()], raw, members) == [-1]


@pytest.mark.parametrize(
    ("names", "length"),
    [
        ([b"top/a", b"top/b/c"], 4),
        ([b"top/a", b"tip/b"], 0),
        ([b"top/a", b"top"], 0),
        ([b"top/a", b"b"], 0),
        ([b"a", b"top/b"], 0),
        ([b"/a", b"/b"], 1),
        ([], 0),
    ],
)
def test_common_top_folder(names: list[bytes], length: int) -> None:
    members, raw = directory_of(names)
    assert tables.common_top_folder(raw, members) == length


def test_gather_ends_each_slice_with_a_line_feed() -> None:
    data = np.frombuffer(b"0123456789", np.uint8)
    gathered = tables.gather(data, np.array([7, 0, 3]), np.array([3, 0, 1], np.int32))
    assert gathered.tobytes() == b"789\n\n3\n"
