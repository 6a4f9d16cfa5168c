"""Settings and their rules: values, texts, refusals, and what files of format 1 hold."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from vitq_ray.base.config import InputError
from vitq_ray.calibration.calibrators import CALIBRATORS, Calibration
from vitq_ray.calibration.setting import Rule, Setting, read_setting, require_sites

RULES = (
    "0.attn.* -> percentile 99.9",
    "*.ffn.fc2._input* -> x 0.9",
    "*.attn.matmul_a_input_quantizer -> 6 bits",
    "attention_probabilities -> off",
    "attention_probabilities -> unsigned",
    "1.ffn.* -> asymmetric",
    "1.ffn.fc1.* -> signed",
)


def test_round_trip_through_json() -> None:
    setting = Setting.from_dict({"mode": "ft1", "calibrator": "percentile 99.9", "act_bits": 6, "rules": list(RULES)})
    again = Setting.from_dict(json.loads(json.dumps(setting.to_dict())), complete=True)
    assert again == setting
    assert hash(again) == hash(setting)
    assert [str(rule) for rule in setting.rules] == list(RULES)
    assert setting.label == f"ft1 percentile 99.9 n=10 w8a6 {', '.join(RULES)}"


def test_defaults_are_those_of_the_command_line() -> None:
    assert Setting().to_dict() == {
        "mode": "ft2",
        "calibrator": "percentile 99.99",
        "num_batches": 10,
        "batch_size": 8,
        "weight_bits": 8,
        "act_bits": 8,
        "weights": "max",
        "rules": [],
        "transforms": [],
        "corrections": [],
    }
    assert Setting().label == "ft2 percentile 99.99 n=10 w8a8"


@pytest.mark.parametrize("number", [99.99683772234, 0.1, 1e-9, 100.0])
def test_texts_of_calibrators_are_exact(number: float) -> None:
    assert Calibration.parse(str(Calibration("percentile", (number,)))).values == (number,)


def test_order_of_rules_matters() -> None:
    a, b = replace(Setting(), rules=RULES[:2]), replace(Setting(), rules=RULES[1::-1])
    assert a != b


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "ft9"}, "'ft9' is not one of ft1, ft2, ft3, trt"),
        ({"calibrator": "median"}, "'median' is not one of max, percentile P (0 to 100), mse, entropy"),
        ({"calibrator": "percentile 100.5"}, "'percentile 100.5' is not one of"),
        ({"calibrator": "percentile nan"}, "'percentile nan' is not one of"),
        ({"calibrator": "percentile"}, "'percentile' is not one of"),
        ({"calibrator": "max 99"}, "'max 99' is not one of"),
        ({"calibrator": 7}, "calibrator: 7 is not one of"),
        ({"num_batches": 0}, "expected an integer >= 1, got 0"),
        ({"num_batches": True}, "got True"),
        ({"batch_size": 0}, "images of a calibration batch: expected an integer >= 1, got 0"),
        ({"weight_bits": 9}, "weight bits: expected an integer from 2 to 8, got 9"),
        ({"act_bits": 1}, "activation bits: expected an integer from 2 to 8, got 1"),
        ({"weights": "entropy"}, "calibrator of weights: 'entropy' is not one of max, mse"),
        ({"rules": "0.* -> off"}, "rules: expected a list, got '0"),
        ({"rules": ["0.attn.*"]}, "rule: '0.attn.*' is not of the form 'site pattern -> "),
        ({"rules": ["0.attn.* -> on"]}, "rule of 0.attn.*: 'on' is not one of max"),
        ({"rules": ["0.attn.* -> 9 bits"]}, "rule of 0.attn.*: bits: expected an integer from 2 to 8, got 9"),
        ({"rules": ["0.attn.* -> x 0"]}, "rule of 0.attn.*: factor: expected a number > 0, got 0.0"),
        ({"rules": ["0.attn.* -> x nan"]}, "factor: expected a number > 0, got nan"),
        ({"rules": [3]}, "rule: 3 is not of the form"),
        (
            {"transforms": ["rotation"]},
            "transforms: 'rotation' is not one of fold, rotate, shift, heads, balance, migrate",
        ),
        ({"corrections": ["bias 1"]}, "corrections: bias takes no strength, got 'bias 1'"),
        ({"transforms": ["balance 9"]}, "transforms: balance: strength: expected a number in [-2, 2], got '9'"),
        ({"transforms": ["fold", "fold"]}, "transforms: fold, fold: one is named twice"),
        ({"mod": "ft1"}, "Setting: unknown key 'mod'; the keys are mode, calibrator"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Setting.from_dict(Setting().to_dict() | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("number", [100.5, float("nan"), float("inf"), True, "99"])
def test_numbers_of_calibrators_are_checked(number: Any) -> None:
    with pytest.raises(InputError, match=r"percentile: expected a number in \[0, 100\], got"):
        Calibration("percentile", (number,))


@pytest.mark.parametrize("percentile", [0, 0.0, 100, 100.0])
def test_ends_of_the_percentile_range(percentile: float) -> None:
    assert Calibration("percentile", (percentile,)).values == (percentile,)


def test_a_rule_has_exactly_one_action() -> None:
    twice = ({"bits": 4, "off": True}, {"factor": 1.0, "calibrator": Calibration("max")}, {"grid": "signed", "bits": 4})
    for actions in ({}, *twice):
        with pytest.raises(InputError, match="rule of 0: expected one of max"):
            Rule("0", **actions)


@pytest.mark.parametrize(
    ("pattern", "depth", "count"),
    [("0.attn.*", 2, 17), ("*.ffn.fc2._input*", 3, 3), ("1.*", 2, 29), ("gemm_outputs", 2, 12), ("*", 2, 58)],
)
def test_patterns_are_matched_with_block_and_site(pattern: str, depth: int, count: int) -> None:
    from vitq_ray.quant.sites import sites_of_blocks

    rule = Rule(pattern, off=True)
    assert sum(map(rule.matches, sites_of_blocks(depth))) == count
    require_sites([rule], depth)


@pytest.mark.parametrize("pattern", ["2.attn.*", "attn.query", "0.attn.quer", "transformer.*"])
def test_a_pattern_that_matches_no_site_is_named(pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        require_sites([Rule("*", bits=4), Rule(pattern, off=True)], depth=2)
    assert f"rule '{pattern} -> off': its pattern matches no site of the 2 blocks" in str(caught.value)


def test_format_1() -> None:
    """As version 0.1.0 wrote it."""
    old = {
        "mode": "ft1",
        "calibrator": "percentile",
        "percentile": 99.9,
        "num_batches": 3,
        "weight_bits": 4,
        "act_bits": 6,
        "attention_probabilities": None,
        "gelu_output": "mse",
        "gemm_outputs": "percentile 99",
        "weights": "mse",
    }
    rules = ("gelu_output -> mse", "gemm_outputs -> percentile 99")
    new = Setting("ft1", "percentile 99.9", 3, 16, 4, 6, "mse", rules)  # type: ignore[arg-type]
    assert read_setting(old, 1, batch_size=16) == new
    assert read_setting(old | {"calibrator": "max", "percentile": None}, 1).calibrator == Calibration("max")
    with pytest.raises(InputError, match="missing key 'weights'"):
        read_setting({k: v for k, v in old.items() if k != "weights"}, 1)
    with pytest.raises(InputError, match="calibrator max: takes no number"):
        read_setting(old | {"calibrator": "max"}, 1)


def test_every_row_of_the_table_has_a_text() -> None:
    for row in CALIBRATORS.values():
        text = " ".join((row.name, *(f"{p.default:g}" for p in row.parameters)))
        assert str(Calibration.parse(text)) == text
