"""What a user runs: `vitq-ray calib|evaluate|tune|qat|export|sensitivity|report`, and one function for every script.

Exit codes: 0 done, 2 bad input or options (one line on stderr), 1 anything else, 130 after Ctrl-C, 143 and 129 after
SIGTERM and SIGHUP.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from vitq_ray import __version__
from vitq_ray.base.config import InputError
from vitq_ray.base.cpus import available_cpus
from vitq_ray.cluster.address import require_cluster
from vitq_ray.commands.surroundings import exit_code


@dataclass(frozen=True)
class Command:
    """A command: `module` of this folder has a function of the same name, whose first argument is `options`.

    Attributes:
        joins: options that, given together, make it join a cluster; the first one says which.
    """

    name: str
    module: str
    options: str
    script: str
    help: str
    joins: tuple[str, ...] = ()


_ADDRESS = "--ray-address"
_WITH_WORKERS = (_ADDRESS, "--num-workers")
COMMANDS = {
    row.name: row
    for row in (
        Command(
            "calib",
            "calibrate",
            "CalibrateOptions",
            "calib.py",
            "calibrate one INT8 setting and evaluate it",
            _WITH_WORKERS,
        ),
        Command(
            "evaluate",
            "evaluate",
            "EvaluateOptions",
            "evaluate.py",
            "evaluate a float or a calibrated checkpoint",
            _WITH_WORKERS,
        ),
        Command("tune", "tune", "TuneOptions", "tune_calib.py", "find the best setting of a search space", (_ADDRESS,)),
        Command(
            "qat",
            "train",
            "TrainOptions",
            "qat.py",
            "train a calibrated checkpoint with its quantizers on",
            (_ADDRESS,),
        ),
        Command("export", "export", "ExportOptions", "export.py", "write an ONNX file for a runtime, and verify it"),
        Command(
            "sensitivity", "sensitivity", "SensitivityOptions", "sensitivity.py", "say what each part of a plan costs"
        ),
        Command("report", "report", "ReportOptions", "report.py", "draw what a run found as one page"),
    )
}


def main(argv: Sequence[str] | None = None, program: str = "vitq-ray") -> int:
    """The console command: a subcommand and its options. Returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in COMMANDS:
        return run(COMMANDS[name], rest, f"{program} {name}")
    return exit_code(lambda: print(about(name, program)))


def about(name: str, program: str) -> str:
    """What is printed for a first argument that is no command. InputError where that is nothing."""
    if name in ("-h", "--help"):
        return usage(program)
    if name == "--version":
        return f"vitq_ray {__version__}"
    raise InputError(f"{name}: no such command; the commands are {', '.join(COMMANDS)}")


def usage(program: str) -> str:
    """The commands, one a line."""
    rows = [f"  {row.name:<12} {row.help}" for row in COMMANDS.values()]
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


def export(argv: Sequence[str] | None = None) -> int:
    """scripts/export.py"""
    return run_script("export", argv)


def sensitivity(argv: Sequence[str] | None = None) -> int:
    """scripts/sensitivity.py"""
    return run_script("sensitivity", argv)


def report(argv: Sequence[str] | None = None) -> int:
    """scripts/report.py"""
    return run_script("report", argv)


def run_script(name: str, argv: Sequence[str] | None) -> int:
    return run(COMMANDS[name], argv, f"python scripts/{COMMANDS[name].script}")


def run(command: Command, argv: Sequence[str] | None, typed: str) -> int:
    """Parse the options and do what they ask for. `typed` is what the user typed before them."""

    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # or Ray, touched after its end, would start another one

    def work() -> None:
        parser = import_module("vitq_ray.commands.parser")
        joined = parser.texts_of(command.joins, argv)
        require_cluster(joined[0] if joined else None)  # before PyTorch is imported, which takes seconds
        options, screen = (import_module(f"vitq_ray.commands.{m}") for m in ("options", "screen"))
        given = parser.parse(getattr(options, command.options), argv, typed)
        use_case = getattr(import_module(f"vitq_ray.commands.{command.module}"), command.module)
        terminal = screen.Terminal(typed)
        limit_threads()
        with screen.log_shown(terminal):
            use_case(given, terminal)

    return exit_code(work)


def limit_threads() -> None:
    """PyTorch computes with no more threads than a container's quota has CPUs; OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and available_cpus() < torch.get_num_threads():
        torch.set_num_threads(available_cpus())
