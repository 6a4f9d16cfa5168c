from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT, make_setting
from vitq_ray.base.config import InputError
from vitq_ray.calibration.planner import needs_of
from vitq_ray.calibration.scales import kinds_of, require_possible
from vitq_ray.calibration.setting import Setting, require_sites
from vitq_ray.search.proposals import Round, proposals
from vitq_ray.search.space import load_space, percentiles, space_of

SPACES = ROOT / "search_spaces"


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def test_percentiles_are_spread_on_a_log_scale() -> None:
    assert percentiles(99, 99.9999, 5) == (99.0, 99.9, 99.99, 99.999, 99.9999)
    assert percentiles(90, 99, 3) == pytest.approx((90, 100 - 10**0.5, 99))


@pytest.mark.parametrize("arguments", [(99, 99, 3), (99.9, 99, 3), (99, 100, 3), (-1, 99, 3), (99, 99.9, 1)])
def test_percentiles_refuses(arguments: tuple[float, float, int]) -> None:
    with pytest.raises(InputError, match="expected 0 <= low < high < 100 and count >= 2"):
        percentiles(*arguments)


def test_grid(tmp_path: Path) -> None:
    text = 'SPACE = {"mode": ["ft1", "ft2"], "calibrator": ["max", "percentile"], "percentile": [99, 99.9]}'
    settings = load_space(write(tmp_path, text)).grid(make_setting(num_batches=3, weight_bits=4))
    rows = [(s.mode, str(s.calibrator), s.num_batches, s.weight_bits, s.act_bits) for s in settings]
    assert rows == [
        (mode, calibrator, 3, 4, 8)
        for mode in ("ft1", "ft2")
        for calibrator in ("max", "percentile 99", "percentile 99.9")
    ]


def test_bundled_space_has_48_distinct_settings() -> None:
    settings = load_space(str(SPACES / "calib.py")).grid(make_setting())
    assert len(settings) == len(set(settings)) == 48
    assert {s.num_batches for s in settings} == {2, 8, 32}


def labels(path: str, defaults: Setting | None = None) -> list[str]:
    return [setting.label for setting in load_space(path).grid(defaults or make_setting())]


def test_site_patterns_are_columns(tmp_path: Path) -> None:
    text = """SPACE = {"mode": ["ft1"], "calibrator": ["max"], "num_batches": [2],
        "0.attn.*": [None, "mse"], "gelu_output": [None, "x 0.9", "off"]}"""
    assert labels(write(tmp_path, text)) == [
        # gelu_output is a name of the table and comes before patterns of the file, in the grid and among the rules
        "ft1 max n=2 w8a8",
        "ft1 max n=2 w8a8 0.attn.* -> mse",
        "ft1 max n=2 w8a8 gelu_output -> x 0.9",
        "ft1 max n=2 w8a8 gelu_output -> x 0.9, 0.attn.* -> mse",
        "ft1 max n=2 w8a8 gelu_output -> off",
        "ft1 max n=2 w8a8 gelu_output -> off, 0.attn.* -> mse",
    ]


def test_lists_of_rules(tmp_path: Path) -> None:
    text = """SPACE = {"calibrator": ["max"], "rules": [(), ["1.* -> 6 bits", ("0.ffn.*", "percentile 99")]]}"""
    assert labels(write(tmp_path, text)) == [
        "ft2 max n=10 w8a8",
        "ft2 max n=10 w8a8 1.* -> 6 bits, 0.ffn.* -> percentile 99",
    ]


def test_numbers_in_the_text_or_in_a_column(tmp_path: Path) -> None:
    text = 'SPACE = {"calibrator": ["percentile 99", "percentile", "max"], "percentile": [99.5, 99.9]}'
    assert labels(write(tmp_path, text)) == [
        "ft2 percentile 99 n=10 w8a8",
        "ft2 percentile 99.5 n=10 w8a8",
        "ft2 percentile 99.9 n=10 w8a8",
        "ft2 max n=10 w8a8",
    ]


def test_columns_that_are_left_out_are_those_of_the_command_line(tmp_path: Path) -> None:
    defaults = make_setting("ft1", "percentile 97", 3, batch_size=5, rules=("1.* -> 5 bits",))
    settings = load_space(write(tmp_path, 'SPACE = {"act_bits": [4]}')).grid(defaults)
    assert settings == [replace(defaults, act_bits=4)]


def test_patterns_are_checked_against_the_model(tmp_path: Path) -> None:
    space = load_space(write(tmp_path, 'SPACE = {"5.*": [None, "off"], "rules": [["7.ffn.* -> 4 bits"]]}'))
    require_sites(space.rules, depth=8)
    with pytest.raises(InputError, match=r"rule '5\.\* -> off': its pattern matches no site of the 4 blocks"):
        require_sites(space.rules, depth=4)
    with pytest.raises(InputError, match=r"rule '7\.ffn\.\* -> 4 bits': its pattern matches no site"):
        require_sites(space.rules, depth=6)


def test_calibrators_that_a_setting_may_have(tmp_path: Path) -> None:
    text = 'SPACE = {"calibrator": ["max", "percentile 99"], "0.*": [None, "mse"], "rules": [["1.* -> entropy"]]}'
    found = load_space(write(tmp_path, text)).calibrations(make_setting())
    assert sorted(map(str, found)) == ["entropy", "max", "mse", "percentile 99"]
    assert kinds_of(found) == ("histogram",)
    assert kinds_of(load_space(write(tmp_path, 'SPACE = {"calibrator": ["max"]}')).calibrations(make_setting())) == (
        "range",
    )


def told(scores: dict[Setting, float]) -> Round:
    best = max(scores, key=lambda setting: scores[setting])
    return Round(scores, best, lambda setting, other: scores[setting] - scores[other])


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_rules_are_drawn_too(algorithm: str, tmp_path: Path) -> None:
    text = """SPACE = {"mode": ["ft1", "ft2"], "*.fc2.*": [None, "mse", "5 bits"],
        "rules": [[], ["0.* -> 6 bits"], ["1.* -> off"]]}"""
    source = proposals(algorithm, load_space(write(tmp_path, text)), make_setting(), 18, 0)
    found: list[Setting] = []
    while settings := source.next_round():
        found += settings
        source.tell(told(dict.fromkeys(settings, 0.5)))
    assert len({tuple(map(str, s.rules)) for s in found}) == 9
    assert len(found) == len(set(found)) == 18


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('SPACE = {"3.attn.qury*": ["off"]}', r"rule '3.attn.qury\* -> off': its pattern matches no site; sites are"),
        ('SPACE = {"0.attn.*": ["8 bit", "half"]}', r"mine\.py: rule of 0.attn.\*: 'half' is not one of max"),
        ('SPACE = {"0.attn.*": [4]}', r"rule: \('0.attn.\*', 4\) is not of the form"),
        ('SPACE = {"rules": ["0.* -> off"]}', "rules: expected a list of rules, got '0"),
        ('SPACE = {"transforms": [["rotation"]]}', "transforms: 'rotation' is not one of fold"),
        ('SPACE = {"weights": ["entropy"]}', "calibrator of weights: 'entropy' is not one of max, mse"),
        ("SPACE = {", r"mine\.py: line 1: SyntaxError"),
        ("x = 1\ny = x / 0", r"mine\.py: line 2: ZeroDivisionError: division by zero"),
        ("x = 1", "SPACE is NoneType, expected a dictionary"),
        ("SPACE = [1]", "SPACE is list, expected a dictionary"),
        ('SPACE = {"modes": ["ft1"]}', "SPACE has the key 'modes'; the keys are mode, calibrator"),
        ('SPACE = {"mode": "ft1"}', r"SPACE\['mode'\] is 'ft1', expected a list of values"),
        ('SPACE = {"mode": []}', r"SPACE\['mode'\] is \[\], expected a list"),
        ('SPACE = {"mode": ["ft9"]}', r"mine\.py: quant mode: 'ft9' is not one of"),
        ('SPACE = {"percentile": [101]}', r"mine\.py: percentile: expected a number in \[0, 100\], got 101"),
        ('SPACE = {"num_batches": ["2"]}', r"expected an integer >= 1, got '2'"),
        (
            "from vitq_ray.search.space import percentiles\nSPACE = {'percentile': percentiles(99, 100, 2)}",
            r"mine\.py: percentiles: expected",
        ),
    ],
)
def test_broken_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_space(write(tmp_path, text))


def test_missing_file() -> None:
    with pytest.raises(InputError, match=r"nowhere\.py: no such file; expected a search space"):
        load_space("nowhere.py")


def test_representatives_need_all_that_a_space_may_need() -> None:
    space = space_of({"calibrator": ("mse",), "transforms": ((), ("rotate",)), "corrections": ((), ("bias",))}, "s.py")
    needs = needs_of(space.representatives(Setting(mode="ft2")), 2)
    assert [len(need.grids) > 0 for need in needs.values()] == [True, True]
    assert all(need.kinds == ("histogram",) for need in needs.values())


def test_small_batches_are_enough_where_the_space_has_many() -> None:
    """Representatives stand for the space: three images are too few to learn from, and no setting has so few."""
    space = space_of({"num_batches": (16,), "corrections": (("learn",), ())}, "s.py")
    defaults = Setting(mode="ft2", num_batches=1, batch_size=3)
    learns = [setting for setting in space.representatives(defaults) if setting.corrections]
    assert len(learns) == 1
    for setting in space.grid(defaults):
        require_possible(setting, 2)
