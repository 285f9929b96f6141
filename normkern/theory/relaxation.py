r"""The way of scale-invariant weights to equilibrium, how long it takes, and their growth without one.

The fourth power of the norm, or :math:`\gamma = (|w|^2/\eta)^2`, one over the square of the effective learning rate,
obeys a linear equation (Li, Lyu, Arora 2020, arXiv 2010.02916, theorem 5.1; momentum and discrete steps ours). With a
constant unit gradient :math:`|g_v|^2 = |w|^2|g|^2`:

.. math::
    \frac{d\gamma}{dt} = -\frac{4\eta\lambda}{1-\mu}\,\gamma + \frac{2 |g_v|^2}{(1-\mu)^2}

Formulas are of means, to leading order in :math:`\eta\lambda/(1-\mu)^2`, where they differ by momentum, and in the
squared angle of a step.
"""

from __future__ import annotations

import math
from typing import Any

from .arguments import ANY, BETA, DECAYING, NOT_NEGATIVE, POSITIVE, Range, flag, integer, number
from .equilibrium import balance, product

_FACTOR = Range("a finite number > 1", lambda x: 1 < x < math.inf)
_TOLERANCE = Range("a number in (0, 1)", lambda x: 0 < x < 1)


def steps_to_equilibrium(*, lr: float, weight_decay: float, momentum: float) -> float:
    r"""Return the number of steps in which the distance of :math:`|w|^4` to equilibrium falls by a factor of e.

    .. math::
        \frac{1-\mu}{4\eta\lambda}

    Args:
        lr: finite, > 0.
        weight_decay: finite, > 0, coupled.
        momentum: in [0, 1); nesterov or not.

    Returns:
        The number of steps, not rounded. After 3 of these times a run begun anywhere near is within a few per cent.

    Reference: arXiv 2010.02916, theorem 5.1, the order; the constant and momentum as Wan et al., arXiv 2006.08419.

    >>> steps_to_equilibrium(lr=0.5, weight_decay=0.01, momentum=0.5)
    25.0
    """
    name = "steps_to_equilibrium"
    x = product(name, number(name, "lr", lr, POSITIVE), number(name, "weight_decay", weight_decay, DECAYING))
    return (1 - number(name, "momentum", momentum, BETA)) / (4 * x)


def weight_sq_after(
    *,
    weight_sq: float,
    steps: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    unit_grad_sq: float,
    nesterov: bool = False,
) -> float:
    r"""The squared weight norm after so many steps.

    .. math::
        |w_t|^4 = |w|_*^4 + \left(|w_0|^4 - |w|_*^4\right) \alpha^{4t}, \qquad
        \alpha^2 - (1+\mu-\eta\lambda)\,\alpha + \mu = 0

    with the larger root, :math:`1-\eta\lambda` without momentum; with nesterov of
    :math:`\alpha^2 - (1+\mu)(1-\eta\lambda)\,\alpha + \mu (1-\eta\lambda) = 0`. Without weight decay there is no
    equilibrium, and the norm grows for ever:

    .. math::
        |w_t|^4 = |w_0|^4 + \frac{2\eta^2 |g_v|^2}{(1-\mu)^2}\, t, \qquad\text{so that}\quad
        \frac{\eta}{|w_t|^2} \to \frac{1-\mu}{\sqrt{2 |g_v|^2 t}}

    whatever the lr: scale-invariant weights tune their own.

    Args:
        weight_sq: :math:`|w_0|^2`, of a run whose buffers are in step with it; finite, >= 0.
        steps: an integer >= 0.
        lr: finite, > 0.
        weight_decay: finite, >= 0, coupled, with lr * weight_decay <= :math:`(1-\sqrt\mu)^2`, and with nesterov
            :math:`((1-\mu)/(1+\mu))^2`, beyond which norms oscillate.
        momentum: in [0, 1).
        unit_grad_sq: the mean of :math:`|w|^2|g|^2`, finite, >= 0.
        nesterov: which momentum.

    Reference: arXiv 2010.02916, theorem 5.1; alpha: Li and Arora 2019, arXiv 1910.07454, theorem 2.12.

    >>> round(weight_sq_after(weight_sq=4.0, steps=50, lr=0.5, weight_decay=0.02, momentum=0.0, unit_grad_sq=0.0796), 4)
    1.7348
    >>> round(weight_sq_after(weight_sq=1.0, steps=1000, lr=0.1, weight_decay=0.0, momentum=0.5, unit_grad_sq=1.0), 4)
    9.0
    """
    name = "weight_sq_after"
    n = number(name, "weight_sq", weight_sq, NOT_NEGATIVE)
    steps = integer(name, "steps", steps, 0)
    lr = number(name, "lr", lr, POSITIVE)
    decay = number(name, "weight_decay", weight_decay, NOT_NEGATIVE)
    mu = number(name, "momentum", momentum, BETA)
    q = number(name, "unit_grad_sq", unit_grad_sq, NOT_NEGATIVE)
    nesterov = flag(name, "nesterov", nesterov)
    if decay == 0:
        return math.sqrt(n * n + 2 * (lr / (1 - mu)) ** 2 * q * steps)
    left = math.exp(4 * steps * math.log1p(-_lost(name, lr, decay, mu, nesterov)))
    there = balance(name, lr, decay, mu, nesterov).weight_of_grad * q
    return math.sqrt(there + (n * n - there) * left)


def effective_lr_after(
    *, effective_lr: float, steps: int, intrinsic_lr: float, momentum: float, unit_grad_sq: float
) -> float:
    r"""The effective learning rate :math:`e = \eta/|w|^2 = \gamma^{-1/2}` after so many steps.

    .. math::
        \gamma_t = \gamma_0 e^{-\kappa t} + \frac{|g_v|^2}{2 (1-\mu) \lambda_e} \left(1 - e^{-\kappa t}\right), \qquad
        \kappa = \frac{4\lambda_e}{1-\mu}

    Nothing but the intrinsic learning rate :math:`\lambda_e`, and where it began, decides over it. With
    :math:`\lambda_e = 0` it is :math:`\gamma_0 + 2|g_v|^2 t/(1-\mu)^2`; a falling lr makes it negative (see
    `intrinsic_lr`), and the same formula holds.

    Args:
        effective_lr: at the beginning; finite, > 0.
        steps: an integer >= 0.
        intrinsic_lr: lr * weight_decay, or with the term of a schedule; finite.
        momentum: in [0, 1).
        unit_grad_sq: the mean of :math:`|w|^2|g|^2`, finite, >= 0.

    Reference: arXiv 2010.02916, theorem 5.1, there without momentum.

    >>> round(effective_lr_after(effective_lr=0.5, steps=100, intrinsic_lr=0.005, momentum=0.0, unit_grad_sq=1.0), 4)
    0.1072
    """
    name = "effective_lr_after"
    e = number(name, "effective_lr", effective_lr, POSITIVE)
    steps = integer(name, "steps", steps, 0)
    intrinsic = number(name, "intrinsic_lr", intrinsic_lr, ANY)
    free = 1 - number(name, "momentum", momentum, BETA)
    q = number(name, "unit_grad_sq", unit_grad_sq, NOT_NEGATIVE)
    exponent = -4 * intrinsic / free * steps
    if exponent > 700:
        return 0.0
    grown = 2 * steps * (math.expm1(exponent) / exponent if exponent else 1.0)
    return 1 / math.sqrt(math.exp(exponent) / (e * e) + grown * q / (free * free))


def lr_drop_recovery(*, factor: float, steps: int, lr: float, weight_decay: float, momentum: float) -> float:
    r"""The effective learning rate after the lr was divided, as a part of what it was: equilibrium before the drop.

    .. math::
        \frac{e_t}{e_{before}} = \frac{1}{\sqrt{k + (k^2 - k)\, e^{-4\eta\lambda t / (k (1-\mu))}}}

    It falls to 1/k at once, and comes back to :math:`1/\sqrt k` as the weights shrink.

    Args:
        factor: k, by which lr is divided; finite, > 1.
        steps: t, since the drop; an integer >= 0.
        lr: before the drop; finite, > 0.
        weight_decay: finite, > 0, coupled.
        momentum: in [0, 1).

    Reference: from theorem 5.1 of arXiv 2010.02916.

    >>> lr_drop_recovery(factor=4, steps=0, lr=0.5, weight_decay=0.02, momentum=0.0)
    0.25
    >>> round(lr_drop_recovery(factor=4, steps=100, lr=0.5, weight_decay=0.02, momentum=0.0), 4)
    0.3447
    """
    name = "lr_drop_recovery"
    k, time = _drop(name, factor, lr, weight_decay, momentum)
    return 1 / math.sqrt(k + (k * k - k) * math.exp(-integer(name, "steps", steps, 0) / time))


def steps_after_lr_drop(*, factor: float, tolerance: float, lr: float, weight_decay: float, momentum: float) -> float:
    r"""Return the number of steps from a drop of lr until the effective learning rate is at its new equilibrium.

    .. math::
        \frac{k (1-\mu)}{4\eta\lambda} \ln\frac{k - 1}{(1-\epsilon)^{-2} - 1}

    Multiply the weights with `lr_drop_rescaling` at the drop, and it is there at once.

    Args:
        factor: k, by which lr is divided; finite, > 1.
        tolerance: epsilon, the part of its new equilibrium by which it may be too small; in (0, 1).
        lr: before the drop; finite, > 0.
        weight_decay: finite, > 0, coupled.
        momentum: in [0, 1).

    Returns:
        Steps, not rounded; 0.0 if it is that close from the beginning.

    Reference: from theorem 5.1 of arXiv 2010.02916; arXiv 2006.08419, corollary 3.1, has a bound of this kind.

    >>> round(steps_after_lr_drop(factor=4, tolerance=0.05, lr=0.5, weight_decay=0.02, momentum=0.0))
    332
    """
    name = "steps_after_lr_drop"
    k, time = _drop(name, factor, lr, weight_decay, momentum)
    near = 1 - number(name, "tolerance", tolerance, _TOLERANCE)
    return max(0.0, time * math.log((k - 1) * near * near / ((1 - near) * (1 + near))))


def lr_drop_rescaling(*, factor: float) -> float:
    r"""Return the factor for scale-invariant weights if lr is divided by `factor`: :math:`k^{-1/4}`.

    :math:`|w|_*^4 \propto \eta`: they are at their new equilibrium without waiting for it. Momentum buffers are then to
    be divided by it, as gradients are.

    Args:
        factor: k; finite, > 1.

    Reference: Wan et al., arXiv 2006.08419, corollary 3.1.

    >>> lr_drop_rescaling(factor=16)
    0.5
    """
    return math.pow(number("lr_drop_rescaling", "factor", factor, _FACTOR), -0.25)


def _drop(name: str, factor: Any, lr: Any, weight_decay: Any, momentum: Any) -> tuple[float, float]:
    """k, and the steps in which |w|^4 relaxes after the drop."""
    k = number(name, "factor", factor, _FACTOR)
    x = product(name, number(name, "lr", lr, POSITIVE), number(name, "weight_decay", weight_decay, DECAYING))
    return k, k * (1 - number(name, "momentum", momentum, BETA)) / (4 * x)


def _lost(name: str, lr: float, decay: float, mu: float, nesterov: bool) -> float:
    """1 - alpha: the share of the weights that decay takes in a step."""
    x = product(name, lr, decay)
    most = ((1 - mu) / (1 + (mu if nesterov else math.sqrt(mu)))) ** 2
    if x > most:
        raise ValueError(
            f"{name}: lr * weight_decay expected at most {most!r} with momentum {mu!r}, beyond which norms oscillate, "
            f"got {lr!r} * {decay!r} = {x!r}"
        )
    b = 1 - mu + x * (1 + mu if nesterov else 1)
    return min(1 - 2**-53, 2 * x / (b + math.sqrt(max(0.0, b * b - 4 * x))))
