"""One process at a time works in the folder of a run: the file `.lock` says which.

The kernel's lock on the file (`flock`) goes with its process, however that ends. Where a file system has no such locks,
or keeps them to one host, what the file says decides: process id, when that process started, its host, and as the time
of its last change the last sign of life. An owner on this host whose process is gone, and one on another host that has
given no sign of life for a minute, hold nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitq_ray.base.config import InputError

LOCK = ".lock"
SECONDS_BETWEEN_SIGNS = 10.0
SECONDS_WITHOUT_SIGN = 60.0


class Lock:
    """Held from its making until `release`, or until it is dropped.

    Raises InputError, naming the owner, where another one holds it; OSError where the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        handle = _open_locked(path)
        try:
            if (owner := _owner(path)) is not None and not _is_gone(owner, path):
                raise _in_use(folder, owner)
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps(_me()).encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        over = threading.Event()
        threading.Thread(target=_give_signs, args=(handle, over), daemon=True, name="run lock").start()
        self.release = weakref.finalize(self, _release, path, handle, over)


def _open_locked(path: Path) -> int:
    """The file, opened and locked; it may have been removed by its last owner meanwhile, which then is looked for."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise _in_use(path.parent, _owner(path)) from None
        except OSError:
            return handle  # a file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "started": _started(pid), "host": socket.gethostname(), "since": time.strftime("%F %T")}


def _owner(path: Path) -> dict[str, Any] | None:
    """What the file says; None where it says nothing, as after a kill between making it and writing it."""
    with suppress(OSError, ValueError):
        values = json.loads(path.read_bytes())
        if isinstance(values, dict) and isinstance(values.get("pid"), int):
            return values
    return None


def _is_gone(owner: dict[str, Any], path: Path) -> bool:
    if owner.get("host") == socket.gethostname():
        return _started(owner["pid"]) != owner.get("started")
    with tempfile.TemporaryFile(dir=path.parent) as now:  # by the file system's clock
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime > SECONDS_WITHOUT_SIGN


def _started(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since its boot; None where there is no such process."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _in_use(folder: Path, owner: dict[str, Any] | None) -> InputError:
    who = "another process"
    if owner is not None:
        who = f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}"
    return InputError(f"{folder}: is in use by {who}; wait for it, or stop it")


def _give_signs(handle: int, over: threading.Event) -> None:
    while not over.wait(SECONDS_BETWEEN_SIGNS):
        with suppress(OSError):
            os.utime(handle)


def _release(path: Path, handle: int, over: threading.Event) -> None:
    over.set()
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        os.close(handle)
