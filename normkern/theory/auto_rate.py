r"""Auto rate tuning: scale-invariant weights find their own learning rate (Arora, Li, Lyu 2018, arXiv 1812.03981).

Without weight decay and momentum each step lengthens them by :math:`\eta^2|g|^2`, and the effective learning rate
falls until it suits the loss, whatever lr was. Progress is measured by the unit gradient :math:`g_v = |w| g`, the
gradient at w/|w|: that of w vanishes by mere growth.
"""

from __future__ import annotations

import math

from .arguments import NOT_NEGATIVE, POSITIVE, Range, integer, number

_RISING = Range("a finite number >= first_weight_sq", math.isfinite)


def unit_grad_sq_from_growth(*, weight_sq: float, next_weight_sq: float, lr: float) -> float:
    r"""The squared unit gradient of a step, from the norms of the weights before and after it.

    .. math::
        |g_v|^2 = \frac{|w|^2 \left(|w'|^2 - |w|^2\right)}{\eta^2}, \qquad\text{so that}\qquad
        \sum_{t<T} |g_{v,t}|^2 = \sum_{t<T} \frac{N_t (N_{t+1} - N_t)}{\eta_t^2}, \quad N = |w|^2

    exactly, for any scale-invariant loss, any lr, with noise or without.

    Args:
        weight_sq, next_weight_sq: :math:`|w|^2` before and after a step without momentum and weight decay; >= 0.
        lr: finite, > 0.

    Returns:
        The square; below 0 if the norm fell, as it does only where the loss is not scale-invariant.

    Reference: from lemma 2.4 of arXiv 1812.03981.

    >>> unit_grad_sq_from_growth(weight_sq=25.0, next_weight_sq=31.25, lr=0.5)
    625.0
    """
    name = "unit_grad_sq_from_growth"
    n = number(name, "weight_sq", weight_sq, NOT_NEGATIVE)
    lr = number(name, "lr", lr, POSITIVE)
    return n * (number(name, "next_weight_sq", next_weight_sq, NOT_NEGATIVE) - n) / lr / lr


def least_unit_grad_bound(*, first_weight_sq: float, last_weight_sq: float, lr_sq_sum: float) -> float:
    r"""Return an upper bound of the smallest unit gradient of a run, from the growth of the norm.

    .. math::
        \min_{t<T} |g_{v,t}| \le \sqrt{\frac{N_T (N_T - N_0)}{\sum_{t<T} \eta_t^2}}, \qquad N = |w|^2

    With a constant lr the sum is :math:`\eta^2 T`: the bound falls as :math:`T^{-1/2}` as long as the norm stays
    bounded, as it does for gradient descent on a smooth loss.

    Args:
        first_weight_sq, last_weight_sq: :math:`N_0, N_T`, before the first and after the last of T steps without
            momentum and weight decay on a scale-invariant loss; >= 0, the last at least the first.
        lr_sq_sum: the sum of lr**2 over the steps; finite, > 0.

    Reference: the argument of theorem 3.1 of arXiv 1812.03981; this form ours.

    >>> least_unit_grad_bound(first_weight_sq=1.0, last_weight_sq=4.0, lr_sq_sum=0.5**2 * 1200)
    0.2
    """
    name = "least_unit_grad_bound"
    first = number(name, "first_weight_sq", first_weight_sq, NOT_NEGATIVE)
    last = number(name, "last_weight_sq", last_weight_sq, NOT_NEGATIVE)
    last = number(name, "last_weight_sq", last_weight_sq, _RISING._replace(holds=lambda x: first <= x))
    return math.sqrt(last * (last - first) / number(name, "lr_sq_sum", lr_sq_sum, POSITIVE))


def power_decay_weight_sq(*, weight_sq: float, steps: int, lr: float, exponent: float, unit_grad_sq: float) -> float:
    r"""The squared weight norm after so many steps with :math:`\eta_t = \eta (t+1)^{-a}`, without decay and momentum.

    .. math::
        N_T = \sqrt{N_0^2 + 2\eta^2 |g_v|^2 \sum_{t=1}^{T} t^{-2a}}

    Of means, to leading order in the squared angle of a step.

    Args:
        weight_sq: :math:`N_0`, finite, >= 0.
        steps: T, an integer >= 0.
        lr: of the first step; finite, > 0.
        exponent: a, finite, >= 0.
        unit_grad_sq: the mean of :math:`|w|^2|g|^2`, finite, >= 0.

    Reference: ours; the schedule: arXiv 1812.03981, theorem 4.2.

    >>> round(power_decay_weight_sq(weight_sq=1.0, steps=1000, lr=0.3, exponent=0.25, unit_grad_sq=1.0), 4)
    3.482
    """
    name = "power_decay_weight_sq"
    n = number(name, "weight_sq", weight_sq, NOT_NEGATIVE)
    steps = integer(name, "steps", steps, 0)
    lr = number(name, "lr", lr, POSITIVE)
    a = number(name, "exponent", exponent, NOT_NEGATIVE)
    q = number(name, "unit_grad_sq", unit_grad_sq, NOT_NEGATIVE)
    return math.sqrt(n * n + 2 * lr * lr * q * _sum(steps, a))


def power_decay_effective_lr(*, steps: int, exponent: float, unit_grad_sq: float) -> float:
    r"""Return the limit of the effective learning rate with :math:`\eta_t = \eta (t+1)^{-a}`, no decay, no momentum.

    .. math::
        \frac{\eta_t}{|w_t|^2} \to \sqrt{\frac{1-2a}{2 |g_v|^2 t}}, \quad a < \frac12; \qquad
        \to \frac{1}{\sqrt{2 |g_v|^2\, t \ln t}}, \quad a = \frac12

    Always about :math:`t^{-1/2}`, the rate that theory asks of SGD; lr has dropped out, and a all but does.

    Args:
        steps: t, an integer >= 2.
        exponent: a, in [0, 1/2]; beyond it the norm stays bounded, and nothing is tuned.
        unit_grad_sq: the mean of :math:`|w|^2|g|^2`, finite, > 0.

    Reference: arXiv 1812.03981, theorem 4.2, for the rate; the constant ours.

    >>> round(power_decay_effective_lr(steps=5000, exponent=0.25, unit_grad_sq=1.0), 6)
    0.007071
    """
    name = "power_decay_effective_lr"
    t = integer(name, "steps", steps, 2)
    a = number(name, "exponent", exponent, _TUNING)
    q = number(name, "unit_grad_sq", unit_grad_sq, POSITIVE)
    return math.sqrt((1 - 2 * a) / (2 * q * t) if a < 0.5 else 1 / (2 * q * t * math.log(t)))


_TUNING = Range("a number in [0, 1/2]", lambda x: 0 <= x <= 0.5)
#: Terms of the sum that are added one by one.
_HEAD = 32


def _sum(steps: int, a: float) -> float:
    """The sum of t**(-2a), t from 1 to `steps`: the first terms, and the others by Euler and Maclaurin."""
    head = math.fsum(math.pow(t, -2 * a) for t in range(1, min(steps, _HEAD) + 1))
    if steps <= _HEAD:
        return head
    s, m, n = 2 * a, float(_HEAD), float(steps)
    grown = math.log(n / m)
    integral = math.pow(m, 1 - s) * (math.expm1((1 - s) * grown) / (1 - s) if s != 1 else grown)
    return (
        head + integral + (math.pow(n, -s) - math.pow(m, -s)) / 2 - s * (math.pow(n, -s - 1) - math.pow(m, -s - 1)) / 12
    )
