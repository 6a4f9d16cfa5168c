"""Format numbers of the files that a later version reads, and the one rule for them.

Older formats load; a newer one is refused with a line that says which version wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitq_ray import __version__
from vitq_ray.base.config import InputError

FORMATS: dict[str, int] = {
    "run": 5,  # run.json
    "result": 4,  # result.json
    "log": 4,  # trials.jsonl, in its first line
    "statistics": 3,  # statistics.npz
    "look": 1,  # look-<n>.npz
    "sidecar": 3,  # <name>_calib.json, <name>_qat.json
    "training state": 2,  # state.pt
    "judgement": 3,  # judgement.json
    "sites": 1,  # sites.npz
    "images": 1,  # images.parquet
    "scales": 1,  # scales.json
    "steps": 2,  # steps.jsonl and epochs.jsonl, in their first line
}


def stamp(kind: str) -> dict[str, Any]:
    """What a file of this kind says of itself: its format and the version that writes it."""
    return {"format": FORMATS[kind], "vitq_ray": __version__}


def require_format(kind: str, where: str, values: Mapping[str, Any]) -> int:
    """The format of a file of this kind, from what it says of itself; files of format 1 may say nothing.

    Args:
        kind: a key of `FORMATS`.
        where: name of the file, for messages.
        values: the file's `format`, and for the message `vitq_ray` or `versions`, which name the version that wrote it.

    Raises:
        InputError: where the format is newer than this version knows, or no number at all.
    """
    found = values.get("format", 1)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(f"{where}: format {found!r}, expected a number from 1 to {FORMATS[kind]}")
    if found > FORMATS[kind]:
        raise InputError(
            f"{where}: written by vitq_ray {_writer(values)} in format {found}; "
            f"this version reads formats up to {FORMATS[kind]}"
        )
    return found


def _writer(values: Mapping[str, Any]) -> str:
    versions = values.get("versions")
    named = versions.get("vitq_ray") if isinstance(versions, Mapping) else None
    return str(values.get("vitq_ray") or named or "of an unknown version")
