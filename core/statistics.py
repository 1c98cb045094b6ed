"""Confidence intervals and the comparison of metrics before and after training."""

from __future__ import annotations

import math
import statistics
from typing import Mapping, Sequence


def confidence_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the confidence interval of the mean of values: Wilson's where all lie between 0 and 1 (Wilson 1927; with
    values in between it is too wide, never too narrow), else the mean +- z standard errors."""
    n, mean, z = (
        len(values),
        statistics.fmean(values),
        statistics.NormalDist().inv_cdf((1 + confidence) / 2),
    )
    if 0 <= min(values) and max(values) <= 1:
        centre, spread = (
            mean + z * z / (2 * n),
            z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2),
        )
        low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
        return low * (mean > 0), high if mean < 1 else 1.0  # no rounding where the ends are known
    error = z * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return mean - error, mean + error


def mean_with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """{name: mean, name_low, name_high: its 95% interval, name_n: of how many}; empty without values."""
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
    """{name: "before -> after"} of the metrics taken both before and after training."""
    pairs = {
        name: (metrics[f"{name}_before"], value)
        for name, value in metrics.items()
        if f"{name}_before" in metrics
    }
    return {
        name: f"{before:.3f} -> {after:.3f}"
        for name, (before, after) in pairs.items()
        if isinstance(before, int | float) and isinstance(after, int | float)
    }
