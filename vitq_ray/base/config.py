"""Settings as values: frozen dataclasses, validated once where they are built, strict `from_dict`.

Also the one exception that means "the user's input is wrong": `InputError`. Scripts turn it into one line on
stderr and exit code 2; every message names the thing, the value found and what was expected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

MODES = ("ft1", "ft2", "ft3", "trt")
CALIBRATORS = ("max", "percentile", "mse", "entropy")
WEIGHT_CALIBRATORS = ("max", "mse")
CALIBRATED_FAMILIES = ("attention_probabilities", "gelu_output", "gemm_outputs")  # may have a calibrator of their own
MIN_BITS, MAX_BITS = 2, 8

T = TypeVar("T", bound="Config")


class InputError(ValueError):
    """Bad input or options: the message is one line for the user (exit code 2, no traceback)."""


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise `InputError` unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise InputError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise `InputError` unless `value` is an integer in [low, high]."""
    wanted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < low or (high is not None and value > high):
        raise InputError(f"{name}: expected {wanted}, got {value!r}")


class Config:
    """Base of the frozen dataclasses: `to_dict`, and a `from_dict` that refuses unknown and missing keys."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any], complete: bool = False) -> T:
        """Build from a dictionary; with `complete`, as read from a file, no field may be left to its default."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise InputError(f"{cls.__name__}: unknown key {unknown[0]!r}; the keys are {', '.join(fields)}")
        has_default = {
            n
            for n, f in fields.items()
            if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        }
        missing = sorted(set(fields) - (set() if complete else has_default) - set(values))
        if missing:
            raise InputError(f"{cls.__name__}: missing key {missing[0]!r}")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class QuantSetting(Config):
    """One candidate: everything that turns calibration statistics into scales.

    `percentile` is in [0, 100] and is only meaningful for the percentile calibrator; for the others it must be
    None, so that two equal settings are always equal values. `num_batches` counts calibration batches.

    `attention_probabilities`, `gelu_output` and `gemm_outputs` give those tensors a calibrator of their own, written
    as in `parse_calibrator`; None is that of the others. `weights` is `max`, or `mse`: the amax with the least squared
    error.
    """

    mode: str = "ft2"
    calibrator: str = "percentile"
    percentile: float | None = 99.99
    num_batches: int = 10
    weight_bits: int = 8
    act_bits: int = 8
    attention_probabilities: str | None = None
    gelu_output: str | None = None
    gemm_outputs: str | None = None
    weights: str = "max"

    def __post_init__(self) -> None:
        require_choice("quant mode", self.mode, MODES)
        require_choice("calibrator", self.calibrator, CALIBRATORS)
        require_int("number of calibration batches", self.num_batches, 1)
        require_int("weight bits", self.weight_bits, MIN_BITS, MAX_BITS)
        require_int("activation bits", self.act_bits, MIN_BITS, MAX_BITS)
        if self.calibrator != "percentile":
            if self.percentile is not None:
                raise InputError(f"percentile: {self.percentile!r} given with calibrator {self.calibrator!r}")
        elif not _is_percentile(self.percentile):
            raise InputError(f"percentile: expected a number in [0, 100], got {self.percentile!r}")
        for family, calibrator in self.family_calibrators.items():
            parse_calibrator(calibrator, family)
        require_choice("calibrator of weights", self.weights, WEIGHT_CALIBRATORS)

    @property
    def family_calibrators(self) -> dict[str, str]:
        """{family: calibrator} of the families of activations that have one of their own."""
        values = {family: getattr(self, family) for family in CALIBRATED_FAMILIES}
        return {family: value for family, value in values.items() if value is not None}

    @property
    def label(self) -> str:
        """Short name for tables, e.g. `ft2 percentile 99.99 n=10 w8a8`."""
        percentile = "" if self.percentile is None else f" {self.percentile:.10g}"
        own = dict(self.family_calibrators) | ({} if self.weights == "max" else {"weights": self.weights})
        tail = "".join(f" {family}={calibrator}" for family, calibrator in own.items())
        bits = f"w{self.weight_bits}a{self.act_bits}"
        return f"{self.mode} {self.calibrator}{percentile} n={self.num_batches} {bits}{tail}"


def parse_calibrator(text: Any, name: str) -> tuple[str, float | None]:
    """(calibrator, percentile) of `max`, `mse`, `entropy` or `percentile 99.9`; InputError, with `name`, otherwise."""
    calibrator, _, rest = text.partition(" ") if isinstance(text, str) else ("", "", "")
    try:
        percentile = float(rest) if rest else None
    except ValueError:
        percentile = math.nan
    if calibrator not in CALIBRATORS or (calibrator == "percentile") != _is_percentile(percentile):
        raise InputError(f"calibrator of {name}: {text!r} is not one of max, mse, entropy, percentile P (0 to 100)")
    return calibrator, percentile


def _is_percentile(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 100
