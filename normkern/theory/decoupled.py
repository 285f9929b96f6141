r"""Equilibria where weight decay is not part of the gradient: SGDW, AdamW, Lion.

.. math::
    w' = (1 - \eta\lambda)\,w - \eta s

with a step s of which the gradients know nothing beforehand, as on scale-invariant weights with much noise.
"""

from __future__ import annotations

import math
from typing import Any

from .arguments import BETA, DECAYING, NOT_NEGATIVE, POSITIVE, integer, number
from .equilibrium import Balance, product


def sgdw_equilibrium_weight_sq(*, lr: float, weight_decay: float, momentum: float, unit_grad_sq: float) -> float:
    r"""The squared weight norm of SGD with momentum and decoupled weight decay, at equilibrium.

    .. math::
        |w|_*^4 = \frac{\eta^2 |g_v|^2}{1-\mu^2} \cdot \frac{1+\mu\rho}{1-\mu\rho} \cdot \frac{1}{1-\rho^2}
        \approx \frac{\eta |g_v|^2}{2\lambda(1-\mu)^2}, \qquad \rho = 1-\eta\lambda

    for :math:`b' = \mu b + g,\ w' = \rho w - \eta b'`: exact where the mean gradient is small beside the noise.

    Args:
        lr: finite, > 0.
        weight_decay: finite, > 0, with lr * weight_decay < 1.
        momentum: in [0, 1).
        unit_grad_sq: the mean of :math:`|w|^2|g|^2`, finite, >= 0.

    Reference: ours.

    >>> round(sgdw_equilibrium_weight_sq(lr=0.1, weight_decay=0.1, momentum=0.9, unit_grad_sq=4.0), 4)
    13.5475
    """
    name = "sgdw_equilibrium_weight_sq"
    keep = _keep(name, lr, weight_decay)
    mu = number(name, "momentum", momentum, BETA)
    q = number(name, "unit_grad_sq", unit_grad_sq, NOT_NEGATIVE)
    spread = (1 + mu * keep) / (1 - mu * keep)
    return float(lr) * math.sqrt(spread / ((1 - keep) * (1 + keep)) * q / (1 - mu * mu))


def sgdw_equilibrium_angle(*, lr: float, weight_decay: float, momentum: float) -> float:
    r"""The angular update of SGD with momentum and decoupled weight decay, at equilibrium, in radians.

    .. math::
        \sqrt{\frac{2\eta\lambda (1-\mu)}{1 + \mu(1-\eta\lambda)}}

    Smaller than with coupled decay, where momentum accumulates the decay too: `equilibrium_angle`.

    Args:
        lr: finite, > 0.
        weight_decay: finite, > 0, with lr * weight_decay < 1.
        momentum: in [0, 1).

    Returns:
        The root mean square of :math:`|w'-w|/|w|`, as `equilibrium_angle`.

    Reference: ours.

    >>> round(sgdw_equilibrium_angle(lr=0.1, weight_decay=0.1, momentum=0.9), 5)
    0.03252
    """
    name = "sgdw_equilibrium_angle"
    keep = _keep(name, lr, weight_decay)
    return _angle(keep, number(name, "momentum", momentum, BETA))


def adamw_equilibrium_weight_sq(*, lr: float, weight_decay: float, beta1: float, size: int) -> float:
    r"""The squared norm of `size` weights under AdamW, at equilibrium.

    .. math::
        |w|_*^2 = \eta^2 d\, \frac{1-\beta_1}{1+\beta_1} \cdot \frac{1+\beta_1\rho}{1-\beta_1\rho} \cdot
        \frac{1}{1-\rho^2} \approx \frac{\eta d}{2\lambda}, \qquad \rho = 1-\eta\lambda

    for small eps, :math:`1-\beta_2 \ll 1` (0.2 % too small for 0.999, 1 % for 0.99), and coordinates that are noise.

    Args:
        lr: finite, > 0.
        weight_decay: finite, > 0, with lr * weight_decay < 1.
        beta1: in [0, 1).
        size: d, an integer >= 1.

    Reference: Kosson et al., arXiv 2305.17212, to leading order.

    >>> round(adamw_equilibrium_weight_sq(lr=0.01, weight_decay=0.1, beta1=0.9, size=100), 3)
    4.956
    """
    name = "adamw_equilibrium_weight_sq"
    keep = _keep(name, lr, weight_decay)
    beta = number(name, "beta1", beta1, BETA)
    spread = (1 + beta * keep) / (1 - beta * keep) * (1 - beta) / (1 + beta)
    return float(lr) ** 2 * integer(name, "size", size, 1) * spread / ((1 - keep) * (1 + keep))


def adamw_equilibrium_angle(*, lr: float, weight_decay: float, beta1: float) -> float:
    r"""The angular update of AdamW at equilibrium, in radians.

    .. math::
        \sqrt{\frac{2\eta\lambda (1-\beta_1)}{1 + \beta_1(1-\eta\lambda)}} \approx
        \sqrt{2\eta\lambda\,\frac{1-\beta_1}{1+\beta_1}}

    Args:
        lr, weight_decay, beta1: as for `adamw_equilibrium_weight_sq`.

    Returns:
        The root mean square of :math:`|w'-w|/|w|`, as `equilibrium_angle`.

    Reference: Kosson et al., arXiv 2305.17212, to leading order.

    >>> round(adamw_equilibrium_angle(lr=0.01, weight_decay=0.1, beta1=0.9), 5)
    0.01026
    """
    name = "adamw_equilibrium_angle"
    keep = _keep(name, lr, weight_decay)
    return _angle(keep, number(name, "beta1", beta1, BETA))


def lion_equilibrium_weight_sq(*, lr: float, weight_decay: float, beta1: float, beta2: float, size: int) -> float:
    r"""The squared norm of `size` weights under Lion, at equilibrium.

    .. math::
        |w|_*^2 = \frac{\eta^2 d\, S}{1-\rho^2}, \qquad S = 1 + \frac4\pi \sum_{k\ge1} \rho^k \arcsin r_k, \qquad
        r_k = \beta_2^{k-1}\, \frac{\beta_1(1-\beta_2)\left(\frac{\beta_1\beta_2}{1+\beta_2} + 1-\beta_1\right)}
        {(1-\beta_1)^2 + \beta_1^2 \frac{1-\beta_2}{1+\beta_2}}

    r_k is the correlation of the interpolated gradients whose signs Lion takes, of steps k apart; Gaussian coordinates,
    which are noise.

    Args:
        lr: finite, > 0.
        weight_decay: finite, > 0, with lr * weight_decay < 1.
        beta1, beta2: in [0, 1).
        size: d, an integer >= 1.

    Reference: ours; Kosson et al., arXiv 2305.17212, replace arcsin r by r.

    >>> round(lion_equilibrium_weight_sq(lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, size=100), 2)
    209.39
    """
    name = "lion_equilibrium_weight_sq"
    keep = _keep(name, lr, weight_decay)
    spread = _lion_spread(name, beta1, beta2, keep)
    return float(lr) ** 2 * integer(name, "size", size, 1) * spread / ((1 - keep) * (1 + keep))


def lion_equilibrium_angle(*, lr: float, weight_decay: float, beta1: float, beta2: float) -> float:
    r"""The angular update of Lion at equilibrium, in radians.

    .. math::
        \sqrt{(1-\rho)\left(2 - \frac{1+\rho}{\rho}\left(1 - \frac1S\right)\right)} \approx \sqrt{2\eta\lambda/S}

    with rho and S as in `lion_equilibrium_weight_sq`.

    Args:
        lr, weight_decay, beta1, beta2: as there.

    Returns:
        The root mean square of :math:`|w'-w|/|w|`, as `equilibrium_angle`.

    Reference: ours; Kosson et al., arXiv 2305.17212, replace arcsin r by r.

    >>> round(lion_equilibrium_angle(lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99), 5)
    0.00684
    """
    name = "lion_equilibrium_angle"
    keep = _keep(name, lr, weight_decay)
    spread = _lion_spread(name, beta1, beta2, keep)
    return math.sqrt((1 - keep) * (2 - (1 + keep) / keep * (1 - 1 / spread)))


def _keep(name: str, lr: Any, weight_decay: Any) -> float:
    lr = number(name, "lr", lr, POSITIVE)
    decay = number(name, "weight_decay", weight_decay, DECAYING)
    x = product(name, lr, decay)
    if x >= 1:
        raise ValueError(f"{name}: lr * weight_decay expected < 1, got {lr!r} * {weight_decay!r} = {x!r}")
    return 1 - x


def _angle(keep: float, mu: float) -> float:
    return math.sqrt(2 * (1 - keep) * (1 - mu) / (1 + mu * keep))


def _lion_spread(name: str, beta1: Any, beta2: Any, keep: float) -> float:
    """|w|^2 over what it were if steps were independent."""
    b1, b2 = number(name, "beta1", beta1, BETA), number(name, "beta2", beta2, BETA)
    variance = (1 - b1) ** 2 + b1 * b1 * (1 - b2) / (1 + b2)
    r = b1 * (1 - b2) * (b1 * b2 / (1 + b2) + 1 - b1) / variance
    spread, shrunk = 1.0, keep
    while r * shrunk > 1e-17 * (1 - b2 * keep):
        spread += 4 / math.pi * shrunk * math.asin(r)
        r, shrunk = r * b2, shrunk * keep
    return spread


def adamw_balance(function: str, lr: Any, weight_decay: Any, beta1: Any) -> Balance:
    r"""Return :math:`|w|^2` and :math:`|u|^2` at equilibrium of :math:`|s|^2`, AdamW's step over lr without decay.

    .. math::
        |w|_*^2 = \frac{\eta^2 |s|^2}{1-\rho^2} \cdot \frac{1+\beta_1\rho}{1-\beta_1\rho}

    For :math:`s_t = \beta_1 s_{t-1} + (1-\beta_1) n_t` with :math:`\langle w_t, n_t\rangle = 0`:
    :math:`\langle w,s\rangle` settles at :math:`-\beta_1\eta|s|^2/(1-\beta_1\rho)`, however the n are correlated.
    """
    keep = _keep(function, lr, weight_decay)
    beta = number(function, "beta1", beta1, BETA)
    weight = float(lr) ** 2 * (1 + beta * keep) / (1 - beta * keep) / ((1 - keep) * (1 + keep))
    return Balance(weight, 0.0, weight * _angle(keep, beta) ** 2, 0.0)


def adamw_steps_to_equilibrium(function: str, lr: Any, weight_decay: Any) -> float:
    r"""Return the steps in which :math:`|w|^2` of AdamW approaches equilibrium by a factor of e.

    :math:`|w|^2 - |w|_*^2` is multiplied by :math:`(1-\eta\lambda)^2` at each step, as the steps do not depend on |w|.
    """
    return -0.5 / math.log(_keep(function, lr, weight_decay))
