"""How much of a winner stays in float, where a target says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_vit

from vitq_ray.commands import tune_float
from vitq_ray.commands.tune_float import SHARES, FloatSet, leave_in_float
from vitq_ray.quant.plan import Plan, SitePlan, rules_of_mode
from vitq_ray.quant.sites import MODES
from vitq_ray.quant.vit import quantize_vit

FLOAT = 0.9


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def chosen(
    monkeypatch: pytest.MonkeyPatch, drops: dict[float, float], target: float
) -> tuple[FloatSet, str, list[float]]:
    """What `auto` takes where {share: points below float} is what sets would come to, what it says, shares it tried."""
    asked: list[float] = []

    class Sets:
        def __init__(self, *args: Any) -> None:
            self.tried: list[FloatSet] = []

        def best_at(self, share: float) -> FloatSet:
            asked.append(share)
            return FloatSet(None, "measured", share, SimpleNamespace(top1=FLOAT - drops[share] / 100))  # type: ignore[arg-type]

    monkeypatch.setattr(tune_float, "FloatSets", Sets)
    model = quantize_vit(tiny_vit()).eval()
    plan = Plan(
        "ft2", {key: SitePlan(torch.ones(()), rule) for key, rule in rules_of_mode(MODES["ft2"], 8, 8, 2).items()}
    )
    job = SimpleNamespace(options=SimpleNamespace(int8_share="auto", target_drop=target), model=model)
    winner, screen = SimpleNamespace(plan=plan), Said()
    whole = SimpleNamespace(top1=FLOAT - drops[1.0] / 100)
    found, _ = leave_in_float(job, None, None, None, winner, whole, SimpleNamespace(top1=FLOAT), screen)  # type: ignore[arg-type]
    return found, screen.lines[-1], asked


def test_auto_takes_the_first_share_that_meets_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    drops = {1.0: 3.0, **{share: 3.0 - place for place, share in enumerate(SHARES)}}
    found, said, asked = chosen(monkeypatch, drops, 1.0)
    assert found.share == SHARES[2]
    assert asked == list(SHARES[:3])
    assert said.endswith("target met")


def test_nothing_stays_in_float_where_the_winner_meets_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    found, said, asked = chosen(monkeypatch, {1.0: 0.4}, 0.5)
    assert found.by == "all in integers"
    assert not asked
    assert "0.40 points below float, target met" in said


def test_where_no_share_meets_the_target_auto_takes_what_comes_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    drops = {1.0: 3.0, **dict.fromkeys(SHARES, 2.5), SHARES[3]: 1.25}
    found, said, asked = chosen(monkeypatch, drops, 0.5)
    assert found.share == SHARES[3]
    assert asked == list(SHARES)
    assert said == "96.00 % in integers: 1.25 points below float, target not met by any share; this comes closest"
