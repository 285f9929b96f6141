"""SVAG: stochastic variance-amplified gradient (Li, Malladi, Arora 2021, arXiv 2102.12470).

Not to be confused with Balles & Hennig's stochastic variance-adapted gradient, which shares the letters.
"""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Rational
from typing import Any, NamedTuple

from .arguments import L_OR_SDE, NOT_NEGATIVE, POSITIVE, L, integer, number, simplest


class SvagCoefficients(NamedTuple):
    """The weights of the two batch gradients."""

    c1: float
    c2: float


def svag_coefficients(l: float) -> SvagCoefficients:
    r"""The weights of the two independent batch gradients in an SVAG step.

    .. math::
        c_{1,2} = \frac{1 \pm \sqrt{2l-1}}{2}, \qquad w' = w - \frac{\eta}{l} (c_1 g_1 + c_2 g_2)

    so that :math:`c_1+c_2 = 1`, :math:`c_1^2+c_2^2 = l`, :math:`c_1^3+c_2^3 = (3l-1)/2`: the mean of the gradient
    stays, its covariance grows l times, and with l times as many steps of size lr/l the noise per unit of time is that
    of SGD.

    Args:
        l: a finite number >= 1/2. 1 is SGD on the first batch; 1/2 is exactly SGD with both batches as one at twice the
            learning rate, the linear scaling rule's first step; the paper uses 1, 2, 4, 8, ...

    Returns:
        (c1, c2), c1 >= 1/2 >= c2. c2 is accurate around l = 1, where it vanishes.

    Reference: arXiv 2102.12470, the definition of SVAG; l < 1 is ours.

    >>> svag_coefficients(5)
    SvagCoefficients(c1=2.0, c2=-1.0)
    """
    l = number("svag_coefficients", "l", l, L)
    half_root = math.sqrt(l / 2 - 0.25)  # of 2l - 1, halved
    return SvagCoefficients(0.5 + half_root, (1 - l) / (1 + 2 * half_root))


def svag_steps(*, steps: int, l: float | Fraction) -> int:
    r"""Return the number of SVAG steps for a run of `steps` steps: :math:`\lceil l \cdot steps \rceil`.

    Exact: no product is formed in floating point. Each of these steps, counted from 0, stands at
    `svag_effective_steps` < `steps` of the original run's schedule.

    Args:
        steps: an integer >= 0.
        l: a finite number >= 1/2; a `fractions.Fraction` is taken as it is.

    Reference: arXiv 2102.12470, theorem 4.3: time is lr times steps for SGD, lr/l times steps for SVAG.

    >>> svag_steps(steps=10, l=1.1)
    11
    """
    steps = integer("svag_steps", "steps", steps, 0)
    return math.ceil(steps * _svag_fraction("svag_steps", l))


def svag_effective_steps(*, steps: int, l: float | Fraction) -> int:
    r"""Return the steps of the original run that `steps` SVAG steps cover: :math:`\lfloor steps / l \rfloor`, exactly.

    SVAG step k, counted from 0, uses the hyperparameters of the original run's step ``svag_effective_steps(steps=k,
    l=l)``; `normkern.schedules.SvagSchedule` does so.

    Args:
        steps: an integer >= 0.
        l: a finite number >= 1/2; a `fractions.Fraction` is taken as it is.

    Reference: arXiv 2102.12470, the number of effective steps.

    >>> [svag_effective_steps(steps=k, l=1.5) for k in range(7)]
    [0, 0, 1, 2, 2, 3, 4]
    """
    steps = integer("svag_effective_steps", "steps", steps, 0)
    return math.floor(steps / _svag_fraction("svag_effective_steps", l))


def svag_fraction(l: float | Fraction) -> Fraction:
    """SVAG's l as the exact number that steps are counted with: the simplest fraction that rounds to the float.

    "Simplest" is a denominator up to a million; a float that no such fraction rounds to is taken as it is.

    Args:
        l: a finite number >= 1/2; a `fractions.Fraction` is taken as it is.

    >>> svag_fraction(1.1)
    Fraction(11, 10)
    """
    return _svag_fraction("svag_fraction", l)


def svag_equilibrium(*, lr: float, weight_decay: float, l: float, grad_sq_norm: float, trace_sigma: float) -> float:
    r"""The squared weight norm :math:`R = |w|^2` of SVAG at equilibrium, from the gradient measured there.

    .. math::
        \left(\frac{2}{\eta} - \frac{\lambda}{l}\right) \lambda R = N + \frac{G}{l},
        \qquad G = |\nabla L|^2, \quad N = \operatorname{tr}\Sigma

    for a loss that is scale-invariant in w, coupled or decoupled weight decay, no momentum. l = 1 is SGD; l = infinity
    is the SDE, :math:`2 \lambda R = \eta N`. What lies between them is discretisation: G/l, and lr * weight_decay / l.
    It is the stationary point of :math:`R' = (1 - \eta\lambda/l)^2 R + (\eta/l)^2 (G + l N)`; R, G, N are averages over
    steps at equilibrium, all at the same weights, those of that run.

    Args:
        lr: finite, > 0, that of the original run (SVAG steps with lr/l).
        weight_decay: finite, > 0, with lr * weight_decay < 2 l: else no norm is stable.
        l: >= 1/2; `math.inf` for the SDE.
        grad_sq_norm: finite, >= 0. :math:`|\nabla L|^2`: the unbiased estimate, not the square of a batch gradient.
        trace_sigma: finite, >= 0, of the gradient of one batch, not of SVAG's combination.

    Reference: arXiv 2102.12470, the section on the equilibrium of scale-invariant networks; l = 1 is theorem 2 of Wan
    et al. for momentum 0.

    >>> svag_equilibrium(lr=0.5, weight_decay=0.5, l=1, grad_sq_norm=3.0, trace_sigma=4.0)
    4.0
    >>> svag_equilibrium(lr=0.5, weight_decay=0.5, l=math.inf, grad_sq_norm=3.0, trace_sigma=4.0)
    2.0
    """
    name = "svag_equilibrium"
    lr = number(name, "lr", lr, POSITIVE)
    weight_decay = number(name, "weight_decay", weight_decay, POSITIVE)
    l = number(name, "l", l, L_OR_SDE)
    grad_sq_norm = number(name, "grad_sq_norm", grad_sq_norm, NOT_NEGATIVE)
    trace_sigma = number(name, "trace_sigma", trace_sigma, NOT_NEGATIVE)
    decay = lr * weight_decay / l
    if decay >= 2:
        raise ValueError(
            f"{name}: lr * weight_decay / l expected < 2, got {lr!r} * {weight_decay!r} / {l!r} = {decay!r}"
        )
    return lr * (trace_sigma + grad_sq_norm / l) / (weight_decay * (2 - decay))


def _svag_fraction(function: str, l: Any) -> Fraction:
    x = number(function, "l", l, L)
    return Fraction(int(l.numerator), int(l.denominator)) if isinstance(l, Rational) else simplest(x)
