"""Reading from local paths and URIs alike, and writing so that a killed run never leaves half a file."""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pyarrow import fs

from vitq_ray.base.config import InputError
from vitq_ray.base.memory import machine_memory, size_text
from vitq_ray.base.uris import without_keys

T = TypeVar("T")
_PAUSES_S = (0.5, 1, 2, 4, 8, 16, 30)
_PASSING = (
    "NETWORK_CONNECTION",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "SLOW_DOWN",
    "THROTTLING",
    "REQUEST_TIMEOUT",
)


def resolve(path: str) -> tuple[fs.FileSystem, str]:
    """File system and path within it of a local path or a URI such as `s3://bucket/key`."""
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).absolute())
    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(path)
        return found
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable URI: {one_line(error)}") from None


def passing(error: OSError) -> bool:
    """An error of a server that may answer again, as pyarrow words it; not of a file that is missing or forbidden."""
    return any(words in str(error) for words in _PASSING)


def patiently(path: str, read: Callable[[], T]) -> T:
    """What `read` reads from `path`: again for about a minute where that is a URI whose server does not answer."""
    for pause in _PAUSES_S if "://" in path else ():
        try:
            return read()
        except OSError as error:
            if not passing(error):
                raise
            time.sleep(pause)
    return read()


def read_bytes(path: str, what: str, most: int | None = None) -> bytes:
    """The whole file. Raises InputError, naming `what` the file was wanted for, where it cannot be read, or has more
    than `most` bytes (by default: than there is memory)."""
    most = machine_memory() if most is None else most
    filesystem, inner = resolve(path)
    try:
        info = filesystem.get_file_info(inner)
        if info.type == fs.FileType.NotFound:
            raise InputError(f"{path}: no such file; expected {what}")
        if info.type == fs.FileType.Directory:
            raise InputError(f"{path}: is a folder; expected {what}")
        if info.size is not None and info.size > most:
            raise InputError(
                f"{path}: has {size_text(info.size)}, at most {size_text(most)} can be read; expected {what}"
            )
        with filesystem.open_input_stream(inner) as stream:
            data: bytes = stream.read()
            return data
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from None


def exists(path: str) -> bool:
    """Whether this is a file. InputError where that cannot be known."""
    filesystem, inner = resolve(path)
    try:
        return bool(filesystem.get_file_info(inner).type == fs.FileType.File)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from None


def real_path(path: str) -> Path:
    """Absolute, links followed; a loop of links is left as it is, where `Path.resolve` raises RuntimeError."""
    return Path(os.path.realpath(path))


def output_folder(path: str, option: str) -> Path:
    """Make a folder that results will be written to. InputError, naming the option, where that cannot be done."""
    if "://" in path:
        raise InputError(f"{option}: {path} is a URI; expected a folder on a local or shared file system")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option}: {path}: {error.strerror}; expected a folder that can be written to") from None
    return folder


def output_file(path: str, option: str) -> Path:
    """As `output_folder`, for the folder of a file that will be written."""
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{option}: {path} is a folder; expected the name of a file")
    output_folder(str(file.parent) if "://" not in path else path, option)
    return file


def one_line(error: object) -> str:
    """An error's message without line breaks and keys of URIs; other control characters are spelled out."""
    text = " ".join(without_keys(str(error)).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str, most: int = 600) -> str:
    """A text that can be read at one look: of a longer one, the middle is left out."""
    head = most * 2 // 3
    return text if len(text) <= most else f"{text[:head]} … {text[len(text) - (most - head) :]}"


class _Raw(io.FileIO):
    """Remembers why it could not be written: PyTorch and Arrow raise errors of their own in its place."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


_TEMPORARY = ".vitq.tmp"
_SECONDS_OF_A_DAY = 86_400


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary file beside `path`, renamed to it once complete and synced to disk.

    What killed processes left beside it is removed. OSError, naming `path`, where it cannot be written, such as on a
    full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporary(path.parent)
    handle, temporary = _temporary_file(path)
    raw = _Raw(handle, "wb")
    try:
        with io.BufferedWriter(raw) as stream:
            yield stream
            stream.flush()
            os.fsync(raw.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)  # still locked
    except BaseException as error:
        with suppress(OSError):
            raw.close()
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if raw.error is not None:
            raise OSError(raw.error.errno, raw.error.strerror, str(path)) from None
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def _temporary_file(path: Path) -> tuple[int, str]:
    """(handle, name) of a new file beside `path`. Its lock goes with this process, however that ends."""
    while True:
        handle, name = tempfile.mkstemp(f".{_host()}{_TEMPORARY}", f".{path.name[:40]}.", path.parent)
        if _locked(handle) is not False and os.path.exists(name):
            return handle, name
        with suppress(FileNotFoundError):  # another process found it not locked yet, and removes it
            os.unlink(name)
        os.close(handle)


def _locked(handle: int) -> bool | None:
    """Whether this process holds the lock of the file now; None on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _host() -> str:
    return socket.gethostname().replace("/", "_")  # at most 64 bytes; what tells hosts apart is at its end


def remove_temporary(folder: Path, is_own: bool = False) -> None:
    """Remove what `atomic_file` left in a folder where its process was killed; never what one is writing.

    A lock may be seen on its own host only. So files of other hosts go a day after their last change; in a folder
    that `is_own`, where no other host writes, at once.
    """
    for path in folder.glob(f".*{_TEMPORARY}"):
        with suppress(OSError):  # such as gone meanwhile
            handle = os.open(path, os.O_RDWR)
            try:
                locked, age = _locked(handle), time.time() - os.fstat(handle).st_mtime
                of_this_host = locked and path.name.endswith(f".{_host()}{_TEMPORARY}")
                if locked is not False and (is_own or of_this_host or age > _SECONDS_OF_A_DAY):
                    path.unlink()
            finally:
                os.close(handle)


def append_whole(path: Path, data: bytes, sync: bool = True) -> None:
    """Append all of `data` or nothing of it; with `sync` it is on disk when this returns.

    OSError, naming `path`, where it cannot be written.
    """
    with open(path, "ab", buffering=0) as stream:
        end = stream.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[stream.write(rest) :]
            if sync:
                os.fsync(stream.fileno())
        except BaseException as error:
            os.truncate(path, end)
            if isinstance(error, OSError):
                error.filename = str(path)
            raise


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    with atomic_file(path) as stream:
        stream.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
