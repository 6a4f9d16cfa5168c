"""Time left, with a clock that the test turns: of stages, of a race, of a training."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from rich.console import Console

from vitq_ray.commands import countdown, screen
from vitq_ray.commands.countdown import Countdown, Every, Pace, counted, duration
from vitq_ray.commands.live_race import LiveRace
from vitq_ray.commands.screen import Screen, Terminal
from vitq_ray.commands.sketch import SYMBOLS
from vitq_ray.commands.training_progress import TrainingProgress
from vitq_ray.data.samples import SampleIndex
from vitq_ray.measure.evaluation import Counts, Evaluation
from vitq_ray.measure.racing import Race, RaceRules
from vitq_ray.qat.state import EpochReport, StepReport


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Said(Screen):
    """A screen without a terminal that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (130, "2 min 10 s"), (3901, "1 h 5 min"), (-1, "0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_pace_leaves_out_what_comes_before_the_first_piece(clock: Clock) -> None:
    pace = Pace(clock)
    assert pace.seconds_for(10) is None
    clock.now += 60  # workers start
    pace.at(4)
    assert pace.seconds_for(10) is None, "one piece has no speed"
    clock.now += 8
    pace.at(8)
    assert pace.per_second == 0.5
    assert pace.seconds_for(10) == 20


def test_every_is_due_once_in_so_many_seconds(clock: Clock) -> None:
    every = Every(30, clock)
    due = []
    for _ in range(70):
        clock.now += 1
        due.append(every.due)
    assert [second for second, is_due in enumerate(due, start=1) if is_due] == [30, 60]


def work(clock: Clock, seconds: list[float]) -> Iterator[float]:
    for each in seconds:
        clock.now += each
        yield each


def test_a_stage_without_a_terminal_says_a_line_every_30_seconds(clock: Clock, said: Said) -> None:
    countdown_of = Countdown("calibrate", 8, said.say, clock)
    assert len(list(counted(work(clock, [20.0, *[10.0] * 7]), countdown_of))) == 8
    assert said.lines == [
        "calibrate: 1 of 8",
        "calibrate: 4 of 8, about 40 s left",
        "calibrate: 7 of 8, about 10 s left",
    ]


def test_terminal_counts_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    def stopped(label: str, total: int, say: Callable[[str], None]) -> Countdown:
        return Countdown(label, total, say, clock)

    monkeypatch.setattr(screen, "Countdown", stopped)
    assert sum(Terminal("x").track(work(clock, [25.0, 25.0, 30.0]), 3, "float model")) == 80
    assert capsys.readouterr().out == "float model: 1 of 3\nfloat model: 2 of 3, about 30 s left\n"
    assert countdown.SECONDS_BETWEEN_LINES == 30


def test_time_left_of_a_race_is_at_most_what_those_still_in_it_need(clock: Clock, said: Said) -> None:
    race = Race(RaceRules(100, 10, tie_margin=0.0))
    for name in ("c0", "c1", "c2"):
        race.enter(name)
    live = LiveRace(race, Evaluation(np.arange(1), np.zeros(1, int), {"correct": np.ones(1, bool)}), said, clock=clock)
    with live:
        clock.now += 100  # workers start
        for start in range(0, 40, 10):
            for name in race.names:
                if race.decision(name) is None:
                    right = np.full(10, name == "c0")
                    race.record(name, start, {"correct": right})
                    clock.now += 2.5
                    live.progressed(name, 10)
                    for decision in race.judge():
                        live.enter(decision.name, "label")
                        live.decided(decision)
    beaten = {name: race.decision(name) for name in ("c1", "c2")}
    assert all(decision is not None for decision in beaten.values())
    assert live.images_left == 60, "c0 alone has images left"
    assert live.time_left == "at most 15 s left"
    assert said.lines[0] == "0 of 3 candidates decided, 10 of at most 300 images evaluated"
    text = live.progress
    assert text.startswith("2 of 3 candidates decided, ")
    assert text.endswith(", 4 images/s, at most 15 s left")
    console = Console(file=io.StringIO(), width=200)
    console.print(live.table())
    assert text in console.file.getvalue()  # type: ignore[attr-defined]
    more = LiveRace(race, Evaluation(np.arange(1), np.zeros(1, int), {}), said, True, clock)
    for _ in range(2):
        clock.now += 1
        more.progressed("c0", 10)
    assert more.time_left == "", "nothing was done meanwhile"


def test_the_live_table_fits_into_80_columns(clock: Clock, said: Said) -> None:
    race = Race(RaceRules(100, 50))
    said.console = Console(file=io.StringIO(), width=80)
    float_model = Evaluation(np.arange(9999), np.zeros(9999, int), {"correct": np.ones(9999, bool)})
    live = LiveRace(race, float_model, said, clock=clock)
    for i in range(3):
        race.enter(f"c{i}")
        live.enter(f"c{i}", f"ft1 percentile 99.999 n={i} w8a8 " + "x" * 40)
    race.record("c0", 0, {"correct": np.ones(50, bool), "kl": np.full(50, 0.125, np.float32)})
    said.console.print(live.table())
    lines = said.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    label = cells[1].pop(0)
    assert cells[0] == ["float", "9999", "100.00 %", "", ""]
    assert cells[1] == ["50", "100.00 %", "0.12500", "racing"]
    assert label.startswith("c0 ft1 percentile 99.999")
    assert label.endswith("…")
    assert [row[-1] for row in cells[2:]] == ["waiting", "waiting"]


def test_time_left_says_where_more_settings_may_come(clock: Clock, said: Said) -> None:
    race = Race(RaceRules(30, 10))
    race.enter("c0")
    live = LiveRace(race, Evaluation(np.arange(1), np.zeros(1, int), {}), said, True, clock)
    for start in (0, 10):
        clock.now += 31
        race.record("c0", start, {"correct": np.ones(10, bool)})
        live.progressed("c0", 10)
    assert said.lines[-1].endswith("at most 31 s left for the settings proposed so far")


def test_plans_of_many_settings_are_counted(clock: Clock, said: Said) -> None:
    live = LiveRace(Race(RaceRules(30, 10)), Evaluation(np.arange(1), np.zeros(1, int), {}), said, clock=clock)
    for done in range(5):
        live.planned(done, 5)
        clock.now += 16
    assert said.lines == ["plans of settings: 2 of 5, about 48 s left", "plans of settings: 4 of 5, about 16 s left"]


def step(number: int, of: int = 12) -> StepReport:
    return StepReport(
        epoch=1, step=number, total_steps=of, loss=2.0, lr=0.1, grad_norm=1.0, images=8, images_per_second=4.0
    )


def test_time_left_of_a_training_counts_the_evaluations_too(clock: Clock, said: Said) -> None:
    with TrainingProgress(2, said, clock) as progress:
        for number in (1, 2, 3):
            clock.now += 10
            progress.step(step(number))
        clock.now += 8  # the evaluation between
        progress.epoch(EpochReport(1, 3, 2.0, Counts(10, {"top1_correct": 5}), True))
        for number in (4, 5, 6):
            clock.now += 10
            progress.step(step(number))
    assert said.lines == [
        "step 3/12, epoch 1/2, loss 2.0000, 4 images/s, about 1 min 30 s left",
        "epoch 1/2: loss 2.0000, 50.00 % of 10 selection images, best so far",
        "step 6/12, epoch 1/2, loss 2.0000, 4 images/s, about 1 min 10 s left",
    ]


def test_evaluations_of_a_training_are_counted(clock: Clock, said: Said) -> None:
    train, val = object.__new__(SampleIndex), object.__new__(SampleIndex)

    def read(index: SampleIndex, ids: object, transform: object, batch_size: int) -> Iterator[float]:
        return work(clock, [20.0] * 3)

    with TrainingProgress(2, said, clock) as progress:
        shown = progress.shown(read, val)  # type: ignore[arg-type]
        assert len(list(shown(train, range(25), None, 10))) == 3  # type: ignore[arg-type]
        assert not said.lines
        assert len(list(shown(val, range(25), None, 10))) == 3  # type: ignore[arg-type]
    assert said.lines == ["evaluate: 1 of 3"]


@pytest.mark.parametrize(("encoding", "shows"), [("utf-8", True), ("ascii", False), ("latin-1", False)])
def test_what_a_terminal_can_show(encoding: str, shows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert Terminal("x").can_show(SYMBOLS) is shows
    assert Terminal("x").can_show("ox#|")
