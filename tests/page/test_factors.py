"""What matters: shares that are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import make_setting
from vitq_ray.page.factors import INTERPLAY, importance, varied
from vitq_ray.page.search_charts import rank_correlation

MODES, CALIBRATORS, BATCHES = ("ft1", "ft2"), ("max", "mse", "percentile 99.9"), (2, 8)
GRID = [make_setting(m, c, n) for m in MODES for c in CALIBRATORS for n in BATCHES]


def test_shares_of_a_full_grid_are_those_of_its_parts() -> None:
    """A sum of a part for every field: the variances of the parts are the shares, and nothing is left."""
    mode, calibrator = {"ft1": -1.0, "ft2": 1.0}, {"max": 0.0, "mse": 3.0, "percentile 99.9": -3.0}
    found = importance(GRID, [mode[s.mode] + calibrator[str(s.calibrator)] for s in GRID])
    assert found is not None
    assert found.exact
    assert found.shares == {
        "calibrator": pytest.approx(6 / 7),
        "mode": pytest.approx(1 / 7),
        "num_batches": pytest.approx(0),
        INTERPLAY: pytest.approx(0, abs=1e-12),
    }
    assert list(found.shares)[:2] == ["calibrator", "mode"]


def test_what_no_field_explains_alone_is_interplay() -> None:
    found = importance(GRID, [float((s.mode == "ft1") == (s.num_batches == 2)) for s in GRID])
    assert found is not None
    assert found.shares[INTERPLAY] == pytest.approx(1)


def test_where_the_grid_is_not_full_pedanova_finds_what_matters() -> None:
    settings = [s for i, s in enumerate(GRID) if i != 4]
    noise = np.random.default_rng(0).normal(0, 0.01, len(settings))
    found = importance(settings, [float(s.mode == "ft2") + x for s, x in zip(settings, noise, strict=True)])
    assert found is not None
    assert not found.exact
    assert next(iter(found.shares)) == "mode"
    assert sum(found.shares.values()) == pytest.approx(1)


def test_nothing_is_said_of_too_little() -> None:
    assert importance(GRID, [1.0] * len(GRID)) is None
    assert importance(GRID[:1], [1.0]) is None
    assert importance(GRID[:5], [1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert set(varied(GRID)) == {"mode", "calibrator", "num_batches"}


def test_rank_correlation_has_mean_ranks() -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = [1.0, 2.0, 2.0, 5.0, 3.0], [4.0, 1.0, 3.0, 9.0, 3.0]
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0
