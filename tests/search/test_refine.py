"""Coordinate steps from the best setting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from conftest import make_setting

from vitq_ray.calibration.calibrators import Calibration
from vitq_ray.calibration.scales import require_possible
from vitq_ray.calibration.setting import Setting
from vitq_ray.quant.sites import site_key
from vitq_ray.search.proposals import ListProposals, Round
from vitq_ray.search.refine import Refinement

LOSSES = {
    site_key(0, "attn.matmul_a_input_quantizer"): 0.6,
    site_key(1, "ffn.fc2._weight_quantizer"): 0.3,
    site_key(1, "attn.query._input_quantizer"): 0.05,
    site_key(0, "ffn.fc1._input_quantizer"): 0.001,  # too little to be worth a step of its family
}
ACTIONS = {"x 0.8": 0.1, "x 1.25": -0.1, "mse": 0.05}


def search(value: Callable[[Setting], float], source: list[Setting]) -> list[list[Setting]]:
    """The rounds of a search in which every setting is worth `value`."""
    calibrations = [Calibration("max"), Calibration("mse")]
    refinement = Refinement(
        ListProposals(source), lambda setting: LOSSES, calibrations, 2, partial(require_possible, depth=2)
    )
    rounds: list[list[Setting]] = []
    while settings := refinement.next_round():
        rounds.append(settings)
        best = max((s for r in rounds for s in r), key=value)
        refinement.tell(Round({s: value(s) for s in settings}, best, lambda a, b: value(a) - value(b)))
    return rounds


def actions(setting: Setting) -> list[str]:
    return [str(rule) for rule in setting.rules]


def test_steps_that_gain_are_taken_together() -> None:
    base, worse = make_setting("ft2", "max"), make_setting("ft1", "max")

    def value(setting: Setting) -> float:
        of_rules = {rule.pattern: ACTIONS[rule.action] for rule in setting.rules}  # a later one of a family wins
        return (setting.mode == "ft2") + sum(of_rules.values())

    first, families, together, sites, last = search(value, [worse, base])
    assert first == [worse, base]
    assert {s.mode for s in families} == {"ft2"}
    assert [actions(s) for s in families[:3]] == [
        [f"*.attn.query._input_quantizer -> {action}"] for action in ("x 0.8", "x 1.25", "mse")
    ]
    patterns = {s.rules[0].pattern for s in families}
    assert patterns == {
        "*.attn.query._input_quantizer",
        "*.attn.matmul_a_input_quantizer",
        "*.ffn.fc2._weight_quantizer",
    }
    assert len(families) == 9  # mse can calibrate weights, too
    best = {rule.pattern: rule.action for rule in max(together, key=value).rules}
    assert best == dict.fromkeys(patterns, "x 0.8")
    assert all(len(s.rules) == len(max(together, key=value).rules) + 1 for s in sites)
    assert "0.attn.matmul_a_input_quantizer -> x 0.8" in actions(sites[0])
    assert len(max(last, key=value).rules) > len(sites[0].rules)
    everything = [s for r in (first, families, together, sites, last) for s in r]
    assert len(everything) == len(set(everything))


def test_where_nothing_gains_the_search_ends_with_its_best() -> None:
    base = make_setting("ft2", "max")
    rounds = search(lambda setting: -len(setting.rules), [base])
    assert [len(r) for r in rounds[:2]] == [1, 9]
    assert all(len(setting.rules) == 1 for r in rounds[1:] for setting in r)  # nothing is put together
