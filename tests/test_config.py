from __future__ import annotations

import pytest

from vitq_ray.base.config import InputError, QuantSetting


def test_round_trip() -> None:
    setting = QuantSetting("ft1", "percentile", 99.9, 3, 4, 6)
    assert QuantSetting.from_dict(setting.to_dict()) == setting
    assert setting.label == "ft1 percentile 99.9 n=3 w4a6"


def test_defaults_are_those_of_the_command_line() -> None:
    assert QuantSetting() == QuantSetting("ft2", "percentile", 99.99, 10, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "ft9"}, "'ft9' is not one of ft1, ft2, ft3, trt"),
        ({"calibrator": "median"}, "'median' is not one of max, percentile, mse, entropy"),
        ({"percentile": 100.5}, r"expected a number in \[0, 100\], got 100.5"),
        ({"percentile": float("nan")}, r"expected a number in \[0, 100\], got nan"),
        ({"percentile": None}, "got None"),
        ({"calibrator": "max"}, "99.99 given with calibrator 'max'"),
        ({"num_batches": 0}, "expected an integer >= 1, got 0"),
        ({"num_batches": True}, "got True"),
        ({"weight_bits": 9}, "weight bits: expected an integer from 2 to 8, got 9"),
        ({"act_bits": 1}, "activation bits: expected an integer from 2 to 8, got 1"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantSetting.from_dict(QuantSetting().to_dict() | changes)


@pytest.mark.parametrize("percentile", [0, 0.0, 100, 100.0])
def test_ends_of_the_percentile_range(percentile: float) -> None:
    assert QuantSetting(percentile=percentile).percentile == percentile


def test_unknown_key() -> None:
    with pytest.raises(InputError, match="unknown key 'mod'; the keys are mode, calibrator"):
        QuantSetting.from_dict({"mod": "ft1"})
