"""What a command tells a person. Use cases take a `Screen`; what prints is `Terminal`, and Python gets `SILENT`.

Also the one way to write an accuracy, a line of results, a table of them, and seconds.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import rich.progress
from rich.console import Console

from vitq_ray.base.files import one_line, shortened
from vitq_ray.base.uris import without_keys
from vitq_ray.data.folders import left_out_text
from vitq_ray.data.samples import SampleIndex
from vitq_ray.measure.evaluation import Evaluation, wilson_interval

T = TypeVar("T")


class Screen:
    """Says nothing; warnings go to the log `vitq_ray`.

    Attributes:
        command: what runs this command again, for hints.
        console: where live tables and progress bars are drawn, on a terminal only; None: nowhere.
    """

    command = "vitq_ray"
    console: Console | None = None

    def say(self, text: str) -> None:
        """One or more lines."""

    def warn(self, message: str) -> None:
        logging.getLogger("vitq_ray").warning("%s", one_line(message))

    def track(self, items: Iterable[T], total: int, label: str) -> Iterable[T]:
        """The items, with progress shown."""
        return items

    def interrupted(self, folder: Path) -> None:
        """A run was stopped whose state is kept in a folder."""
        self.warn(f"stopped; what was done is kept. Go on with resume={str(folder)!r}")


class Terminal(Screen):
    """Prints to stdout, warnings to stderr."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.console = Console()

    def say(self, text: str) -> None:
        print(without_keys(text), flush=True)

    def warn(self, message: str) -> None:
        print(f"warning: {shortened(one_line(message))}", file=sys.stderr)

    def track(self, items: Iterable[T], total: int, label: str) -> Iterable[T]:
        return rich.progress.track(items, label, total, disable=not sys.stdout.isatty(), transient=True)

    def interrupted(self, folder: Path) -> None:
        again = f"{self.command} --resume {shlex.quote(str(folder))}"
        print(f"\nstopped; what was done is kept. Go on with: {again}", file=sys.stderr, flush=True)


SILENT = Screen()


class _Shown(logging.Handler):
    """Warnings in the log, shown on a screen that prints."""

    def __init__(self, screen: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.warn(one_line(record.getMessage()))


@contextmanager
def log_shown(screen: Terminal) -> Iterator[None]:
    """While the context lasts, warnings in the log `vitq_ray` are the screen's."""
    log, handler = logging.getLogger("vitq_ray"), _Shown(screen)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class Counted(Protocol):
    """Counts of an evaluation."""

    @property
    def images(self) -> int: ...

    @property
    def top1_correct(self) -> int: ...


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def accuracy(correct: int, images: int) -> str:
    """Top-1 with its 95 % interval, e.g. `89.51 % (88.89 to 90.10)`."""
    low, high = wilson_interval(correct, images)
    return f"{100 * correct / images:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


def accuracy_of(counts: Counted) -> str:
    return accuracy(counts.top1_correct, counts.images)


def result_line(name: str, evaluation: Evaluation) -> str:
    """E.g. `float: top-1 91.39 % (90.82 to 91.92), top-5 99.80 % of 10000 images`; in brackets the 95 % interval."""
    return f"{name}: top-1 {accuracy_of(evaluation)}, top-5 {percent(evaluation.top5)} of {evaluation.images} images"


def result_table(rows: Sequence[tuple[str, Counted | None, Counted | None, str]]) -> str:
    """Rows of name, results on the selection and on the report images, and a label: top-1 with 95 % intervals."""
    lines = [f"{'':8}{'on selection':>26}   {'images':>6}   {'on report':>26}"]
    for name, selection, report, label in rows:
        images = "" if selection is None else str(selection.images)
        shown = ["" if counts is None else accuracy_of(counts) for counts in (selection, report)]
        lines.append(f"{name:8}{shown[0]:>26}   {images:>6}   {shown[1]:>26}   {label}".rstrip())
    return "\n".join(lines)


def seconds_line(seconds: Mapping[str, float]) -> str:
    """Seconds of every stage."""
    return "seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())


def warn_of_bad_images(screen: Screen, bad_images: Sequence[tuple[str, str]]) -> None:
    """Say how many broken images were skipped, each counted once."""
    if bad_images:
        screen.warn(f"{len(dict(bad_images))} broken images were skipped; they are listed in result.json")


def warn_of_left_out(screen: Screen, splits: Mapping[str, SampleIndex]) -> None:
    """Say what of the splits is no image of them."""
    for split, index in splits.items():
        if index.left_out:
            screen.warn(f"{split}: left out: {left_out_text(index.left_out)}")


def dashboard_hint(url: str | None) -> str:
    """Where Ray's dashboard is, for the line that names the run folder; empty where there is none."""
    return f"; dashboard {url} (its token: ray get-auth-token)" if url else ""
