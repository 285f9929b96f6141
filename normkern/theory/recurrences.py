"""Exact recurrences of norms and angles, step by step, and the same in units of the unit sphere.

None assumes that steps are small, and none has anything left out. The only assumption is in the gradients: where the
loss is scale-invariant in w, <w, g> = 0 (Arora, Li, Lyu 2018, arXiv 1812.03981, lemma 2.4), and that is the default.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .arguments import ANY, BETA, NOT_NEGATIVE, POSITIVE, flag, integer, number


class Norms(NamedTuple):
    """The numbers of the recurrence with momentum: ``next_norms(**norms._asdict(), ...)``."""

    weight_sq: float
    weight_buffer_dot: float
    buffer_sq: float


def next_weight_sq(
    *, weight_sq: float, grad_sq: float, lr: float, weight_decay: float = 0.0, weight_grad_dot: float = 0.0
) -> float:
    r"""The squared weight norm after a step of SGD without momentum.

    .. math::
        |w'|^2 = \rho^2 |w|^2 + \eta^2 |g|^2 - 2 \eta\rho \langle w, g\rangle, \qquad \rho = 1 - \eta\lambda

    Args:
        weight_sq, grad_sq: :math:`|w|^2` and :math:`|g|^2` before the step, >= 0; g without the decay.
        lr, weight_decay: finite, >= 0; coupled and decoupled decay are the same without momentum.
        weight_grad_dot: :math:`\langle w,g\rangle`; 0 where the loss is scale-invariant.

    Reference: arXiv 1812.03981, lemma 2.4, for weight_decay 0; with it ours.

    >>> next_weight_sq(weight_sq=25.0, grad_sq=25.0, lr=0.5)
    31.25
    >>> next_weight_sq(weight_sq=4.0, grad_sq=4.0, lr=0.5, weight_decay=0.5)
    3.25
    """
    name = "next_weight_sq"
    n = number(name, "weight_sq", weight_sq, NOT_NEGATIVE)
    g = number(name, "grad_sq", grad_sq, NOT_NEGATIVE)
    lr, keep = _lr_and_keep(name, lr, weight_decay)
    return keep * keep * n + lr * lr * g - 2 * lr * keep * number(name, "weight_grad_dot", weight_grad_dot, ANY)


def next_norms(
    *,
    weight_sq: float,
    weight_buffer_dot: float,
    buffer_sq: float,
    grad_sq: float,
    buffer_grad_dot: float,
    lr: float,
    momentum: float,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_grad_dot: float = 0.0,
) -> Norms:
    r"""The norms of weights and momentum buffer after a step of `torch.optim.SGD`.

    With :math:`n = |w|^2, c = \langle w,b\rangle, q = |b|^2`, :math:`d = g + \lambda w` and
    :math:`b' = \mu b + (1-\tau) d`,

    .. math::
        q' = \mu^2 q + (1-\tau)^2 |d|^2 + 2\mu(1-\tau) \langle b,d\rangle, \qquad
        |d|^2 = |g|^2 + 2\lambda\langle w,g\rangle + \lambda^2 n, \qquad
        \langle b,d\rangle = \langle b,g\rangle + \lambda c

    .. math::
        w' = w - \eta s: \qquad n' = n - 2\eta\langle w,s\rangle + \eta^2|s|^2, \qquad
        c' = \langle w,b'\rangle - \eta\langle s,b'\rangle

    with s = b' for heavy ball and s = d + mu b' for nesterov.

    Args:
        weight_sq, weight_buffer_dot, buffer_sq: before the step; the last two are 0 where there is no buffer yet.
        grad_sq, buffer_grad_dot: :math:`|g|^2` and :math:`\langle b,g\rangle`, b before the step and g without decay.
        lr, weight_decay: finite, >= 0, coupled decay.
        momentum, dampening: in [0, 1). torch's first step of a buffer has no dampening: give 0 there.
        nesterov: as torch, only without dampening.
        weight_grad_dot: :math:`\langle w,g\rangle`; 0 where the loss is scale-invariant.

    Returns:
        `Norms` after the step.

    Reference: ours; its stationary point is theorem 2 of Wan et al., arXiv 2006.08419.

    >>> next_norms(weight_sq=4.0, weight_buffer_dot=-1.0, buffer_sq=4.0, grad_sq=1.0, buffer_grad_dot=0.5,
    ...     lr=0.5, momentum=0.5, weight_decay=0.5)
    Norms(weight_sq=3.25, weight_buffer_dot=0.0, buffer_sq=3.0)
    """
    name = "next_norms"
    n = number(name, "weight_sq", weight_sq, NOT_NEGATIVE)
    c = number(name, "weight_buffer_dot", weight_buffer_dot, ANY)
    q = number(name, "buffer_sq", buffer_sq, NOT_NEGATIVE)
    g = number(name, "grad_sq", grad_sq, NOT_NEGATIVE)
    bg = number(name, "buffer_grad_dot", buffer_grad_dot, ANY)
    wg = number(name, "weight_grad_dot", weight_grad_dot, ANY)
    lr = number(name, "lr", lr, NOT_NEGATIVE)
    mu = number(name, "momentum", momentum, BETA)
    decay = number(name, "weight_decay", weight_decay, NOT_NEGATIVE)
    take = 1 - number(name, "dampening", dampening, BETA)
    if flag(name, "nesterov", nesterov) and take != 1:
        raise ValueError(f"{name}: dampening expected 0 with nesterov, got {dampening!r}")
    d, wd, bd = g + 2 * decay * wg + decay * decay * n, wg + decay * n, bg + decay * c
    q_next = mu * mu * q + take * take * d + 2 * mu * take * bd
    wb = mu * c + take * wd  # b' from here on
    if not nesterov:
        return Norms(n - 2 * lr * wb + lr * lr * q_next, wb - lr * q_next, q_next)
    db = mu * bd + d
    ws, ss, sb = wd + mu * wb, d + 2 * mu * db + mu * mu * q_next, db + mu * q_next
    return Norms(n - 2 * lr * ws + lr * lr * ss, wb - lr * sb, q_next)


def next_effective_lr(*, effective_lr: float, intrinsic_lr: float, unit_grad_sq: float) -> float:
    r"""The effective learning rate :math:`e = \eta/|w|^2` after a step without momentum, from nothing but itself.

    .. math::
        e' = \frac{e}{(1-\lambda_e)^2 + e^2 |g_v|^2}, \qquad\text{or, with } \gamma = e^{-2}, \qquad
        \gamma' = (1-\lambda_e)^4\gamma + 2(1-\lambda_e)^2 |g_v|^2 + |g_v|^4/\gamma

    :math:`g_v = |w| g` is the gradient at w/|w|. lr and weight decay enter by their product alone: training with
    (lr, weight_decay, w) and (c^2 lr, weight_decay/c^2, c w) is the same.

    Args:
        effective_lr: finite, > 0, that of the step.
        intrinsic_lr: lr * weight_decay, finite, >= 0.
        unit_grad_sq: :math:`|g_v|^2 = |w|^2|g|^2`, finite, >= 0.

    Reference: Li, Lyu, Arora 2020, arXiv 2010.02916, whose equation for gamma is the limit of small steps; this ours.

    >>> next_effective_lr(effective_lr=0.5, intrinsic_lr=0.5, unit_grad_sq=1.0)
    1.0
    """
    name = "next_effective_lr"
    e = number(name, "effective_lr", effective_lr, POSITIVE)
    keep = 1 - number(name, "intrinsic_lr", intrinsic_lr, NOT_NEGATIVE)
    shrunk = keep * keep + e * e * number(name, "unit_grad_sq", unit_grad_sq, NOT_NEGATIVE)
    return e / shrunk if shrunk else math.inf


def step_angle(*, weight_sq: float, grad_sq: float, lr: float, weight_decay: float = 0.0) -> float:
    r"""The angle between w and w' of a step without momentum on a scale-invariant loss, in radians.

    .. math::
        \tan\theta = \frac{\eta |g|}{(1-\eta\lambda) |w|}

    Args:
        weight_sq, grad_sq: before the step; finite, > 0 and >= 0.
        lr, weight_decay: finite, >= 0.

    Reference: ours.

    >>> round(math.degrees(step_angle(weight_sq=4.0, grad_sq=4.0, lr=0.5, weight_decay=1.0)), 9)
    45.0
    """
    name = "step_angle"
    n = number(name, "weight_sq", weight_sq, POSITIVE)
    g = number(name, "grad_sq", grad_sq, NOT_NEGATIVE)
    lr, keep = _lr_and_keep(name, lr, weight_decay)
    return math.atan2(lr * math.sqrt(g), keep * math.sqrt(n))


def mean_log_secant(
    *, first_weight_sq: float, last_weight_sq: float, steps: int, lr: float, weight_decay: float
) -> float:
    r"""The mean of :math:`-\ln\cos\theta_t` over the steps of a run without momentum: its angles need no gradient.

    .. math::
        -\frac1T \sum_{t<T} \ln\cos\theta_t = \ln\frac{1}{1-\eta\lambda} + \frac{1}{2T} \ln\frac{|w_T|^2}{|w_0|^2}

    For small angles it is half their mean square. As the norm is bounded, the last term vanishes, and weight decay
    alone decides how far a scale-invariant network turns: :math:`E\theta^2 \to 2\eta\lambda`, for any loss and data,
    with noise or without.

    Args:
        first_weight_sq, last_weight_sq: :math:`|w_0|^2` and :math:`|w_T|^2`, finite, > 0.
        steps: T, an integer >= 1.
        lr, weight_decay: of all steps; finite, >= 0, with lr * weight_decay < 1.

    Reference: ours.

    >>> mean_log_secant(first_weight_sq=3.0, last_weight_sq=3.0, steps=10, lr=0.5, weight_decay=1.0) == math.log(2)
    True
    """
    name = "mean_log_secant"
    first = number(name, "first_weight_sq", first_weight_sq, POSITIVE)
    last = number(name, "last_weight_sq", last_weight_sq, POSITIVE)
    steps = integer(name, "steps", steps, 1)
    rate, keep = _lr_and_keep(name, lr, weight_decay)
    if keep <= 0:
        decay = rate * float(weight_decay)
        raise ValueError(f"{name}: lr * weight_decay expected < 1, got {lr!r} * {weight_decay!r} = {decay!r}")
    return -math.log1p(-rate * float(weight_decay)) + (math.log(last) - math.log(first)) / (2 * steps)


def _lr_and_keep(name: str, lr: Any, weight_decay: Any) -> tuple[float, float]:
    """lr, and what decay leaves of the weights."""
    lr = number(name, "lr", lr, NOT_NEGATIVE)
    return lr, 1 - lr * number(name, "weight_decay", weight_decay, NOT_NEGATIVE)
