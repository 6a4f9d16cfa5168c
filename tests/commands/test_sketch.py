"""The end of a search in a terminal: 80 columns, ASCII where it must be, no sketch where no percentile varies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from tests.conftest import make_setting
from vitq_ray.calibration.setting import Setting
from vitq_ray.commands.sketch import SYMBOLS, WIDTH, Point, draw, paired, sketch_text, table_text
from vitq_ray.measure.racing import Race, RaceRules, standings
from vitq_ray.search.contest import Contest

IMAGES = 40


@dataclass
class Candidate:
    setting: Setting
    same_as: str | None = None


@dataclass
class Raced:
    """A contest as far as its outcome: {setting: its KL on every image}."""

    race: Race
    candidates: dict[str, Candidate] = field(default_factory=dict)

    def outcome(self) -> dict[str, str]:
        return standings(self.race)


def raced(settings: dict[Setting, float], objective: str = "fidelity", labels: bool = True) -> Contest:
    """All of them, on all images; images differ by a factor, and every fourth is wrong from KL 1 on."""
    contest = Raced(Race(RaceRules(IMAGES, IMAGES, objective=objective)))
    spread = 1 + np.arange(IMAGES) % 5
    for i, (setting, kl) in enumerate(settings.items()):
        name = f"c{i:03d}"
        contest.race.enter(name)
        contest.candidates[name] = Candidate(setting)
        results: dict[str, Any] = {"kl": (kl * spread / 3).astype(np.float32), "agree": np.ones(IMAGES, bool)}
        if labels:
            results["correct"] = np.arange(IMAGES) % 4 < (3 if kl >= 1 else 4)
        contest.race.record(name, 0, results)
    contest.race.judge()
    return cast(Contest, contest)


PERCENTILES = (99.0, 99.9, 99.99, 99.999, 99.9999)
SETTINGS = {
    **{make_setting("ft1", f"percentile {p}"): 2.0 / 4**i for i, p in enumerate(PERCENTILES)},
    **{make_setting("ft2", f"percentile {p}"): 2.5 / 4**i for i, p in enumerate(PERCENTILES)},
    make_setting("ft1", "percentile 99", 3): 9.0,  # worse than with more batches
    **{make_setting("ft2", c): kl for c, kl in (("max", 0.5), ("mse", 0.1), ("entropy", 0.2))},
}


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("objective", ["fidelity", "top1"])
def test_it_fits_into_80_columns(objective: str, unicode: bool) -> None:
    contest = raced(SETTINGS, objective)
    texts = [table_text(contest, unicode), sketch_text(contest, unicode)]
    for text in texts:
        assert text is not None
        assert max(map(len, text.splitlines())) <= WIDTH
        assert unicode or text.isascii()
    if unicode:
        assert set("".join(cast(list[str], texts))) - set(SYMBOLS) <= set(map(chr, range(10, 127)))


def test_the_table_has_the_best_first() -> None:
    lines = table_text(raced(SETTINGS)).splitlines()
    assert lines[0].split() == ["images", "top-1", "KL"]
    assert lines[1].split() == [
        "c004",
        "ft1",
        "percentile",
        "99.9999",
        "n=10",
        "w8a8",
        "40",
        "100.00",
        "%",
        "0.00781",
        "best",
    ]
    assert len(lines) == 12
    assert lines[-1] == "and 4 more: 4 beaten"
    assert "top-1" not in table_text(raced(SETTINGS, labels=False)).splitlines()[0]


def test_a_long_label_is_cut() -> None:
    rules = tuple(f"{i}.attn.* -> 6 bits" for i in range(9))
    (_, line) = table_text(raced({make_setting(rules=rules): 1.0})).splitlines()
    assert "…" in line
    assert line.endswith("best")
    assert len(line) <= WIDTH


def test_the_sketch_shows_what_was_measured() -> None:
    text = sketch_text(raced(SETTINGS))
    assert text is not None
    title, *rows = text.splitlines()
    assert title == "mean KL to the float model, nats (log scale), by percentile and calibrator"
    assert rows[0].split("│")[0].strip() == "2.5"
    assert rows[9].split("│")[0].strip() == "0.00781"
    assert rows[0].count("○") == 1, "ft2 at 99 is the worst"
    assert rows[9].count("●") == 1, "ft1 at 99.9999 is the best"
    columns = {name: text.index(name) for name in ("99 ", "99.9", "99.99", "entropy", "max", "mse")}
    assert list(columns.values()) == sorted(columns.values())
    marks = "".join(rows[:10])
    assert marks.count("●") == 5
    assert marks.count("○") == 8
    assert rows[-1].split() == ["●", "ft1", "w8a8", "○", "ft2", "w8a8"]


def test_no_sketch_where_no_percentile_varies() -> None:
    assert sketch_text(raced({make_setting("ft1", c): 1.0 for c in ("max", "mse", "percentile 99.9")})) is None


def test_one_that_was_stopped_is_set_against_the_best_on_the_images_of_both() -> None:
    """The first images are the easy ones: their mean alone would flatter."""
    race = Race(RaceRules(IMAGES, 10, objective="fidelity"))
    kl = np.linspace(0.1, 2, IMAGES).astype(np.float32)
    for name in ("c0", "c1"):
        race.enter(name)
    race.record("c0", 0, {"kl": kl})
    race.record("c1", 0, {"kl": 2 * kl[:20]})
    race.judge()
    assert race.leader() == "c0"
    assert paired(race, "c1") == pytest.approx(2 * kl.mean())
    assert race.mean("c1", 20) < paired(race, "c1")


def test_many_columns_and_series_and_equal_values() -> None:
    columns = [f"99.{i:02d}" for i in range(60)]
    points = [Point(column, f"s{i % 11}", 1.0) for i, column in enumerate(columns)]
    for line in draw(points, columns, log=True, unicode=False):
        assert len(line) <= WIDTH
