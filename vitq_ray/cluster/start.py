"""The one place that starts Ray, or joins a cluster: budgets, dashboard, safe defaults, a clean end.

A fresh local Ray has token authentication (Ray's default), listens on loopback only, and sends no usage statistics.
Streams that are still open are closed before it ends: Ray Data would touch Ray later, which starts another one.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import ray
from ray._private import ray_constants

from vitq_ray.base.config import InputError
from vitq_ray.base.cpus import available_cpus
from vitq_ray.base.files import one_line
from vitq_ray.cluster.address import require_cluster

DASHBOARD_HOST = "127.0.0.1"
_MEGABYTE = 1_000_000
_SMALLEST_STORE = 300 * _MEGABYTE
_MOST_PATH_BYTES = 107  # of a Unix socket
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"  # below Ray's temporary folder

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab
    # Workers wait so long for CPUs and GPUs, not for processes to start. Then a range of workers is counted again: of a
    # node that is lost, Ray Train hears after up to 20 s. qat_group says how often.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
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

_streams: WeakSet[Generator[Any, None, None]] = WeakSet()


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
        address: `host:port`, or `auto` for the cluster this machine belongs to; None starts one.
        num_cpus: CPUs of the local Ray; default: what this process may use.
        object_store_bytes: its shared memory; default: Ray's choice.
        dashboard: serve the dashboard on loopback.

    Raises:
        InputError: where the cluster cannot be reached. A Ray that was running before stays untouched.
    """
    with environment({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}):
        if ray.is_initialized():  # a caller (a test, a notebook) owns it
            try:
                yield _describe()
            finally:
                _close_streams()
            return
        try:
            with _own_sigterm():
                if address is None:
                    _start(num_cpus, object_store_bytes, dashboard)
                else:
                    _join(address)
            _quiet()
            yield _describe()
        finally:
            _close_streams()
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


def closed_with_ray(stream: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """A stream that reads through Ray, to be closed before Ray ends, whatever still holds it, as a traceback does."""
    _streams.add(stream)
    return stream


def _close_streams() -> None:
    for stream in list(_streams):
        with suppress(Exception):  # of a cluster that is gone; or it runs in a thread that Ray's end stops
            stream.close()


# Starting and joining -----------------------------------------------------------------------------------------------

_COMMON: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": False}


def _start(num_cpus: int | None, object_store_bytes: int | None, dashboard: bool) -> None:
    with environment(_own_token(dashboard)), _on_loopback(), _later_hangup():
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus or available_cpus(),
                object_store_memory=object_store_bytes and max(object_store_bytes, _SMALLEST_STORE),
                include_dashboard=dashboard,
                dashboard_host=DASHBOARD_HOST,
                **_COMMON,
            )
        except Exception as error:  # no class of its own where Ray was not up after half a minute
            _require_short_folder()
            raise InputError(f"a local Ray: cannot be started: {one_line(error)}") from None


def _join(address: str) -> None:
    require_cluster(address)
    try:
        ray.init(address=address, **_COMMON)
    except Exception as error:
        raise InputError(f"the Ray cluster at {address}: cannot be reached: {one_line(error)}") from None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started here listen on loopback only, as on Windows and macOS, where this is the default."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    if name in os.environ:  # the user says whether other machines may connect
        yield
        return
    with environment({name: "0"}):  # for Ray's processes; this one has read it already
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


def _own_token(dashboard: bool) -> dict[str, str]:
    """A token of our own where Ray could not keep one in the user's home."""
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return {}
    try:
        file = Path.home() / ".ray" / "auth_token"
        if os.access(file, os.R_OK):
            return {}
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            return {}
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        if dashboard:
            reason = f"~/.ray cannot keep the token of Ray ({one_line(error)})"
            logging.getLogger("vitq_ray").warning(f"{reason}: set RAY_AUTH_TOKEN to a secret to use the dashboard")
        return {"RAY_AUTH_TOKEN": _token()}


@cache
def _token() -> str:
    """One for the process: Ray reads it once."""
    return secrets.token_hex(32)


def _require_short_folder() -> None:
    """InputError where the paths of Ray's sockets would be too long."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    most = _MOST_PATH_BYTES - len(_SOCKET)
    if name is not None and (size := len(os.fsencode(os.environ[name]))) > most:
        raise InputError(
            f"{name}: {os.environ[name]} has {size} bytes, and Ray's sockets below it need a path of at most {most}; "
            "set RAY_TMPDIR to a shorter folder, such as /tmp"
        )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What this program does on SIGTERM stays what it does; Ray has a handler of its own, which dumps addresses."""
    ours = signal.getsignal(signal.SIGTERM)
    if not callable(ours) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:  # Ray's handler, while it started
        ours(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)


@contextmanager
def _later_hangup() -> Iterator[None]:
    """SIGHUP waits until the context ends, and processes that are started meanwhile never hear it.

    A closed terminal sends it to Ray's processes, too; without them this one could not end Ray in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quiet() -> None:
    """What Ray says about its own doing is not what a user of a search wants to read."""
    for name in ("ray.data", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _describe() -> Cluster:
    url = ray._private.worker.get_dashboard_url()
    return Cluster(f"http://{url}" if url else None, ray.cluster_resources().get("CPU", 0.0))
