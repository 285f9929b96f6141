"""Exponential learning rates: weight decay as growth (Li & Arora 2019, arXiv 1910.07454).

On scale-invariant weights SGD with weight decay and a constant lr is SGD without, whose lr grows by alpha**-2 a step,
and its weights by 1/alpha.
"""

from __future__ import annotations

import math

from .arguments import BETA, NOT_NEGATIVE, POSITIVE, number


def exponential_factor(*, lr: float, weight_decay: float, momentum: float) -> float:
    r"""alpha, by which weight decay alone shortens the weights in a step: the growing lr's is alpha**-2.

    .. math::
        \alpha^2 - (1 + \mu - \eta\lambda)\,\alpha + \mu = 0, \qquad \sqrt\mu \le \alpha \le 1

    the larger root; :math:`1 - \eta\lambda` without momentum, about :math:`1 - \eta\lambda/(1-\mu)` for small
    :math:`\eta\lambda`. With momentum it is what the factors of single steps tend to, momentum buffers included.

    Args:
        lr: finite, > 0.
        weight_decay: finite, >= 0, coupled (part of the gradient), with
            lr * weight_decay <= :math:`(1-\sqrt\mu)^2`: beyond, both roots are complex and no growing lr is equivalent.
            Equality is taken with a tolerance of 1e-12, relative.
        momentum: in [0, 1).

    Returns:
        alpha. Where it is so close to 1 that rounding matters, `exponential_decay` has 1 - alpha.

    Reference: Li and Arora 2019, arXiv 1910.07454, the quadratic whose larger root is the rate.

    >>> alpha = exponential_factor(lr=0.1, weight_decay=5e-4, momentum=0.9)
    >>> round(alpha ** -(2 * 391), 5)  # per epoch of CIFAR10 in batches of 128
    1.48123
    """
    return 1 - _decay("exponential_factor", lr, weight_decay, momentum)


def exponential_decay(*, lr: float, weight_decay: float, momentum: float) -> float:
    r"""1 - alpha of `exponential_factor`, without cancellation: the share of the weights that a step takes.

    .. math::
        1 - \alpha = \frac{2\eta\lambda}{B + \sqrt{B^2 - 4\eta\lambda}}, \qquad B = 1 - \mu + \eta\lambda

    so that n steps are :math:`\alpha^n` = ``exp(n * log1p(-decay))``, to a few units of rounding times the exponent.

    Args:
        lr, weight_decay, momentum: as for `exponential_factor`.

    Reference: as `exponential_factor`.

    >>> exponential_decay(lr=2.0**-40, weight_decay=2.0**-40, momentum=0.5) == 2.0**-79
    True
    """
    return _decay("exponential_decay", lr, weight_decay, momentum)


def _decay(name: str, lr: float, weight_decay: float, momentum: float) -> float:
    lr = number(name, "lr", lr, POSITIVE)
    weight_decay = number(name, "weight_decay", weight_decay, NOT_NEGATIVE)
    momentum = number(name, "momentum", momentum, BETA)
    decay, most = lr * weight_decay, ((1 - momentum) / (1 + math.sqrt(momentum))) ** 2
    if not decay <= most * (1 + 1e-12):
        raise ValueError(
            f"{name}: lr * weight_decay expected at most (1 - sqrt(momentum))**2 = {most!r}, "
            f"got {lr!r} * {weight_decay!r} = {decay!r}"
        )
    b = 1 - momentum + decay
    return min(1.0, 2 * decay / (b + math.sqrt(max(0.0, b * b - 4 * decay))))
