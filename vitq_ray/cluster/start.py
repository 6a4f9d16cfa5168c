"""The one place that starts Ray, or joins a cluster: budgets, dashboard, safe defaults, a clean end.

A fresh local Ray has token authentication (Ray's default), its dashboard on loopback only, and no usage statistics.
Ray's metrics port and its own ports listen on all interfaces, and no option changes that (README).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line

DASHBOARD_HOST = "127.0.0.1"
_MEGABYTE = 1_000_000
_SMALLEST_STORE = 300 * _MEGABYTE

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",  # on a busy machine, processes take long to import PyTorch
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials.jsonl is the record, not Tune's CSV and JSON files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is handled once, in commands/main
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 lets whatever else runs on the machine go first
    # glibc's malloc in the processes of a Ray that is started here: keep some freed memory, since fresh pages for every
    # image or activation cost time.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Cluster:
    """A running Ray.

    Attributes:
        dashboard_url: None where there is none.
        cpus: CPUs of all nodes together.
    """

    dashboard_url: str | None
    cpus: float


@contextmanager
def cluster(
    address: str | None = None,
    num_cpus: int | None = None,
    object_store_bytes: int | None = None,
    dashboard: bool = True,
) -> Iterator[Cluster]:
    """Start a local Ray, or join the cluster at `address`, for as long as the context lasts.

    Args:
        address: `host:port`, `ray://host:port`, or `auto` for the cluster this machine belongs to; None starts one.
        num_cpus: CPUs of the local Ray; default: what this process may use.
        object_store_bytes: its shared memory; default: Ray's choice.
        dashboard: serve the dashboard on loopback.

    Raises:
        InputError: where the cluster cannot be reached. A Ray that was running before stays untouched.
    """
    with environment({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}):
        if ray.is_initialized():  # a caller (a test, a notebook) owns it
            yield _describe()
            return
        try:
            _init(address, num_cpus, object_store_bytes, dashboard)
            _quiet()
            yield _describe()
        finally:
            ray.shutdown()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of this process, for as long as the context lasts; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _init(address: str | None, num_cpus: int | None, object_store_bytes: int | None, dashboard: bool) -> None:
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": False}
    try:
        if address is not None:
            ray.init(address=address, **common)
            return
        ray.init(
            address="local",
            num_cpus=num_cpus or available_cpus(),
            object_store_memory=object_store_bytes and max(object_store_bytes, _SMALLEST_STORE),
            include_dashboard=dashboard,
            dashboard_host=DASHBOARD_HOST,
            **common,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "a local Ray" if address is None else f"the Ray cluster at {address}"
        raise InputError(f"{where}: cannot be started or reached: {one_line(error)}") from None


def _quiet() -> None:
    """What Ray says about its own doing is not what a user of a search wants to read."""
    for name in ("ray.data", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _describe() -> Cluster:
    url = ray._private.worker.get_dashboard_url()
    return Cluster(f"http://{url}" if url else None, ray.cluster_resources().get("CPU", 0.0))


def available_cpus() -> int:
    """CPUs that this process may run on, which a container or taskset can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
