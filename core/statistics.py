"""Confidence intervals, and the comparison of metrics before and after training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

Z_95 = statistics.NormalDist().inv_cdf(0.975)  # standard errors to each side of a 95% interval


def wilson_interval(mean: float, n: int, z: float) -> tuple[float, float]:
    """Wilson's score interval (Wilson 1927) of the mean of n values between 0 and 1."""
    # The center is between the mean and 1/2, which keeps the interval inside 0 and 1.
    z_squared = z * z
    shift = z_squared / (2 * n)
    center = mean + shift
    variance = mean * (1 - mean) / n
    correction = z / (2 * n)
    spread_squared = variance + correction**2
    spread = z * math.sqrt(spread_squared)
    scale = 1 + z_squared / n
    low = (center - spread) / scale
    high = (center + spread) / scale
    # If all values are 0, or all are 1, that bound is exact, but rounding would move it.
    if mean <= 0:
        low = 0.0
    if mean >= 1:
        high = 1.0
    return max(low, 0.0), min(high, 1.0)


def normal_interval(values: Sequence[float], z: float) -> tuple[float, float]:
    """The mean of `values` +- z standard errors; too narrow below about 30 values."""
    # One value has no standard deviation.
    if len(values) == 1:
        return -math.inf, math.inf
    mean = statistics.fmean(values)
    error = z * statistics.stdev(values) / math.sqrt(len(values))
    return mean - error, mean + error


def confidence_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of the confidence interval of the mean of `values`.

    If all values are between 0 and 1 it is Wilson's score interval (Wilson 1927), which is for
    values of 0 and 1, and too wide rather than too narrow for values in between. Otherwise it is
    the mean +- z standard errors.
    """
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    if min(values) >= 0 and max(values) <= 1:
        return wilson_interval(statistics.fmean(values), len(values), z)
    return normal_interval(values, z)


def mean_with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """{name: mean, name_low, name_high: 95% interval, name_n: count}; {} without values."""
    if not values:
        return {}
    low, high = confidence_interval(values)
    return {
        name: statistics.fmean(values),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_n": len(values),
    }


def before_and_after(metrics: Mapping[str, float]) -> dict[str, str]:
    """{name: "before -> after"} of the metrics measured both before and after training."""
    changes = {}
    for name, after in metrics.items():
        before = metrics.get(f"{name}_before")
        if isinstance(before, int | float) and isinstance(after, int | float):
            changes[name] = f"{before:.3f} -> {after:.3f}"
    return changes
