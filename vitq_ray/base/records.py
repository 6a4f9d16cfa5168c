"""Files of our own, read as carefully as those of others: sealed by a checksum, and checked against a schema.

    write_sealed(path, "result", values)  ──►  {…, "checksum": sha256 of all the rest}
    read_sealed(path, "result", schema)   ──►  values, or one line: which file, what is wrong, what to do

A schema says what must be there: {key: its type, several types, `[int]` for a list of them, or a schema}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line, write_json
from vitq_ray.base.formats import require_format

T = TypeVar("T")
Schema = Mapping[str, Any]
NUMBER = (int, float)

_CHECKSUM = "checksum"
_SEALED_SINCE = 3  # format 1 and 2 of these kinds have no checksum
REMEDIES = {
    "run": "bring it back from a copy, or begin a new run",
    "result": "delete it and resume the run, which makes it again",
    "statistics": "delete it and resume the run, which collects them again",
    "look": "delete it and resume the run, which looks again",
    "training state": "delete it and resume the run, which trains from the start",
    "best weights": "delete it and state.pt, and resume the run, which trains from the start",
    "judgement": "delete it and resume the run, which judges again",
    "teacher's logits": "delete it and resume the run, which computes them again",
}


def own_error(path: Path | str, kind: str, problem: object) -> InputError:
    """One line for a file of our own that is not as it was written: what is wrong, and what to do."""
    return InputError(f"{path}: {one_line(problem)}; {REMEDIES[kind]}")


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """As `write_json`, with a checksum of everything that `values` say."""
    plain = json.loads(json.dumps(dict(values), allow_nan=False))
    write_json(path, {**plain, _CHECKSUM: _checksum(plain)})


def read_sealed(path: Path, kind: str, schema: Schema) -> dict[str, Any]:
    """What `write_sealed` wrote, or an earlier version without a checksum, with its `format`.

    Args:
        kind: of `FORMATS` and `REMEDIES`.
        schema: what must be there.

    Raises:
        InputError: for a file that is absent, damaged, changed, of a newer version, or lacks what it must have.
    """
    values = checked(path, kind, lambda: json.loads(path.read_bytes()))
    if not isinstance(values, dict):
        raise own_error(path, kind, f"expected a JSON object, found {type(values).__name__}")
    found = require_format(kind, str(path), values)
    checksum = values.pop(_CHECKSUM, None)
    if checksum != _checksum(values) and (checksum is not None or found >= _SEALED_SINCE):
        raise own_error(path, kind, "was changed or damaged: its checksum does not fit")
    require_whole(path, kind, values, schema)
    return {**values, "format": found}


def require_whole(path: Path, kind: str, values: Mapping[str, Any], schema: Schema) -> None:
    """InputError where `values` of the file lack what the schema asks for."""
    if problem := problem_with(values, schema):
        raise own_error(path, kind, problem)


def checked(path: Path, kind: str, read: Callable[[], T]) -> T:
    """What `read` returns; whatever goes wrong in it becomes an InputError that names the file and what to do.

    Damaged bytes make zipfile, NumPy and PyTorch raise nearly anything.
    """
    try:
        return read()
    except InputError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise own_error(path, kind, error) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from None
    except MemoryError:
        raise own_error(path, kind, "truncated or damaged (asks for more memory than there is)") from None
    except Exception as error:
        raise own_error(path, kind, f"truncated or damaged ({one_line(error)[:200]})") from None


def problem_with(values: Mapping[str, Any], schema: Schema, inside: str = "") -> str | None:
    """What a schema asks for and `values` lack; None where nothing is wrong."""
    for key, wanted in schema.items():
        name, value = f"{inside}{key}", values.get(key)
        if key not in values:
            return f"{name} is missing"
        if isinstance(wanted, Mapping) and isinstance(value, Mapping):
            if problem := problem_with(value, wanted, f"{name}."):
                return problem
        elif not _fits(value, wanted):
            return f"{name} is {_short(value)}, expected {_described(wanted)}"
    return None


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return False  # those that fit are looked into
    if isinstance(wanted, list):
        return isinstance(value, list) and all(_fits(item, wanted[0]) for item in value)
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _described(wanted: Any) -> str:
    if isinstance(wanted, Mapping):
        return "an object"
    if isinstance(wanted, list):
        return f"a list of {_described(wanted[0])}"
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", float: "a number", int: "an integer"}
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    return " or ".join(names[kind] for kind in kinds if not (kind is int and float in kinds))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
