"""What surrounds a command, in one place: its output, the signals it gets, and how it says what it ended with.

signal            ──► as Ctrl-C, so that state is kept and Ray ends; exit code 128 + its number
output            ──► what cannot be encoded is replaced; what cannot be written is dropped, and said once
error of a system ──► one line
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO, cast

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line, shortened

_CANNOT_WRITE = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "file larger than the limit on files (ulimit -f, or the file system's)",
    errno.EROFS: "the file system has become read-only",
    errno.EIO: "the disk fails (input/output error)",
}


def exit_code(work: Callable[[], None]) -> int:
    """Do it, and translate how it ended: 0 done, 2 bad input, 1 anything else, 128 + a signal."""
    with _guarded_output() as output, _signals_as_ctrl_c() as stop:
        code = _ended(work, stop)
        with suppress(KeyboardInterrupt):
            output.flush()
        if output.error is not None and output.error.errno != errno.EPIPE and code == 0:  # EPIPE: `| head` has enough
            return _fail(1, f"standard output: {output.error.strerror}; what was printed is not complete")
        return code


def _ended(work: Callable[[], None], stop: _Stop) -> int:
    try:
        work()
    except InputError as error:
        return _fail(2, error)
    except SystemExit as end:  # argparse, after --help
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        if stop.signal is None:
            return _fail(130, "interrupted")
        return _fail(128 + stop.signal, f"stopped by {signal.Signals(stop.signal).name}")
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            where = "" if error.filename is None else f"{error.filename}: "
            return _fail(1, f"{where}{_CANNOT_WRITE[error.errno]}; nothing was left half written")
        return _fail(1, _said(error))
    except MemoryError:
        return _fail(1, "out of memory")
    except Exception as error:
        if type(error).__name__ in ("DivergedError", "OutOfMemoryError"):  # of qat/loop, of PyTorch or Ray
            return _fail(1, error)
        raise
    return 0


def _said(error: OSError) -> str:
    """What the system says, and of which file."""
    if error.strerror is None:
        return one_line(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _fail(code: int, message: object) -> int:
    print(f"error: {shortened(one_line(message))}", file=sys.stderr)
    return code


# Signals ------------------------------------------------------------------------------------------------------------


@dataclass
class _Stop:
    """Which signal interrupted the command, if any did."""

    signal: int | None = None


@contextmanager
def _signals_as_ctrl_c() -> Iterator[_Stop]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, once: what a batch system or a closed terminal sends."""
    stop = _Stop()

    def interrupt(number: int, frame: Any) -> None:
        if stop.signal is None:  # another one would interrupt the end of Ray
            stop.signal = number
            raise KeyboardInterrupt

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


# Output -------------------------------------------------------------------------------------------------------------


class _Nowhere(io.TextIOBase):
    """In place of a closed stream."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)


class _Output:
    """A stream that takes every text. The first error of writing is kept, and what follows goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        self.error = self.error or error
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())  # also for Python's own flush at the end


@contextmanager
def _guarded_output() -> Iterator[_Output]:
    """Standard output and error that cannot end a run; yields the output."""
    before = sys.stdout, sys.stderr
    streams = [_Output(_writable(stream)) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield streams[0]
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def _writable(stream: TextIO | None) -> TextIO:
    """The stream, which replaces what it cannot encode; a closed one goes nowhere."""
    if stream is None:  # as after `>&-`
        return cast(TextIO, _Nowhere())
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")
    return stream
