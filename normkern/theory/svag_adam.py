"""SVAG for Adam, AdamW and RMSprop (Malladi, Lyu, Panigrahi, Arora 2022, arXiv 2205.10287)."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from numbers import Rational
from typing import Any, NamedTuple

from .arguments import ADAPTIVE_L, NOT_NEGATIVE, beta_pair, number, simplest


class SvagAdam(NamedTuple):
    """Hyperparameters of one SVAG step of AdamW or Adam, named as torch's: ``AdamW(params, **svag._asdict())``."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def svag_adam(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    l: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
) -> SvagAdam:
    r"""The hyperparameters of one SVAG step of Adam or AdamW, from those of the run that it stands for.

    .. math::
        \eta \to \eta/l, \quad 1-\beta_i \to (1-\beta_i)/l^2, \quad \epsilon \to l\,\epsilon, \quad
        \lambda \to \lambda/l \text{ (decoupled)}, \quad \text{steps} \to l^2\,\text{steps}

    The gradient is that of `svag_coefficients` at :math:`l^2`: the mean of two batches' gradients, l^2 times their
    covariance. So sqrt(v) grows l times where noise dominates, and the noise per unit of time stays. As l grows the run
    approaches the SDE with error O(1/l^2). For RMSprop alpha is beta_2. Coupled weight decay is part of the gradient
    and stays.

    Args:
        lr, eps, weight_decay: finite, >= 0.
        betas: two numbers in [0, 1).
        l: finite, >= sqrt(1/2). l^2 is what l is for SGD; 1 is Adam on the first batch.
        decoupled: AdamW's weight decay.

    Returns:
        `SvagAdam`: lr, betas, eps, weight_decay.

    Raises:
        ValueError: l < 1 makes a beta negative.

    Reference: Malladi, Lyu, Panigrahi, Arora 2022, arXiv 2205.10287, the SVAG operators; for AdamW ours.

    >>> svag_adam(lr=0.002, betas=(0.9, 0.996), eps=1e-8, l=2, weight_decay=0.1)
    SvagAdam(lr=0.001, betas=(0.975, 0.999), eps=2e-08, weight_decay=0.05)
    """
    name = "svag_adam"
    lr = number(name, "lr", lr, NOT_NEGATIVE)
    eps = number(name, "eps", eps, NOT_NEGATIVE)
    weight_decay = number(name, "weight_decay", weight_decay, NOT_NEGATIVE)
    old = beta_pair(name, betas)
    square = _fraction(name, l)
    l = float(l)
    new = [_slowed(beta, square) for beta in old]
    for i, beta in enumerate(new):
        if not 0 <= beta < 1:
            raise ValueError(
                f"{name}: betas[{i}] expected 1 - (1 - beta)/l^2 in [0, 1), got {beta!r} from {old[i]!r} and l {l!r}"
            )
    eps = number(name, "the new eps", eps * l, NOT_NEGATIVE)
    return SvagAdam(lr / l, (new[0], new[1]), eps, weight_decay / l if decoupled else weight_decay)


def svag_adam_fraction(l: float | Fraction) -> Fraction:
    """SVAG's l^2 as the exact number that steps of Adam are counted with: the simplest fraction whose root is l.

    It is what `svag_steps`, `svag_effective_steps`, `svag_coefficients` and `normkern.svag_combine_` take as their l
    for Adam, AdamW and RMSprop: l^2 steps cover the time of one step of the original run.

    Args:
        l: a finite number >= sqrt(1/2); a `fractions.Fraction` is squared as it is.

    >>> [svag_adam_fraction(l) for l in (2, 1.1, 2**0.5)]
    [Fraction(4, 1), Fraction(121, 100), Fraction(2, 1)]
    """
    return _fraction("svag_adam_fraction", l)


def _fraction(function: str, l: Any) -> Fraction:
    x = number(function, "l", l, ADAPTIVE_L)
    if isinstance(l, Rational):
        return Fraction(int(l.numerator), int(l.denominator)) ** 2
    return _square(x)


@lru_cache(maxsize=64)
def _square(x: float) -> Fraction:
    square = simplest(x) ** 2
    root = Fraction(x * x).limit_denominator(1000)
    return root if math.sqrt(root) == x else max(square, Fraction(1, 2))


@lru_cache(maxsize=64)
def _slowed(beta: float, square: Fraction) -> float:
    return float(1 - (1 - simplest(beta)) / square)
