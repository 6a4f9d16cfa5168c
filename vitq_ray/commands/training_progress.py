"""What a person sees while a model trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vitq_ray.commands.screen import Screen, percent
from vitq_ray.qat.state import EpochReport, StepReport

_SECONDS_BETWEEN_LINES = 10.0
_SMOOTHING = 20  # steps


class TrainingProgress:
    """Epoch, step, loss, images/s and time left; a context manager whose methods take the loop's reports."""

    def __init__(self, epochs: int, screen: Screen) -> None:
        self._epochs = epochs
        self._say = screen.say
        self._recent: deque[tuple[float, int]] = deque(maxlen=_SMOOTHING)  # (seconds, images) of a step
        self._losses: deque[float] = deque(maxlen=_SMOOTHING)
        self._printed = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        on_terminal = screen.console is not None and screen.console.is_terminal
        self._bar = Progress(*columns, console=screen.console, transient=True) if on_terminal else None
        self._task = self._bar.add_task("starting", total=None) if self._bar else TaskID(0)

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def images_per_second(self) -> float:
        seconds = sum(s for s, _ in self._recent)
        return sum(i for _, i in self._recent) / seconds if seconds else 0.0

    def step(self, report: StepReport) -> None:
        self._recent.append((report.images / max(report.images_per_second, 1e-9), report.images))
        self._losses.append(report.loss)
        loss = sum(self._losses) / len(self._losses)
        text = f"epoch {report.epoch}/{self._epochs}, loss {loss:.4f}, {self.images_per_second:.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, total=report.total_steps, description=text)
        elif time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            left = self._seconds_left(report)
            self._say(f"step {report.step}/{report.total_steps}, {text}, {left:.0f} s left")

    def _seconds_left(self, report: StepReport) -> float:
        seconds = sum(s for s, _ in self._recent) / max(1, len(self._recent))
        return seconds * (report.total_steps - report.step)

    def epoch(self, report: EpochReport) -> None:
        self._say(epoch_line(report, self._epochs))


def epoch_line(report: EpochReport, epochs: int) -> str:
    """E.g. `epoch 2/5: loss 0.1534, 89.51 % of 5000 selection images, best so far`."""
    name = "start (PTQ)" if report.loss is None else f"epoch {report.epoch}/{epochs}: loss {report.loss:.4f}"
    selection = report.selection
    best = ", best so far" if report.best and report.loss is not None else ""
    return f"{name}, {percent(selection.top1)} of {selection.images} selection images{best}"
