"""Numbers and spans as people read them."""

from __future__ import annotations

from vitq_ray.measure.paired import Interval


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def percent_interval(interval: Interval) -> str:
    """E.g. `90.04 % (89.18 to 90.84)`."""
    return f"{percent(interval.value)} ({100 * interval.low:.2f} to {100 * interval.high:.2f})"


def signed_points(interval: Interval) -> str:
    """Points of accuracy, e.g. `−1.46 (−2.02 to −0.88)`."""
    return f"{_signed(interval.value)} ({_signed(interval.low)} to {_signed(interval.high)})"


def _signed(fraction: float) -> str:
    points = round(100 * fraction, 2)
    return f"{points:+.2f}".replace("-", "−") if points else "0.00"


def times(interval: Interval) -> str:
    """A ratio, e.g. `×1.84 (1.70 to 1.99)`."""
    return f"×{_three(interval.value)} ({_three(interval.low)} to {_three(interval.high)})"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def nats(value: float) -> str:
    """A KL: three digits, small ones as powers."""
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """E.g. `82 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 setting`, `2 settings`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
