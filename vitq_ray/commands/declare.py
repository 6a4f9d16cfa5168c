"""Options as declarations: one dataclass field is an option of the command line, a keyword in Python, and an entry of
run.json and result.json.

    @dataclass(frozen=True, kw_only=True)
    class EvaluateOptions(Options):
        limit: int | None = option(Number(int, 1), None, "evaluate only the first N images of val")

    evaluate.py --limit 64  ──► parser ──►  EvaluateOptions.of({"limit": "64"})  ◄── vitq_ray.evaluate(limit=64)

Values are checked once, where the options are built, and in the same words for both.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from vitq_ray.base.config import InputError
from vitq_ray.base.uris import without_keys

O = TypeVar("O", bound="Options")  # noqa: E741
_OPTION = "option"


class Kind(Protocol):
    """What values an option takes."""

    @property
    def shown(self) -> str | None:
        """Its values as help shows them behind the option; None where it takes no value, "" for the option's name."""

    def read(self, value: Any) -> Any:
        """A value, or the text of one, as the value that is kept. InputError says what was expected."""


MOST = 1_000_000_000  # of a number that has no limit of its own


@dataclass(frozen=True)
class Text:
    """Any text but an empty one; also a path object."""

    shown: str | None = ""

    def read(self, value: Any) -> str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"expected text, got {value!r}")
        if "\0" in text or not _is_utf8(text):
            raise InputError(f"expected text in UTF-8 without zero bytes, got {value!r}")
        return text


def _is_utf8(text: str) -> bool:
    """Not so for names of files in another encoding, as Python hands them on."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Place(Text):
    """A path, in which a leading `~` stands for the user's home; with `uri` also a URI such as s3://bucket/key."""

    uri: bool = False

    def read(self, value: Any) -> str:
        text = super().read(value)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
            if self.uri and "://" in text:
                return text
            raise InputError(f"{text} is a URI; expected a path on a local or shared file system")
        path = os.path.expanduser(text)
        if path.startswith("~"):
            raise InputError(f"{text}: there is no home folder of {path.split('/')[0]}; a folder of that name is ./~…")
        if len(path.encode()) > _LONGEST_PATH:
            raise InputError(f"{text}: is longer than {_LONGEST_PATH} bytes")
        if any(len(part.encode()) > _LONGEST_NAME for part in path.split("/")):
            raise InputError(f"{text}: a name in it is longer than {_LONGEST_NAME} bytes")
        return path


_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # Linux allows 4095 in all; what is put behind it has room


@dataclass(frozen=True)
class Name(Text):
    """A word that files are named by."""

    def read(self, value: Any) -> str:
        text = super().read(value)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text):
            raise InputError(f"expected a name of letters, digits and . _ -, got {text!r}")
        return text


@dataclass(frozen=True)
class Number:
    """A finite int or float in [low, high]; `MOST` stands for no limit."""

    kind: type[int] | type[float]
    low: float
    high: float = MOST
    shown: str | None = ""

    def read(self, value: Any) -> int | float:
        number = self._number(value)
        if number is None or not self.low <= number <= self.high:
            beyond = number is not None and number > self.high
            limits = f">= {self.low}" if self.high == MOST and not beyond else f"from {self.low} to {self.high}"
            what = "an integer" if self.kind is int else "a number"
            raise InputError(f"expected {what} {limits}, got {value!r}")
        return number

    def _number(self, value: Any) -> int | float | None:
        accepted = (str, numbers.Integral) if self.kind is int else (str, numbers.Real)
        if isinstance(value, bool) or not isinstance(value, accepted):
            return None
        try:
            number = self.kind(value)  # type: ignore[arg-type]
        except (ValueError, OverflowError):
            return None
        return number if self.kind is int or math.isfinite(number) else None


@dataclass(frozen=True)
class Choice:
    """One of some names; `aliases` are other spellings of them."""

    names: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        return "" if self.aliases else "{" + ",".join(self.names) + "}"

    def read(self, value: Any) -> str:
        name = self.aliases.get(str(value), value)
        if name not in self.names:
            raise InputError(f"invalid choice: {value!r} is not one of {', '.join((*self.names, *self.aliases))}")
        return str(name)


@dataclass(frozen=True)
class Flag:
    """Given or not; with `negation` also given as `--no-…`."""

    negation: bool = False
    shown: None = None

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InputError(f"expected True or False, got {value!r}")
        return value


@dataclass(frozen=True)
class Option:
    """What a field's metadata holds; `spelling` is that of messages and of the first place in help: without dashes, the
    value is typed alone."""

    kind: Kind
    help: str
    default: Any
    spelling: str

    @property
    def is_positional(self) -> bool:
        return not self.spelling.startswith("--")


def option(kind: Kind, default: Any, help: str, spelling: str | None = None) -> Any:
    """A field of an options class; the spelling is by default the field's name with dashes."""
    return field(default=default, metadata={_OPTION: (kind, help, spelling)})


def with_rows(rows: Mapping[str, Any]) -> Callable[[type[O]], type[O]]:
    """A class decorator, below `@dataclass`: fields of an options class from a table kept elsewhere."""

    def add(cls: type[O]) -> type[O]:
        cls.__annotations__ = {**cls.__annotations__, **dict.fromkeys(rows, "Any")}
        for name, row in rows.items():
            setattr(cls, name, row)
        return cls

    return add


def _declared(field: dataclasses.Field[Any]) -> Option:
    kind, help, spelling = field.metadata[_OPTION]
    return Option(kind, help, field.default, spelling or "--" + field.name.replace("_", "-"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the options of a command: frozen, made by `of`.

    Attributes:
        given: names of the options that were given, whatever their value.
        typed: given on a command line; messages then name options as they are typed there.
    """

    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    typed: bool = field(default=False, repr=False, compare=False)

    @classmethod
    def declared(cls) -> dict[str, Option]:
        """{name: declaration} of all options."""
        return {name: row for options in cls.groups().values() for name, row in options.items()}

    @classmethod
    def groups(cls) -> dict[str, dict[str, Option]]:
        """{title: its options}: those of each base class, titled by its docstring, then the command's own."""
        bases = [base for base in cls.__mro__[1:] if issubclass(base, Options) and base is not Options]
        titles = {"this command": cls} | {inspect.getdoc(base) or "": base for base in bases}
        fields = {f.name: f for f in dataclasses.fields(cls) if _OPTION in f.metadata}
        order = [*titles][1:] + [*titles][:1]
        groups = {title: titles[title].__annotations__ for title in order}
        rows = {title: {n: _declared(fields[n]) for n in names if n in fields} for title, names in groups.items()}
        return {title: options for title, options in rows.items() if options}

    @classmethod
    def of(cls: type[O], values: Mapping[str, Any], typed: bool = False) -> O:
        """Options from values or their texts, defaults for the others. InputError names option and value.

        None stands for "not given" where it is the default.
        """
        declared = cls.declared()
        read = {}
        for name, value in values.items():
            if name not in declared:
                raise InputError(f"{name}: not an option; the options are {', '.join(declared)}")
            if value is None and declared[name].default is None:
                continue
            try:
                read[name] = declared[name].kind.read(value)
            except InputError as error:
                raise InputError(f"{declared[name].spelling if typed else name}: {error}") from None
        return cls(**read, given=frozenset(read), typed=typed)

    def name_of(self, name: str) -> str:
        """An option as the user knows it: `--calib-batchsz`, or in Python `calib_batchsz`."""
        return self.declared()[name].spelling if self.typed else name

    def to_dict(self) -> dict[str, Any]:
        """{option: value} of all options, for run.json and result.json; URIs without their keys."""
        values = {name: getattr(self, name) for name in self.declared()}
        return {name: _without_keys(value) for name, value in values.items()}

    def only(self, names: Iterable[str]) -> dict[str, Any]:
        """{option: value} of those of `names` that were given."""
        return {name: getattr(self, name) for name in names if name in self.given}


def _without_keys(value: Any) -> Any:
    """As JSON has it, too: lists for tuples."""
    if isinstance(value, tuple):
        return [_without_keys(item) for item in value]
    return without_keys(value) if isinstance(value, str) else value


def signature_of(options: type[Options], result: Any) -> inspect.Signature:
    """Of a function with the options as keywords: what `help` and notebooks show."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    types = {f.name: f.type for f in dataclasses.fields(options)}
    parameters = [
        inspect.Parameter(name, keyword, default=row.default, annotation=types[name])
        for name, row in options.declared().items()
    ]
    return inspect.Signature(parameters, return_annotation=result)
