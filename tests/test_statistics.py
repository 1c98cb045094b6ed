"""core/statistics.py: confidence intervals."""

import pytest

import core.statistics
from core.statistics import wilson_interval


def test_rounding_moves_no_interval_out_of_its_range():
    for count in range(1, 400):
        low, high = wilson_interval(1e-17, count, 1.96)
        assert 0 <= low <= high <= 1
        low, high = wilson_interval(1 - 1e-16, count, 1.96)
        assert 0 <= low <= high <= 1


def test_intervals():
    """Wilson's interval by hand; the normal one beyond 0 and 1. The ends 0 and 1 are exact."""
    assert all(
        core.statistics.confidence_interval([0.0] * n)[0] == 0.0
        and core.statistics.confidence_interval([1.0] * n)[1] == 1.0
        for n in range(1, 40)
    )
    assert core.statistics.confidence_interval([1.0] * 5 + [0.0] * 5) == pytest.approx(
        (0.2366, 0.7634), abs=1e-4
    )
    assert core.statistics.confidence_interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert core.statistics.confidence_interval([2.0, 4.0]) == pytest.approx(
        (3 - 1.96, 3 + 1.96), abs=1e-3
    )
    assert (
        core.statistics.mean_with_interval("x", []) == {}
        and core.statistics.mean_with_interval("x", [0.5])["x_n"] == 1
    )
