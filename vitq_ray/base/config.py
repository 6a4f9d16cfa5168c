"""Configurations as values: frozen dataclasses, validated once where they are built, strict `from_dict`.

Also the one exception that means "the user's input is wrong": `InputError`. Scripts turn it into one line on
stderr and exit code 2; every message names the thing, the value found and what was expected.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from vitq_ray.base.uris import without_keys

T = TypeVar("T", bound="Config")


class InputError(ValueError):
    """Bad input or options: the message is one line for the user (exit code 2, no traceback), without keys of URIs."""

    def __init__(self, message: str) -> None:
        super().__init__(without_keys(message))


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


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """A finite int or float (no bool) in [low, high]."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max and low <= value <= high  # NaN compares as False


class Config:
    """Base of the frozen dataclasses: `to_dict`, and a `from_dict` that refuses unknown and missing keys."""

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return values

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any], complete: bool = False) -> T:
        """Build from a dictionary, as `to_dict` or JSON has it: fields that are Configs or tuples are built, too.

        With `complete`, as read from a file, no field may be left to its default, and every value must be of the type
        that its field says.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{cls.__name__}: expected a dictionary, got {values!r}")
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
        hints = typing.get_type_hints(cls)
        if complete:
            for name, value in values.items():
                if not _is(hints[name], value):
                    kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
                    raise InputError(f"{cls.__name__}: {name}: expected {kind}, got {_short(value)}")
        return cls(**{name: _built(hints[name], value, complete) for name, value in values.items()})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _is(kind: Any, value: Any) -> bool:
    """Whether `value`, as JSON has it, may stand for the annotation `kind`. What is built from texts is not judged."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(option, value) for option in inner)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is(inner[0], item) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _is(inner[0], name) and _is(inner[1], item) for name, item in value.items()
        )
    if kind is float:
        return is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, bool, types.NoneType):
        return isinstance(value, kind)
    return True


def _built(kind: Any, value: Any, complete: bool) -> Any:
    """`value` as the annotation `kind` wants it: dictionaries become Configs, lists tuples; None stays None."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    for option in typing.get_args(kind) if union else (kind,):
        if isinstance(option, type) and issubclass(option, Config) and isinstance(value, Mapping):
            return option.from_dict(value, complete)
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(value)
    return value
