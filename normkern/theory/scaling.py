"""Scaling rules: how hyperparameters follow the batch size."""

from __future__ import annotations

import math
from typing import NamedTuple

from .arguments import BETA, NOT_NEGATIVE, POSITIVE, batch_ratio, number, simplest


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
    of `torch.optim.Adam`, which is part of the gradient, stays; that of AdamW becomes sqrt(k) times itself, so that
    the decay per sample, lr * weight_decay / B, stays.

    Args:
        lr: finite, > 0.
        betas: two numbers in [0, 1).
        eps: finite, >= 0.
        batch_size, new_batch_size: integers >= 1; k is their ratio, which may be below 1.

    Returns:
        `AdamScaling`: lr, betas, eps.

    Raises:
        ValueError: a new beta leaves [0, 1): k is larger than 1/(1 - beta), the steps that the average spans.

    Reference: Malladi, Lyu, Panigrahi, Arora 2022, arXiv 2205.10287, the square root scaling rule; for AdamW ours.

    >>> square_root_scaling(lr=0.001, betas=(0.9, 0.999), eps=1e-8, batch_size=256, new_batch_size=1024)
    AdamScaling(lr=0.002, betas=(0.6, 0.996), eps=5e-09)
    """
    name = "square_root_scaling"
    lr = number(name, "lr", lr, POSITIVE)
    eps = number(name, "eps", eps, NOT_NEGATIVE)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name}: betas expected two numbers, got {betas!r}")
    old = [number(name, f"betas[{i}]", beta, BETA) for i, beta in enumerate(betas)]
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
