"""Whether a Ray cluster answers at an address: one line within ten seconds where none does.

Asked before model and images are opened; this file imports neither Ray nor PyTorch, so that a command can ask before it
has loaded them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line

_PATIENCE_S = 8.0  # for a cluster to answer, from the moment that its port is asked for
_CONNECT_S = 3.0  # for its port to be there at all
_KNOWN_S = 60.0  # that an answer counts

_answered: dict[tuple[str, str], float] = {}  # (address, what it stood for): when


def require_cluster(address: str | None) -> None:
    """InputError where no Ray answers at `host:port` or `auto`; None is a Ray that is started here.

    One that answered within the last minute is not asked again.
    """
    if address is None:
        return
    named = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    began = time.monotonic()
    if began - _answered.get((address, named), -_KNOWN_S) < _KNOWN_S:
        return
    what = f"the Ray cluster at {address}" + (f" (RAY_ADDRESS {named})" if named != address else "")
    if "://" in named:
        raise InputError(f"{what}: not an address of a cluster; expected host:port of its head node, or auto")
    _require_port(what, named)
    _require_answer(what, address, _PATIENCE_S - (time.monotonic() - began))
    _answered[address, named] = time.monotonic()


def _require_port(what: str, named: str) -> None:
    """InputError where nobody listens at host:port, for which Ray would wait.

    A thread asks: neither the name service nor several addresses of one name make this take longer, and signals are
    heard.
    """
    host, _, port = named.rpartition(":")
    if not port.isdecimal():  # auto, and nothing named
        return
    outcome: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
            outcome.append("")
        except (OSError, OverflowError, ValueError) as error:  # ValueError: no name of a host
            outcome.append(one_line(error)[:300])

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_S)
    reason = outcome[0] if outcome else f"nothing within {_CONNECT_S:g} s"
    if reason:
        raise InputError(f"{what}: no Ray answers there ({reason}); expected a running one")


def _require_answer(what: str, address: str, patience_s: float) -> None:
    """Another process tries: nothing interrupts Ray while it waits for a cluster."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_JOB_CONFIG_JSON_ENV_VAR"}  # not the job
    code = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)"
    command = [sys.executable, "-c", code, address]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=patience_s, env=own)
    except subprocess.TimeoutExpired:
        raise InputError(f"{what}: no Ray answers there within {_PATIENCE_S:g} s; expected a running one") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if "AuthenticationError" in last:
            last = "its token is missing or another one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        raise InputError(f"{what}: cannot be reached: {one_line(last)[:300]}") from None
