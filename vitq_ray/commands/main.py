"""What a user runs: `vitq-ray calib|evaluate|tune|qat`, and one function for every script.

Exit codes: 0 done, 2 bad input or options (one line on stderr), 1 anything else, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from vitq_ray import __version__
from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line, shortened

_CANNOT_WRITE = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "file larger than the limit on files (ulimit -f, or the file system's)",
    errno.EROFS: "the file system has become read-only",
    errno.EIO: "the disk fails (input/output error)",
}


@dataclass(frozen=True)
class Command:
    """A command: `module` of this folder has a function of the same name, whose first argument is `options`."""

    name: str
    module: str
    options: str
    script: str
    help: str


COMMANDS = {
    row.name: row
    for row in (
        Command("calib", "calibrate", "CalibrateOptions", "calib.py", "calibrate one INT8 setting and evaluate it"),
        Command(
            "evaluate", "evaluate", "EvaluateOptions", "evaluate.py", "evaluate a float or a calibrated checkpoint"
        ),
        Command("tune", "tune", "TuneOptions", "tune_calib.py", "find the best setting of a search space"),
        Command("qat", "train", "TrainOptions", "qat.py", "train a calibrated checkpoint with its quantizers on"),
    )
}


def main(argv: Sequence[str] | None = None, program: str = "vitq-ray") -> int:
    """The console command: a subcommand and its options. Returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage(program))
        return 0
    if name == "--version":
        print(f"vitq_ray {__version__}")
        return 0
    if name not in COMMANDS:
        return _fail(2, f"{name}: no such command; the commands are {', '.join(COMMANDS)}")
    return run(COMMANDS[name], rest, f"{program} {name}")


def usage(program: str) -> str:
    """The commands, one a line."""
    rows = [f"  {row.name:<10} {row.help}" for row in COMMANDS.values()]
    head = f"usage: {program} COMMAND [options]        {program} COMMAND --help        {program} --version"
    return "\n".join((head, "", *rows))


def calib(argv: Sequence[str] | None = None) -> int:
    """scripts/calib.py"""
    return run_script("calib", argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """scripts/evaluate.py"""
    return run_script("evaluate", argv)


def tune_calib(argv: Sequence[str] | None = None) -> int:
    """scripts/tune_calib.py"""
    return run_script("tune", argv)


def qat(argv: Sequence[str] | None = None) -> int:
    """scripts/qat.py"""
    return run_script("qat", argv)


def run_script(name: str, argv: Sequence[str] | None) -> int:
    return run(COMMANDS[name], argv, f"python scripts/{COMMANDS[name].script}")


def run(command: Command, argv: Sequence[str] | None, typed: str) -> int:
    """Parse the options and do what they ask for. `typed` is what the user typed before them."""

    def work() -> None:
        parser, options, screen = (import_module(f"vitq_ray.commands.{m}") for m in ("parser", "options", "screen"))
        given = parser.parse(getattr(options, command.options), argv, typed)
        use_case = getattr(import_module(f"vitq_ray.commands.{command.module}"), command.module)
        terminal = screen.Terminal(typed)
        with screen.log_shown(terminal):
            use_case(given, terminal)

    return exit_code(work)


def exit_code(work: Callable[[], None]) -> int:
    """Do it, and translate how it ended."""
    from vitq_ray.qat.loop import DivergedError

    try:
        work()
    except InputError as error:
        return _fail(2, one_line(error))
    except DivergedError as error:
        return _fail(1, one_line(error))
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            where = "" if error.filename is None else f"{error.filename}: "
            return _fail(1, f"{where}{_CANNOT_WRITE[error.errno]}; nothing was left half written")
        raise
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    return 0


def _fail(code: int, message: str) -> int:
    print(f"error: {shortened(message)}", file=sys.stderr)
    return code
