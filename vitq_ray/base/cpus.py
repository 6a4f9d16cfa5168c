"""The CPUs that this process may use: the one place that counts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """CPUs of the affinity mask, or of the quota of a container where that is less; at least 1.

    A container with a quota (`docker --cpus=2`, a Kubernetes limit) still sees all CPUs of its host in the mask.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([mask, *_quotas()])))


def _quotas() -> Iterator[float]:
    """CPUs that this process' control groups and those above them allow, where they limit any: versions 1 and 2."""
    for folder in dict.fromkeys(_groups()):
        values = _numbers(folder / "cpu.max")
        if not values:
            values = [*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")]
        if len(values) == 2 and values[0] > 0 and values[1] > 0:
            yield values[0] / values[1]


def _groups() -> Iterator[Path]:
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    for line in ("0::/", "0:cpu:/", *lines):  # a container often sees its own group as the root
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "cpu") or "cpu" in controllers.split(","):
            root = GROUPS / "cpu" if controllers else GROUPS
            group = root / path.lstrip("/")
            yield from (group, *(parent for parent in group.parents if parent.is_relative_to(root)))


def _numbers(file: Path) -> list[float]:
    """The numbers in a file; none where it is missing or says `max`."""
    try:
        return [float(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []
