"""Means, differences and regressions with confidence intervals by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate, and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def within(self, low: float, high: float) -> bool:
        """Whether all of the interval lies there."""
        return low <= self.low and self.high <= high

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean(values: Sequence[float]) -> Interval:
    r"""Of independent values: :math:`\bar x \pm t_{n-1} s/\sqrt n`.

    >>> print(mean([1.0, 2.0, 3.0]))
    2 [-0.4841, 4.484]
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Interval(float(x.mean()), -math.inf, math.inf)
    return _student(float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)), len(x) - 1)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of the means of two independent samples, a's less b's, by Welch's t."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    u, v = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if u + v == 0:
        return Interval(*[float(x.mean() - y.mean())] * 3)
    freedom = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
    return _student(float(x.mean() - y.mean()), float(math.sqrt(u + v)), float(freedom))


def log_ratio(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of the geometric means of two independent samples of positive numbers: a's over b's."""
    return Interval(*(math.exp(x) for x in difference(np.log(a).tolist(), np.log(b).tolist())))


def slope(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Of the least-squares line through the points, their errors independent and of one size."""
    fit = stats.linregress(x, y)
    return _student(float(fit.slope), float(fit.stderr), len(x) - 2)


def slope_over_seeds(x: Sequence[float], ys: Sequence[Sequence[float]]) -> Interval:
    """Of the lines through each seed's points; the interval is over seeds, as the points of one seed hang together."""
    return mean([float(stats.linregress(x, y).slope) for y in ys])


def _student(estimate: float, error: float, freedom: float) -> Interval:
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error if freedom > 0 else math.inf
    return Interval(estimate, estimate - half, estimate + half)
