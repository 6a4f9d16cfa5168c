"""Whether a Ray cluster answers at an address: one line within ten seconds where none does.

Asked before model and images are opened; this file imports neither Ray nor PyTorch, so that a command can ask before it
has loaded them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from functools import cache

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line

_PATIENCE_S = 8.0  # for a cluster to answer, from the moment that its port is asked for
_CONNECT_S = 3.0  # for its port to be there at all


def require_cluster(address: str | None) -> None:
    """InputError where no Ray answers at `host:port` or `auto`; None is a Ray that is started here.

    One that has answered is not asked again by this process.
    """
    if address is not None:
        _require_answer(address, named_by(address))


def require_port(address: str) -> None:
    """InputError where nobody listens at host:port, for which Ray would wait."""
    _require_port(address, named_by(address), _CONNECT_S)


def named_by(address: str) -> str:
    """What `auto` stands for: RAY_ADDRESS, if it is set; else it stays `auto`, this machine's Ray."""
    return os.environ.get("RAY_ADDRESS") or address if address == "auto" else address


@cache
def _require_answer(address: str, named: str) -> None:
    """Another process tries: nothing interrupts Ray while it waits for a cluster."""
    what, end = _cluster(address, named), time.monotonic() + _PATIENCE_S
    if "://" in named:
        raise InputError(f"{what}: not an address of a cluster; expected host:port of its head node, or auto")
    _require_port(address, named, min(_CONNECT_S, _PATIENCE_S))
    own = {name: value for name, value in os.environ.items() if name != "RAY_JOB_CONFIG_JSON_ENV_VAR"}  # not the job
    code = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)"
    command, left = [sys.executable, "-c", code, address], end - time.monotonic()
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=left, env=own)
    except subprocess.TimeoutExpired:
        raise InputError(f"{what}: no Ray answers there within {_PATIENCE_S:g} s; expected a running one") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if "AuthenticationError" in last:
            last = "its token is missing or another one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        raise InputError(f"{what}: cannot be reached: {one_line(last)[:300]}") from None


def _require_port(address: str, named: str, patience_s: float) -> None:
    host, _, port = named.rpartition(":")
    if not port.isdecimal():  # auto, and nothing named
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=patience_s).close()
    except (OSError, OverflowError) as error:
        reason = one_line(error)[:300]
        raise InputError(
            f"{_cluster(address, named)}: no Ray answers there ({reason}); expected a running one"
        ) from None


def _cluster(address: str, named: str) -> str:
    return f"the Ray cluster at {address}" + (f" (RAY_ADDRESS {named})" if named != address else "")
