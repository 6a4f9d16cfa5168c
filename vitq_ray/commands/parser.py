"""The command line of an options class: both spellings of every option, no abbreviations, one-line errors."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from vitq_ray.base.config import InputError
from vitq_ray.commands.declare import Flag, Option, Options

O = TypeVar("O", bound=Options)  # noqa: E741


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors."""

    def __init__(self, program: str | None, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=program, description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(kind: type[O], argv: Sequence[str] | None, command: str) -> O:
    """The options that a command line gives; `command` is what the user typed before them."""
    given = vars(parser_of(kind, command).parse_args(argv))
    return kind.of(given, typed=True)


def texts_of(spellings: Sequence[str], argv: Sequence[str] | None) -> list[str]:
    """What a command line gives for options, whatever its others are, which are not known yet.

    [] where it does not give them all, or asks for help; what is wrong with it the whole parser says.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    for spelling in spellings:
        parser.add_argument(*_spellings(spelling), dest=spelling)
    try:
        given = vars(parser.parse_known_args(argv)[0])
    except argparse.ArgumentError:
        return []
    texts = [given[spelling] for spelling in spellings]
    return [] if given["help"] or not all(text and text.strip() for text in texts) else texts


def parser_of(kind: type[Options], command: str) -> Parser:
    """A parser that hands on the texts of what is given, and nothing of what is not."""
    description = inspect.cleandoc(kind.__doc__ or "").replace("{command}", command)
    parser = Parser(command.split("/")[-1], description)
    for title, options in kind.groups().items():
        group = parser.add_argument_group(title)
        for name, declared in options.items():
            if declared.is_positional:
                group.add_argument(name, nargs="?", default=argparse.SUPPRESS, **_settings(declared))
                continue
            group.add_argument(
                *_spellings(declared.spelling), dest=name, default=argparse.SUPPRESS, **_settings(declared)
            )
    return parser


def _spellings(spelling: str) -> tuple[str, ...]:
    """`--calib-batchsz` and `--calib_batchsz` alike."""
    bare = spelling[2:]
    return tuple(dict.fromkeys(("--" + bare, "--" + bare.replace("-", "_"), "--" + bare.replace("_", "-"))))


def _settings(declared: Option) -> dict[str, Any]:
    shown, default = declared.kind.shown, declared.default
    text = declared.help if default is None else f"{declared.help} (default: {default})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    if declared.is_positional:
        return settings | {"metavar": declared.spelling}
    if isinstance(declared.kind, Flag):
        return settings | {"action": argparse.BooleanOptionalAction if declared.kind.negation else "store_true"}
    if getattr(declared.kind, "repeated", False):
        settings |= {"action": "append"}
    return settings | ({"metavar": shown} if shown else {})
