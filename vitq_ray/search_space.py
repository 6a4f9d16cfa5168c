"""A search space: a Python file that defines `SPACE`, what to try for each field of a setting.

    SPACE = {
        "mode": ("ft1", "ft2"),
        "calibrator": ("max", "mse", "entropy", "percentile"),
        "percentile": percentiles(99, 99.9999, 5),      # for the percentile calibrator
        "num_batches": (2, 8, 32),
    }

Fields that the file leaves out have the values of the command line. Its docstring gives the command, the cost and the
result that was measured with it.
"""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitq_ray.config import InputError, QuantSetting

FIELDS = ("mode", "calibrator", "percentile", "num_batches", "weight_bits", "act_bits")


def percentiles(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` percentiles whose distances from 100 are spread evenly on a log scale, from `low` to `high`."""
    if not (0 <= low < high < 100 and count >= 2):
        raise InputError(f"percentiles: expected 0 <= low < high < 100 and count >= 2, got {low}, {high}, {count}")
    ratio = ((100 - high) / (100 - low)) ** (1 / (count - 1))
    return tuple(round(100 - (100 - low) * ratio**i, 10) for i in range(count))


@dataclass(frozen=True)
class SearchSpace:
    """What to try: {field of QuantSetting: values}."""

    name: str
    choices: Mapping[str, tuple[Any, ...]]

    def grid(self, defaults: QuantSetting) -> list[QuantSetting]:
        """Every distinct setting, in the order of the file; `defaults` fill the fields that it leaves out."""
        values = [self.choices.get(field, (getattr(defaults, field),)) for field in FIELDS]
        rows = (dict(zip(FIELDS, row, strict=True)) for row in itertools.product(*values))
        return list(dict.fromkeys(_setting(row) for row in rows))


def _setting(row: dict[str, Any]) -> QuantSetting:
    """Only the percentile calibrator has a percentile; the others collapse to one setting."""
    if row["calibrator"] != "percentile":
        row = row | {"percentile": None}
    return QuantSetting.from_dict(row)


def load_space(path: str) -> SearchSpace:
    """Run a search space file. InputError, naming the file, for whatever is wrong with it."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected a search space (a Python file that defines SPACE)")
    try:
        space = runpy.run_path(path).get("SPACE")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path}: {_place(error, path)}{type(error).__name__}: {error}") from error
    return space_of(space, path)


def space_of(space: Any, path: str) -> SearchSpace:
    """Check what a file defines as SPACE."""
    if not isinstance(space, Mapping):
        raise InputError(f"{path}: SPACE is {type(space).__name__}, expected a dictionary of field: values")
    for field, values in space.items():
        if field not in FIELDS:
            raise InputError(f"{path}: SPACE has the key {field!r}; the keys are {', '.join(FIELDS)}")
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
            raise InputError(f"{path}: SPACE[{field!r}] is {values!r}, expected a list of values")
    checked = SearchSpace(Path(path).stem, {field: tuple(values) for field, values in space.items()})
    try:
        checked.grid(QuantSetting())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return checked


def _place(error: Exception, path: str) -> str:
    """`line N: ` of the user's file, where the error happened there."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    trace, line = error.__traceback__, None
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == path else line
        trace = trace.tb_next
    return "" if line is None else f"line {line}: "
