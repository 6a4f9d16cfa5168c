"""What a person sees while a search runs: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, JustifyMethod
from rich.live import Live
from rich.table import Table

from vitq_ray.commands.countdown import Clock, Countdown, Every, Pace, duration
from vitq_ray.commands.screen import Screen, fidelity_of, percent, results_text, top1_of
from vitq_ray.measure.evaluation import Counts, Evaluation
from vitq_ray.measure.racing import Decision, Race, Verdict
from vitq_ray.search.contest import Listeners

_ROWS = 18
_WIDE = 120  # columns that the whole table takes
_SHORT = ("top-1", "KL")
_OTHERS = 48  # columns of a narrow table beside the candidates'
_STYLES = {
    "racing": "cyan",
    "waiting": "dim",
    "beaten": "dim red",
    "behind": "dim red",
    "tied": "yellow",
    "finished": "green",
}


@dataclass(frozen=True)
class Row:
    """One candidate as shown."""

    label: str
    counts: Counts
    merit: float  # what candidates are ranked by, in the mean: the larger, the better
    state: str
    note: str


def rows_of(race: Race, labels: Mapping[str, str]) -> list[Row]:
    """Finished ones first, then those that race, the waiting ones, those stopped last; best first in each."""
    rank = {"finished": 0, "racing": 1, "tied": 2, "waiting": 3, "behind": 4, "beaten": 4}
    rows = [_row(race, name, label) for name, label in labels.items()]
    return sorted(rows, key=lambda r: (rank[r.state], -r.merit))


def _row(race: Race, name: str, label: str) -> Row:
    counts = counts_of(race, name)
    decision = race.decision(name)
    state = decision.verdict.value if decision else "racing" if counts.images else "waiting"
    merit = race.objective.sign * race.mean(name) if counts.images else 0.0
    return Row(label, counts, merit, state, note_of(decision))


def counts_of(race: Race, name: str) -> Counts:
    """Of a candidate's results that count."""
    return Counts.summed(race.results(name))


def note_of(decision: Decision | None) -> str:
    """Why a candidate was stopped: images that speak for it and for its opponent."""
    if decision is None or decision.verdict is Verdict.FINISHED:
        return ""
    return f"{decision.losses}:{decision.wins} against {decision.against}"


def live_table(console: Console | None, table: Callable[[], Table]) -> Live | None:
    """Draws a table twice a second; None where there is no terminal."""
    if console is None or not console.is_terminal:
        return None
    return Live(get_renderable=table, console=console, refresh_per_second=2, transient=True)


class LiveRace:
    """The race as it goes on; a context manager.

    `more_to_come`: settings may be proposed later that are not known yet.
    """

    def __init__(
        self,
        race: Race,
        baseline: Evaluation,
        screen: Screen,
        more_to_come: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._race = race
        self._baseline = baseline
        self._labels: dict[str, str] = {}
        self._say = screen.say
        self._clock = clock
        self._more_to_come = more_to_come
        self._began = clock()
        self._known = 0
        self._pace, self._every = Pace(clock), Every(clock=clock)
        self._plans: Countdown | None = None
        self._console = screen.console
        self._live = live_table(screen.console, self.table)

    def __enter__(self) -> LiveRace:
        self._began = self._clock()
        self._known = self._race.images_evaluated
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def listeners(self) -> Listeners:
        return Listeners(
            on_plan=self.planned,
            on_candidate=lambda candidate: self.enter(candidate.name, candidate.setting.label),
            on_chunk=self.progressed,
            on_decision=self.decided,
        )

    def planned(self, done: int, total: int) -> None:
        """Plans are made. Without a terminal: a line now and then."""
        if done == 0 or self._plans is None:
            say = self._say if self._live is None else lambda text: None
            self._plans = Countdown("plans of settings", total, say, self._clock)
        self._plans.at(done)

    def enter(self, name: str, label: str) -> None:
        """One more candidate."""
        self._labels[name] = f"{name} {label}"

    def progressed(self, name: str, images: int) -> None:
        """A chunk has come. Without a terminal: a line now and then."""
        self._pace.at(self._race.images_evaluated)
        if self._live is None and self._every.due:
            self._say(self.progress)

    def decided(self, decision: Decision) -> None:
        """Without a terminal: one line for every decision."""
        if self._live is not None:
            return
        results = results_text(counts_of(self._race, decision.name))
        done = sum(self._race.decision(name) is not None for name in self._labels)
        what = f"{decision.verdict.value} {note_of(decision)}".rstrip()
        self._say(
            f"[{done}/{len(self._labels)}] {self._labels[decision.name]}: {results} of {decision.images} images, {what}"
        )

    @property
    def images_per_second(self) -> float:
        """Since the race began here, all workers together."""
        seconds = self._clock() - self._began
        return (self._race.images_evaluated - self._known) / seconds if seconds > 0 else 0.0

    @property
    def images_left(self) -> int:
        """That will be evaluated at most: candidates that are beaten or tied stop before."""
        race = self._race
        return sum(race.rules.images - race.seen(name) for name in race.names if race.decision(name) is None)

    @property
    def time_left(self) -> str:
        """E.g. `at most 2 min 10 s left`: all that are still in the race see all images, at the speed so far."""
        left = self._pace.seconds_for(self.images_left)
        if left is None:
            return ""
        return f"at most {duration(left)} left" + (" for the settings proposed so far" if self._more_to_come else "")

    @property
    def progress(self) -> str:
        """How far the race is, in one line."""
        race = self._race
        decided = sum(race.decision(name) is not None for name in race.names)
        budget = len(race.names) * race.rules.images
        speed = self._pace.per_second
        parts = (
            f"{decided} of {len(race.names)} candidates decided",
            f"{race.images_evaluated:,} of at most {budget:,} images evaluated",
            "" if speed is None else f"{speed:,.0f} images/s",
            self.time_left,
        )
        return ", ".join(filter(None, parts))

    def table(self) -> Table:
        rows = rows_of(self._race, self._labels)
        title = self.progress if rows or self._plans is None else self._plans.text
        width = _WIDE if self._console is None else self._console.width
        columns = ("candidate", "images", *(("top-1 (95 % interval)", "KL, agreement") if width >= _WIDE else _SHORT))
        columns = (*columns, "state", *(("images won:lost",) if width >= _WIDE else ()))
        table = Table(title=title, title_justify="left")
        for column in columns:
            most = max(10, width - _OTHERS) if column == "candidate" and width < _WIDE else None
            justify: JustifyMethod = "left" if column in ("candidate", "state") else "right"
            table.add_column(column, justify=justify, no_wrap=True, max_width=most)

        def add(label: str, counts: Counts | None, state: str, note: str, style: str | None = None) -> None:
            shown = ("", "", "") if counts is None or not counts.images else cells_of(counts, width >= _WIDE)
            table.add_row(*(label, *shown, state, note)[: len(columns)], style=style)

        add("float", Counts.of(self._baseline), "", "", "bold")
        hidden = max(0, len(rows) - _ROWS)
        for row in rows[: _ROWS - 1] if hidden else rows:
            add(row.label, row.counts, f"[{_STYLES[row.state]}]{row.state}[/]", row.note)
        if hidden:
            add(f"… {hidden + 1} more …", None, "", "", "dim")
        return table


def cells_of(counts: Counts, wide: bool) -> tuple[str, str, str]:
    """Images, top-1, closeness to the float model; in a narrow table without intervals and agreement."""
    means = counts.means
    if wide:
        return str(counts.images), top1_of(counts), fidelity_of(counts)
    top1, kl = (means.get(name) for name in ("top1", "kl"))
    return str(counts.images), "" if top1 is None else percent(top1), "" if kl is None else f"{kl:.5f}"
