"""URIs may hold keys (`s3://KEY:SECRET@bucket/data`). They are used, and neither stored nor printed."""

from __future__ import annotations

import re

_URI = re.compile(r"\b(?!file:)([A-Za-z][A-Za-z0-9+.-]*)(:/+)([^\s'\"]*)")
_SECRET_OPTION = re.compile(
    r"([?&][^=&?]*(?:key|secret|token|passw|pwd|credential|sig|sas)[^=&?]*=)[^&]*", re.IGNORECASE
)
_PORT = re.compile(r"[^:]*(:\d*)?|\[[^]]*\](:\d*)?")


def without_keys(text: str) -> str:
    """A text, such as a path or a message, whose URIs have lost their keys and passwords."""
    return _URI.sub(lambda match: match[1] + match[2] + _without_keys(match[1], match[3]), text)


def _without_keys(scheme: str, rest: str) -> str:
    host = rest.partition("/")[0]
    # A password may hold slashes that should have been escaped; `host:9000/…` holds none.
    user, at, place = rest.partition("@") if "@" not in host and not _PORT.fullmatch(host) else _split_last(rest, host)
    if at and ":" in user:
        container = user.partition(":")[0] if scheme.startswith("abfs") else ""  # Azure: CONTAINER:KEY@account
        rest = f"{container}@{place}" if container else place
    return _SECRET_OPTION.sub(r"\1…", rest)


def _split_last(rest: str, host: str) -> tuple[str, str, str]:
    user, at, name = host.rpartition("@")
    return user, at, name + rest[len(host) :]
