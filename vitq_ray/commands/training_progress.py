"""What a person sees while a model trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vitq_ray.commands.countdown import Clock, Countdown, Every, Pace, counted, duration
from vitq_ray.commands.screen import Screen, percent
from vitq_ray.data.loader import Batch
from vitq_ray.data.samples import Ids, SampleIndex
from vitq_ray.data.transforms import Transform
from vitq_ray.qat.ranks import Reader
from vitq_ray.qat.state import EpochReport, StepReport

_SMOOTHING = 20  # steps


class TrainingProgress:
    """Epoch, step, loss, images/s and time left; a context manager whose methods take the loop's reports."""

    def __init__(self, epochs: int, screen: Screen, clock: Clock = time.monotonic) -> None:
        self._epochs = epochs
        self._clock = clock
        self._pace, self._every = Pace(clock), Every(clock=clock)
        self._say = screen.say
        self._recent: deque[tuple[float, int]] = deque(maxlen=_SMOOTHING)  # (seconds, images) of a step
        self._losses: deque[float] = deque(maxlen=_SMOOTHING)
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
        self._pace.at(report.step)
        self._recent.append((report.images / max(report.images_per_second, 1e-9), report.images))
        self._losses.append(report.loss)
        loss = sum(self._losses) / len(self._losses)
        text = f"epoch {report.epoch}/{self._epochs}, loss {loss:.4f}, {self.images_per_second:.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, total=report.total_steps, description=text)
        elif self._every.due:
            left = self._pace.seconds_for(report.total_steps - report.step)  # evaluations between epochs included
            known = "" if left is None else f", about {duration(left)} left"
            self._say(f"step {report.step}/{report.total_steps}, {text}{known}")

    def epoch(self, report: EpochReport) -> None:
        self._say(epoch_line(report, self._epochs))

    def shown(self, read: Reader, val: SampleIndex) -> Reader:
        """The reader, whose passes over val are shown, too: selection images after an epoch, in the end all of val."""

        def reader(index: SampleIndex, ids: Ids, transform: Transform, batch_size: int) -> Iterator[Batch]:
            batches = read(index, ids, transform, batch_size)
            return self._evaluating(batches, -(-len(ids) // batch_size)) if index is val else batches

        return reader

    def _evaluating(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        if self._bar is None:
            yield from counted(batches, Countdown("evaluate", total, self._say, self._clock))
            return
        task = self._bar.add_task("evaluate", total=total)
        try:
            for batch in batches:
                yield batch
                self._bar.advance(task)
        finally:
            self._bar.remove_task(task)


def epoch_line(report: EpochReport, epochs: int) -> str:
    """E.g. `epoch 2/5: loss 0.1534, 89.51 % of 5000 selection images, best so far`."""
    name = "start (PTQ)" if report.loss is None else f"epoch {report.epoch}/{epochs}: loss {report.loss:.4f}"
    selection = report.selection
    best = ", best so far" if report.best and report.loss is not None else ""
    return f"{name}, {percent(selection.top1)} of {selection.images} selection images{best}"
