"""Checks of the arguments of formulas, and their error messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, NamedTuple


class Range(NamedTuple):
    """A set of allowed numbers: in words, and as a test that NaN fails."""

    words: str
    holds: Callable[[float], bool]


ANY = Range("a finite number", math.isfinite)
POSITIVE = Range("a finite number > 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Range("a finite number >= 0", lambda x: 0 <= x < math.inf)
#: Of a weight decay without which there is nothing to tell.
DECAYING = Range("a finite number > 0, as without decay there is no equilibrium", POSITIVE.holds)
RATIO = Range("a number >= 0", lambda x: x >= 0)
BETA = Range("a number in [0, 1)", lambda x: 0 <= x < 1)
CLOSENESS = Range("a finite number > 1", lambda x: 1 < x < math.inf)
L = Range("a finite number >= 1/2", lambda x: 0.5 <= x < math.inf)
#: Of adaptive optimizers, whose l^2 is as SGD's l.
ADAPTIVE_L = Range("a finite number >= sqrt(1/2)", lambda x: math.sqrt(0.5) <= x < math.inf)
L_OR_SDE = Range("a number >= 1/2 (math.inf: the SDE)", lambda x: x >= 0.5)

#: Above every count of steps or samples, and a float can hold it.
_COUNT_END = 2**63
#: A float stands for the fraction with a denominator up to this that rounds to it.
_DENOMINATORS = 10**6


def number(function: str, name: str, value: Any, range_: Range) -> float:
    """A number of the range, as a float."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            x = float(value)
        except OverflowError:  # an integer or a fraction
            x = math.nan
        if range_.holds(x):
            return x
    raise ValueError(f"{function}: {name} expected {range_.words}, got {value!r}")


def integer(function: str, name: str, value: Any, least: int) -> int:
    """A whole number from `least` on."""
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < _COUNT_END:
        return int(value)
    raise ValueError(f"{function}: {name} expected an integer >= {least} and < 2**63, got {value!r}")


def flag(function: str, name: str, value: Any) -> bool:
    """True or False."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{function}: {name} expected True or False, got {value!r}")


def beta_pair(function: str, betas: Any) -> list[float]:
    """Both betas of Adam."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{function}: betas expected two numbers, got {betas!r}")
    return [number(function, f"betas[{i}]", beta, BETA) for i, beta in enumerate(betas)]


def batch_ratio(function: str, batch_size: Any, new_batch_size: Any) -> Fraction:
    """The factor by which the batch grows."""
    old = integer(function, "batch_size", batch_size, 1)
    return Fraction(integer(function, "new_batch_size", new_batch_size, 1), old)


@lru_cache(maxsize=64)  # a schedule asks at every step
def simplest(x: float) -> Fraction:
    """The fraction that a float stands for."""
    simple = Fraction(x).limit_denominator(_DENOMINATORS)
    return simple if float(simple) == x else Fraction(x)
