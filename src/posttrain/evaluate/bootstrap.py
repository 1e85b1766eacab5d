"""Confidence intervals of means per token, by resampling windows.

Tokens of one window depend on each other, so the window is the unit that is drawn. The interval
is the bias-corrected and accelerated (BCa) bootstrap interval of Efron (1987), which follows the
skew of the data, with its tails taken from Student's t at n - 1 degrees of freedom and widened
by sqrt(n / (n - 1)) (Hesterberg 2015, "expanded percentile"): plain bootstrap intervals of few
windows are too narrow.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_CHUNK = 4_000_000  # drawn counts held at a time
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval; None with fewer than 2 windows."""

    mean: float
    low: float | None
    high: float | None


def bootstrap_mean(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Intervals of ``sum(sums) / sum(counts)`` for each column.

    ``sums`` and ``counts`` are ``[windows, columns]``: the sum of a quantity over the scored
    tokens of a window, and their number. The same windows are drawn for every column, and for
    every call with the same seed and number of windows: intervals of paired data are paired.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    means = sums.sum(0) / counts.sum(0)
    if len(sums) < 2:
        return [Interval(float(mean), None, None) for mean in means]
    drawn = _resampled_means(sums, counts, resamples, np.random.default_rng(seed))
    skews = _acceleration(sums, counts)
    tail = _expanded_tail((1 - confidence) / 2, len(sums))
    return [_bca(float(mean), drawn[:, i], float(skews[i]), tail) for i, mean in enumerate(means)]


def _resampled_means(
    sums: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    windows = len(sums)
    step = max(1, _CHUNK // windows)
    parts = []
    for start in range(0, resamples, step):
        draws = min(step, resamples - start)
        times = rng.multinomial(windows, np.full(windows, 1 / windows), size=draws)
        with np.errstate(invalid="ignore"):  # a column whose drawn windows have no token: NaN
            parts.append((times @ sums) / (times @ counts))
    return np.concatenate(parts)


def _acceleration(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Skewness of the mean, from the means without one window each (jackknife), ``[columns]``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        without = (sums.sum(0) - sums) / (counts.sum(0) - counts)
        deviation = np.nanmean(without, 0) - without
        skew = np.nansum(deviation**3, 0) / (6 * np.nansum(deviation**2, 0) ** 1.5)
    return np.nan_to_num(skew, posinf=0, neginf=0)


def _expanded_tail(tail: float, windows: int) -> float:
    """Normal quantile (negative) to read the bootstrap distribution at, for a tail probability."""
    z, v = _NORMAL.inv_cdf(tail), windows - 1
    # Student's t quantile, Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return t * math.sqrt(windows / v)


def _bca(mean: float, drawn: np.ndarray, acceleration: float, tail: float) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if np.ptp(drawn) <= 1e-12 * max(abs(mean), 1e-30):  # identical windows: nothing but rounding
        return Interval(mean, mean, mean)
    below = ((drawn < mean).sum() + 0.5 * (drawn == mean).sum()) / len(drawn)
    bias = _NORMAL.inv_cdf(min(max(below, 1e-6), 1 - 1e-6))

    def bound(z: float) -> float:
        shifted = bias + z
        stretch = max(1 - acceleration * shifted, 0.1)  # past that BCa has no meaning
        level = _NORMAL.cdf(bias + shifted / stretch)
        return float(np.quantile(drawn, level))

    return Interval(mean, bound(tail), bound(-tail))
