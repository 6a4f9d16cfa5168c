from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_setting
from vitq_ray.base.config import InputError
from vitq_ray.search.space import load_space, percentiles

SPACES = Path(__file__).resolve().parents[1] / "search_spaces"


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
