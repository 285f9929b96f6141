"""Scaling rules: how hyperparameters follow the batch size."""

from __future__ import annotations

import math
from typing import NamedTuple

from .arguments import BETA, DECAYING, NOT_NEGATIVE, POSITIVE, batch_ratio, beta_pair, number, simplest


class AdamScaling(NamedTuple):
    """Hyperparameters of Adam at a new batch size, named as torch's: ``Adam(params, **scaling._asdict())``."""

    lr: float
    betas: tuple[float, float]
    eps: float


def linear_scaling(*, lr: float, batch_size: int, new_batch_size: int) -> float:
    r"""The learning rate of SGD at another batch size, by the linear scaling rule.

    .. math::
        B \to kB: \quad \eta \to k\eta, \quad \text{steps} \to \text{steps}/k

    Weight decay and momentum stay. The SDE of both runs is the same, as :math:`\eta\Sigma_B` is; whether SGD still
    follows it at k times the batch is what `max_linear_scaling` bounds.

    Args:
        lr: finite, > 0.
        batch_size, new_batch_size: integers >= 1; k is their ratio, which may be below 1.

    Returns:
        The new lr.

    Reference: Goyal et al. 2017, arXiv 1706.02677; arXiv 2102.12470 for the SDE's view.

    >>> linear_scaling(lr=0.1, batch_size=128, new_batch_size=512)
    0.4
    """
    name = "linear_scaling"
    lr = number(name, "lr", lr, POSITIVE)
    k = batch_ratio(name, batch_size, new_batch_size)
    return number(name, "the new lr", lr * k, POSITIVE)


def square_root_scaling(
    *, lr: float, betas: tuple[float, float], eps: float, batch_size: int, new_batch_size: int
) -> AdamScaling:
    r"""The hyperparameters of Adam at another batch size, by the square root scaling rule.

    .. math::
        B \to kB: \quad \eta \to \sqrt{k}\,\eta, \quad 1-\beta_i \to k (1-\beta_i), \quad
        \epsilon \to \epsilon/\sqrt{k}, \quad \text{steps} \to \text{steps}/k

    for RMSprop as well (beta_2 is its alpha). Valid where the noise dominates the gradient, NSR >> 1. The weight decay
    of `torch.optim.Adam`, which is part of the gradient, stays; for that of AdamW see
    `square_root_weight_decay`.

    Args:
        lr: finite, > 0.
        betas: two numbers in [0, 1).
        eps: finite, >= 0.
        batch_size, new_batch_size: integers >= 1; k is their ratio, which may be below 1.

    Returns:
        `AdamScaling`: lr, betas, eps.

    Raises:
        ValueError: a new beta leaves [0, 1): k is larger than 1/(1 - beta), the steps that the average spans.

    Reference: Malladi, Lyu, Panigrahi, Arora 2022, arXiv 2205.10287, the square root scaling rule.

    >>> square_root_scaling(lr=0.001, betas=(0.9, 0.999), eps=1e-8, batch_size=256, new_batch_size=1024)
    AdamScaling(lr=0.002, betas=(0.6, 0.996), eps=5e-09)
    """
    name = "square_root_scaling"
    lr = number(name, "lr", lr, POSITIVE)
    eps = number(name, "eps", eps, NOT_NEGATIVE)
    old = beta_pair(name, betas)
    k = batch_ratio(name, batch_size, new_batch_size)
    root = math.sqrt(k)
    new = [float(1 - k * (1 - simplest(beta))) for beta in old]
    for i, beta in enumerate(new):
        if not 0 <= beta < 1:
            raise ValueError(
                f"{name}: betas[{i}] expected to stay in [0, 1), got {beta!r} from "
                f"{old[i]!r} at {float(k):g} times the batch"
            )
    return AdamScaling(
        number(name, "the new lr", lr * root, POSITIVE),
        (new[0], new[1]),
        number(name, "the new eps", eps / root, NOT_NEGATIVE),
    )


def square_root_weight_decay(*, weight_decay: float, batch_size: int, new_batch_size: int) -> float:
    r"""The weight decay of AdamW at another batch size, beside `square_root_scaling`.

    .. math::
        B \to kB: \quad \lambda \to \sqrt{k}\,\lambda

    so that the decay per sample, :math:`\eta\lambda/B`, stays: the step decays by :math:`\eta\lambda`, of which
    :math:`\eta` grows by sqrt(k) too. The coupled weight decay of Adam is part of the gradient and stays.

    Args:
        weight_decay: finite, >= 0.
        batch_size, new_batch_size: integers >= 1; k is their ratio, which may be below 1.

    Returns:
        The new weight decay.

    Reference: ours, from the SDE of Malladi, Lyu, Panigrahi, Arora 2022, arXiv 2205.10287.

    >>> square_root_weight_decay(weight_decay=0.1, batch_size=256, new_batch_size=1024)
    0.2
    """
    name = "square_root_weight_decay"
    weight_decay = number(name, "weight_decay", weight_decay, NOT_NEGATIVE)
    k = batch_ratio(name, batch_size, new_batch_size)
    return number(name, "the new weight decay", weight_decay * math.sqrt(k), NOT_NEGATIVE)


def beta_by_samples(*, beta: float, batch_size: int, new_batch_size: int) -> float:
    r"""The beta of an average whose half-life in samples (tokens) stays as the batch size changes.

    .. math::
        B \to kB: \quad \beta \to \beta^k

    Not what `square_root_scaling` does, :math:`1-\beta \to k(1-\beta)`: the two agree for :math:`k(1-\beta) \ll 1`.
    This one stays in (0, 1) for every k.

    Args:
        beta: in [0, 1).
        batch_size, new_batch_size: integers >= 1, in samples or tokens; k is their ratio, which may be below 1.

    Returns:
        The new beta.

    Raises:
        ValueError: the new beta rounds to 1.

    Reference: Marek et al. 2025, arXiv 2507.07101, for beta2 of Adam.

    >>> round(beta_by_samples(beta=0.95, batch_size=512, new_batch_size=1), 6)
    0.9999
    """
    name = "beta_by_samples"
    beta = number(name, "beta", beta, BETA)
    k = batch_ratio(name, batch_size, new_batch_size)
    return number(name, "the new beta", beta ** float(k), BETA)


def decay_timescale(*, lr: float, weight_decay: float) -> float:
    r"""The number of steps over which AdamW's weights average its updates: :math:`1/(\eta\lambda)`.

    With decoupled weight decay :math:`w' = (1-\eta\lambda) w - \eta s` the weights are an exponential moving average of
    :math:`-s/\lambda` with this timescale. Divided by the steps of an epoch it is in epochs, and the number that stays
    as data, model and batch grow.

    Args:
        lr: finite, > 0.
        weight_decay: finite, > 0, with lr * weight_decay < 1.

    Returns:
        Steps.

    Reference: Wang and Aitchison 2024, arXiv 2405.13698.

    >>> decay_timescale(lr=0.25, weight_decay=0.5)
    8.0
    """
    name = "decay_timescale"
    lr = number(name, "lr", lr, POSITIVE)
    weight_decay = number(name, "weight_decay", weight_decay, DECAYING)
    if lr * weight_decay >= 1:
        raise ValueError(
            f"{name}: lr * weight_decay expected < 1, got {lr!r} * {weight_decay!r} = {lr * weight_decay!r}"
        )
    return number(name, "the timescale", 1 / lr / weight_decay, POSITIVE)
