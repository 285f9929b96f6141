"""Quantiles of Student's t distribution, without scipy."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

#: From so many degrees of freedom on, the expansion around the normal distribution is exact to 1e-9.
_LARGE = 200


@lru_cache(maxsize=1024)
def two_sided(confidence: float, freedom: int) -> float:
    r"""Return t with :math:`P(|T| \le t)` = `confidence`, for a whole number of degrees of freedom.

    The distribution function is a finite sum for whole degrees of freedom; it is inverted by bisection.

    Args:
        confidence: in (0, 1).
        freedom: an integer >= 1.

    Reference: Abramowitz and Stegun, 26.7.3, 26.7.4 and 26.7.5.

    >>> round(two_sided(0.95, 3), 4), round(two_sided(0.95, 10_000), 4)
    (3.1824, 1.9602)
    """
    if freedom >= _LARGE:
        return _expansion(NormalDist().inv_cdf(0.5 + confidence / 2), freedom)
    low, high = 0.0, math.pi / 2  # of theta = atan(t / sqrt(freedom))
    for _ in range(100):
        middle = (low + high) / 2
        if _inside(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(freedom)


def _inside(theta: float, freedom: int) -> float:
    """Return P(|T| <= sqrt(freedom) tan(theta))."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(3 if odd else 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _expansion(z: float, freedom: int) -> float:
    """Return the quantile from the normal one, by powers of 1 / freedom."""
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / float(freedom) ** i for i, term in enumerate(terms))
