"""How much memory there is, so that what cannot fit is refused before it is tried."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup v2, v1


def machine_memory() -> int:
    """Bytes that this machine has, or its container if it is given less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # no such group, or "max"
            memory = min(memory, int(Path(path).read_text()))
    return memory


def size_text(size: float) -> str:
    """E.g. `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.4g} {unit}"
