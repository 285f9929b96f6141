r"""The equilibrium of weight decay and gradient noise: norms, angles, learning rates of scale-invariant weights.

A scale-invariant loss has :math:`\langle w,g\rangle = 0` and :math:`|g| \propto 1/|w|`: updates lengthen w, decay
shortens it, and :math:`|w|` settles. `unit_grad_sq` is :math:`|g_v|^2 = |w|^2|g|^2`, of the batch gradient at w/|w|.
All formulas are for stationary means, and then exact in lr and weight_decay. They hold for every set of weights that is
invariant together; with torch's dampening tau and momentum, for lr (1 - tau).

`correlation` is :math:`r = \langle b,g\rangle/|g|^2`, with the momentum buffer b before the step, a ratio of means. It
is 0 where noise dominates, as the papers assume; in networks, whose gradients pull back where the last steps went too
far, it is often below 0, and the norm is smaller for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .arguments import ANY, BETA, DECAYING, NOT_NEGATIVE, POSITIVE, Range, flag, number


def effective_lr(*, lr: float, weight_sq: float) -> float:
    r"""The learning rate on the unit sphere, :math:`\eta/|w|^2`.

    A step on scale-invariant w is one on w/|w| with this learning rate, up to the square of the angle.

    Args:
        lr: finite, >= 0.
        weight_sq: :math:`|w|^2`, finite, > 0.

    Reference: Li, Lyu, Arora 2020, arXiv 2010.02916, section 2.

    >>> effective_lr(lr=0.5, weight_sq=25.0)
    0.02
    """
    name = "effective_lr"
    return number(name, "lr", lr, NOT_NEGATIVE) / number(name, "weight_sq", weight_sq, POSITIVE)


def intrinsic_lr(*, lr: float, weight_decay: float, next_lr: float | None = None) -> float:
    r"""The intrinsic learning rate :math:`\lambda_e = \eta\lambda`: its inverse is the unit of time of normalised nets.

    .. math::
        \lambda_e = \eta\lambda + \frac12 \ln\frac{\eta'}{\eta}

    with the lr of the next step: a schedule acts on the effective learning rate as that much weight decay. A falling
    lr makes it negative.

    Args:
        lr, weight_decay: finite, >= 0.
        next_lr: finite, > 0, and then so is lr; None: the lr stays.

    Reference: arXiv 2010.02916, section 5; for finite steps ours.

    >>> intrinsic_lr(lr=0.5, weight_decay=0.25)
    0.125
    >>> round(intrinsic_lr(lr=0.8, weight_decay=0.5, next_lr=0.8 * math.exp(-0.6)), 12)
    0.1
    """
    name = "intrinsic_lr"
    decay = number(name, "weight_decay", weight_decay, NOT_NEGATIVE)
    if next_lr is None:
        return number(name, "lr", lr, NOT_NEGATIVE) * decay
    lr = number(name, "lr", lr, POSITIVE)
    return lr * decay + math.log(number(name, "next_lr", next_lr, POSITIVE) / lr) / 2


def equilibrium_weight_sq(
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    unit_grad_sq: float,
    nesterov: bool = False,
    correlation: float = 0.0,
) -> float:
    r"""The squared weight norm at equilibrium.

    .. math::
        |w|_*^2 = \sqrt{\frac{\eta |g_v|^2}{\lambda (1-\mu)\left(2 - \frac{\eta\lambda}{1+\mu}\right)}}

    with :math:`|g_v|^2 (1 + 2\mu r)` for it where there is a correlation r. With nesterov, for :math:`x = \eta\lambda`,

    .. math::
        |w|_*^2 = \sqrt{\frac{\eta |g_v|^2 \left(1 + \mu x \frac{1+2\mu}{1+\mu} + 2\mu^2 r\right)}
        {\lambda (1-\mu+\mu x)\left(2 - x \frac{1+2\mu}{1+\mu}\right)}}

    which without r is the same for small x.

    Args:
        lr: finite, > 0.
        weight_decay: finite, > 0, coupled, with lr * weight_decay < 2 (1 + momentum), and with nesterov < that /
            (1 + 2 momentum): else no length is stable.
        momentum: in [0, 1).
        unit_grad_sq: the mean of :math:`|w|^2|g|^2`, finite, >= 0.
        nesterov: which momentum.
        correlation: r, finite; see above.

    Reference: Wan et al., arXiv 2006.08419, theorem 2; nesterov and correlation ours.

    >>> equilibrium_weight_sq(lr=0.5, weight_decay=0.02, momentum=0.0, unit_grad_sq=0.0796)
    1.0
    >>> round(equilibrium_weight_sq(lr=0.1, weight_decay=0.1, momentum=0.9, unit_grad_sq=4.0), 4)
    4.478
    """
    name = "equilibrium_weight_sq"
    q = number(name, "unit_grad_sq", unit_grad_sq, NOT_NEGATIVE)
    return math.sqrt(_at(name, lr, weight_decay, momentum, nesterov, correlation)[0] * q)


def equilibrium_residual(
    *,
    weight_sq: float,
    grad_sq: float,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool = False,
    correlation: float = 0.0,
) -> float:
    r"""Return the distance to equilibrium: 0 there, positive if the norm will grow, negative if it will shrink.

    .. math::
        \frac{\eta |g|^2}{\lambda (1-\mu)\left(2 - \frac{\eta\lambda}{1+\mu}\right) |w|^2} - 1

    that is :math:`|w|_*^4/|w|^4 - 1`, with `equilibrium_weight_sq` for the present unit gradient.

    Args:
        weight_sq, grad_sq: means of :math:`|w|^2` and :math:`|g|^2`, > 0 and >= 0.
        lr, weight_decay, momentum, nesterov, correlation: as for `equilibrium_weight_sq`.

    Reference: arXiv 2006.08419, theorem 2.

    >>> equilibrium_residual(weight_sq=2.0, grad_sq=1.5, lr=0.5, weight_decay=0.5, momentum=0.0)
    -0.5714285714285714
    """
    name = "equilibrium_residual"
    n = number(name, "weight_sq", weight_sq, POSITIVE)
    g = number(name, "grad_sq", grad_sq, NOT_NEGATIVE)
    return _at(name, lr, weight_decay, momentum, nesterov, correlation)[0] * g / n - 1


def equilibrium_effective_lr(
    *, intrinsic_lr: float, momentum: float, unit_grad_sq: float, nesterov: bool = False, correlation: float = 0.0
) -> float:
    r"""The effective learning rate at equilibrium, which lr and weight decay enter by their product alone.

    .. math::
        \frac{\eta}{|w|_*^2} = \sqrt{\frac{(1-\mu)\,\lambda_e \left(2 - \frac{\lambda_e}{1+\mu}\right)}{|g_v|^2}}
        \approx \sqrt{2 (1-\mu) \lambda_e / |g_v|^2}

    Args:
        intrinsic_lr: lr * weight_decay, finite, > 0, and < 2 (1 + momentum), as for `equilibrium_weight_sq`.
        momentum: in [0, 1).
        unit_grad_sq: finite, > 0.
        nesterov, correlation: as for `equilibrium_weight_sq`.

    Reference: arXiv 2010.02916, section 5, without momentum and for small steps.

    >>> round(equilibrium_effective_lr(intrinsic_lr=0.002, momentum=0.0, unit_grad_sq=1.0), 4)
    0.0632
    """
    name = "equilibrium_effective_lr"
    q = number(name, "unit_grad_sq", unit_grad_sq, POSITIVE)
    weight_per_grad, _ = _at(name, 1.0, intrinsic_lr, momentum, nesterov, correlation, "intrinsic_lr")
    return 1 / math.sqrt(weight_per_grad * q)


def equilibrium_angle(
    *, lr: float, weight_decay: float, momentum: float, nesterov: bool = False, correlation: float = 0.0
) -> float:
    r"""The angular update at equilibrium: how far weights turn in a step, root mean square, in radians.

    .. math::
        \sqrt{\frac{2\eta\lambda}{1+\mu}}, \qquad\text{with nesterov}\quad \sqrt{\frac{2\eta\lambda}{1+\mu} \cdot
        \frac{1+2\mu-2\mu^3 + \mu x (1+\mu)(1+2\mu) + \mu^2 r \left(2 + 2\mu - 2\mu^2 + \mu x (1+2\mu)\right)}
        {1 + \mu x \frac{1+2\mu}{1+\mu} + 2\mu^2 r}}, \quad x = \eta\lambda

    Neither the loss nor the data has a say in it, but for r with nesterov. To be exact, it is the relative update
    :math:`u = |w'-w|/|w|`; the angle of that chord is :math:`2\arcsin(u/2)`, with
    :math:`\cos\theta = 1 - \eta\lambda/(1+\mu)`, and larger by a part of :math:`u^2/24`.

    Args:
        lr, weight_decay, momentum, nesterov, correlation: as for `equilibrium_weight_sq`.

    Reference: Wan et al., arXiv 2006.08419, theorem 3; Kosson et al., arXiv 2305.17212; nesterov ours.

    >>> equilibrium_angle(lr=0.5, weight_decay=0.01, momentum=0.0)
    0.1
    >>> round(equilibrium_angle(lr=0.1, weight_decay=0.02, momentum=0.9, nesterov=True), 4)
    0.0533
    """
    name = "equilibrium_angle"
    return math.sqrt(_at(name, lr, weight_decay, momentum, nesterov, correlation)[1])


def equilibrium_grad_ratio(
    *, lr: float, weight_decay: float, momentum: float, nesterov: bool = False, correlation: float = 0.0
) -> float:
    r"""The ratio :math:`|g|^2/|w|^2` at equilibrium.

    .. math::
        \frac{|g|^2}{|w|^2} = \frac\lambda\eta (1-\mu)\left(2 - \frac{\eta\lambda}{1+\mu}\right)

    Args:
        lr, weight_decay, momentum, nesterov, correlation: as for `equilibrium_weight_sq`.

    Reference: arXiv 2006.08419, theorem 2; nesterov ours.

    >>> equilibrium_grad_ratio(lr=0.5, weight_decay=0.5, momentum=0.0)
    1.75
    """
    return 1 / _at("equilibrium_grad_ratio", lr, weight_decay, momentum, nesterov, correlation)[0]


class Balance(NamedTuple):
    """:math:`|w|^2` and :math:`|u|^2` at equilibrium, of :math:`|g|^2` and of <b,g>."""

    weight_of_grad: float
    weight_of_dot: float
    update_of_grad: float
    update_of_dot: float


def balance(
    function: str, lr: Any, weight_decay: Any, momentum: Any, nesterov: Any, decay_name: str = "weight_decay"
) -> Balance:
    """The stationary point of `next_norms`, its arguments checked."""
    eta = number(function, "lr", lr, POSITIVE)
    decay = number(function, decay_name, weight_decay, DECAYING)
    mu = number(function, "momentum", momentum, BETA)
    x = product(function, eta, decay)
    look = (1 + 2 * mu) / (1 + mu) if flag(function, "nesterov", nesterov) else 1 / (1 + mu)
    if look * x >= 2:
        most = f"2 (1 + momentum){' / (1 + 2 momentum)' if nesterov else ''} = {2 / look!r}"
        if decay_name == "weight_decay":
            raise ValueError(
                f"{function}: lr * weight_decay expected < {most}, beyond which no length is stable, got {lr!r} * "
                f"{weight_decay!r} = {x!r}"
            )
        raise ValueError(
            f"{function}: {decay_name} expected < {most}, beyond which no length is stable, got {weight_decay!r}"
        )
    if not nesterov:
        weight = eta / (decay * (1 - mu) * (2 - look * x))
        update = weight * 2 * x / (1 + mu)
        return Balance(weight, 2 * mu * weight, update, 2 * mu * update)
    weight = eta / (decay * (1 - mu + mu * x) * (2 - look * x))
    update = weight * 2 * x / (1 + mu)
    turn = 1 + 2 * mu - 2 * mu**3 + mu * x * (1 + mu) * (1 + 2 * mu)
    turn_of_dot = 2 * (1 + mu - mu * mu) + mu * x * (1 + 2 * mu)
    return Balance(weight * (1 + mu * x * look), 2 * mu * mu * weight, update * turn, mu * mu * update * turn_of_dot)


def _at(
    function: str,
    lr: Any,
    weight_decay: Any,
    momentum: Any,
    nesterov: Any,
    correlation: Any,
    decay_name: str = "weight_decay",
) -> tuple[float, float]:
    """|w|^2/|g|^2 and |u|^2/|w|^2."""
    at = balance(function, lr, weight_decay, momentum, nesterov, decay_name)
    r = number(function, "correlation", correlation, ANY)
    weight, update = at.weight_of_grad + r * at.weight_of_dot, at.update_of_grad + r * at.update_of_dot
    if weight <= 0 or update <= 0:
        raise ValueError(f"{function}: correlation expected one that leaves an update, got {correlation!r}")
    return weight, update / weight


def product(function: str, lr: float, weight_decay: float) -> float:
    """lr * weight_decay, which may leave the range of floats."""
    return number(function, "lr * weight_decay", lr * weight_decay, _PRODUCT)


_PRODUCT = Range("a float > 0 and finite", POSITIVE.holds)
