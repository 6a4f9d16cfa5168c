"""How long a stage still takes: measured, said at most every 30 seconds where there is no terminal to draw on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0
Clock = Callable[[], float]  # seconds


def duration(seconds: float) -> str:
    """E.g. `8 s`, `2 min 10 s`, `1 h 5 min`."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


@dataclass
class Pace:
    """The speed of some work since its first piece was done: what comes before that is the start of workers."""

    clock: Clock = time.monotonic
    _first: tuple[float, float] | None = field(default=None, init=False)  # (seconds, done)
    _last: tuple[float, float] | None = field(default=None, init=False)

    def at(self, done: float) -> None:
        """So much is done now."""
        self._last = self.clock(), done
        if self._first is None:
            self._first = self._last

    @property
    def per_second(self) -> float | None:
        """None where nothing was done since the first piece."""
        if self._first is None or self._last is None:
            return None
        seconds, done = (last - first for first, last in zip(self._first, self._last, strict=True))
        return done / seconds if done > 0 and seconds > 0 else None

    def seconds_for(self, work: float) -> float | None:
        """That so much more takes at this speed; None where it is not known."""
        return None if self.per_second is None else work / self.per_second


@dataclass
class Every:
    """Once in so many seconds from now on."""

    seconds: float = SECONDS_BETWEEN_LINES
    clock: Clock = time.monotonic
    _last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    @property
    def due(self) -> bool:
        """It is time again; then it is not, for as long."""
        now = self.clock()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


@dataclass
class Countdown:
    """Lines of a stage of `total` pieces, e.g. `calibrate: 12 of 32, about 1 min 5 s left`."""

    label: str
    total: int
    say: Callable[[str], None]
    clock: Clock = time.monotonic

    def __post_init__(self) -> None:
        self._pace, self._every = Pace(self.clock), Every(clock=self.clock)
        self._done = 0

    def at(self, done: int) -> None:
        """So many pieces are done now."""
        self._done = done
        if done:
            self._pace.at(done)
        if self._every.due:
            self.say(self.text)

    @property
    def text(self) -> str:
        """The line."""
        left = self._pace.seconds_for(self.total - self._done)
        known = "" if left is None else f", about {duration(left)} left"
        return f"{self.label}: {self._done} of {self.total}{known}"


def counted(items: Iterable[T], countdown: Countdown) -> Iterator[T]:
    """The items, each done when the next one is asked for."""
    for done, item in enumerate(items):
        countdown.at(done)
        yield item
