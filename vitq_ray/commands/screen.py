"""What a command tells a person. Use cases take a `Screen`; what prints is `Terminal`, and Python gets `SILENT`.

Also the one way to write an accuracy, a line of results, a table of them, and seconds.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import rich.progress
from rich.console import Console

from vitq_ray.base.files import one_line, shortened
from vitq_ray.base.uris import without_keys
from vitq_ray.commands.countdown import Countdown, counted
from vitq_ray.data.folders import left_out_text
from vitq_ray.data.samples import SampleIndex
from vitq_ray.measure.evaluation import Counts, Evaluation, wilson_interval

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
        """The items, with progress and time left shown."""
        return items

    def can_show(self, text: str) -> bool:
        """Whether what is said can have these characters."""
        return True

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
        if sys.stdout.isatty():
            return rich.progress.track(items, label, total, transient=True)
        return counted(items, Countdown(label, total, self.say))

    def can_show(self, text: str) -> bool:
        try:
            text.encode(sys.stdout.encoding or "ascii")
        except (UnicodeError, LookupError):
            return False
        return True

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


def fidelity_of(counts: Counts) -> str:
    """Mean KL in nats and agreement with the float model, e.g. `0.01234, 97.31 %`; empty where they are not known."""
    means = counts.means
    return f"{means['kl']:.5f}, {percent(means['agreement'])}" if "kl" in means else ""


def top1_of(counts: Counts) -> str:
    """As `accuracy`; empty without labels."""
    return accuracy_of(counts) if counts.has_accuracy else ""


def results_text(counts: Counts, top5: bool = False) -> str:
    """E.g. `top-1 91.39 % (90.82 to 91.92), KL to float 0.00123 nats, agreement 98.12 %`, as far as it is known."""
    parts, means = [], counts.means
    if counts.has_accuracy:
        parts.append(f"top-1 {accuracy_of(counts)}")
    if top5 and "top5" in means:
        parts.append(f"top-5 {percent(means['top5'])}")
    if "kl" in means:
        parts.append(f"KL to float {means['kl']:.5f} nats, agreement {percent(means['agreement'])}")
    return ", ".join(parts)


def result_line(name: str, evaluation: Evaluation) -> str:
    """E.g. `float: top-1 91.39 % (90.82 to 91.92), top-5 99.80 % of 10000 images`; in brackets the 95 % interval."""
    text = results_text(Counts.of(evaluation), top5=True)
    return f"{name}: {text} of {evaluation.images} images" if text else f"{name}: {evaluation.images} images"


_COLUMNS: tuple[tuple[str, Callable[[Counts], str]], ...] = (
    ("images", lambda counts: str(counts.images)),
    ("top-1 (95 % interval)", top1_of),
    ("KL, agreement", fidelity_of),
)


def result_table(rows: Sequence[tuple[str, Counts | None, Counts | None, str]]) -> str:
    """Rows of name, results on the selection and on the report images, and a label; in 80 columns, but for labels.

    One table for each half, of the rows that have results there; results are top-1 with 95 % intervals, and KL in nats
    and agreement with the float model, where any row has them. Then the labels.
    """
    lines = []
    for half, part in (("selection", 1), ("report", 2)):
        found = [(str(row[0]), counts) for row in rows if isinstance(counts := row[part], Counts)]
        table = [[half, *(name for name, _ in found)]]
        for title, text_of in _COLUMNS:
            texts = [text_of(counts) for _, counts in found]
            if any(texts):
                table.append([title, *texts])
        widths = [max(9, *map(len, table[0])), *(max(map(len, column)) for column in table[1:])]
        for first, *others in zip(*table, strict=True):
            cells = [f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True)]
            lines.append("   ".join((f"{first:<{widths[0]}}", *cells)).rstrip())
        lines.append("")
    return "\n".join((*lines, *(f"{name}: {label}" for name, _, _, label in rows if label))).rstrip("\n")


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


def warn_of_no_labels(screen: Screen, index: SampleIndex) -> None:
    """Say that a split has no labels."""
    screen.warn(f"{index.no_labels}: settings are judged by their agreement with the float model alone")


def dashboard_hint(url: str | None) -> str:
    """Where Ray's dashboard is, for the line that names the run folder; empty where there is none."""
    return f"; dashboard {url} (its token: ray get-auth-token)" if url else ""
