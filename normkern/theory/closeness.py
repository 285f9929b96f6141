"""When SGD can follow its SDE (Li, Malladi, Arora 2021, arXiv 2102.12470).

Two runs are C-close if the ratios of their |w|^2, |grad L|^2 and tr(Sigma) at equilibrium all lie in [1/C, C]. The
conditions are necessary, not sufficient.
"""

from __future__ import annotations

import math

from .arguments import CLOSENESS, NOT_NEGATIVE, POSITIVE, RATIO, number


def nsr_condition(C: float = math.sqrt(2), *, lr: float | None = None, weight_decay: float | None = None) -> float:
    r"""The least noise-to-signal ratio N/G of the batch gradient with which SGD can be C-close to its SDE.

    .. math::
        \frac{N}{G+N} \ge \frac{1}{C^2 (1 - \eta\lambda/2)} \ge \frac{1}{C^2},
        \qquad\text{that is}\quad \frac{N}{G} \ge \frac{1}{C^2 (1 - \eta\lambda/2) - 1} \ge \frac{1}{C^2 - 1}

    N and G at the equilibrium of SGD on a scale-invariant loss. With `lr` and `weight_decay` the first, exact form;
    without them the second, which every run must meet. Proof: with the SDE's R_s, N_s, which are C-close to R, N,
    :math:`N \ge N_s/C = 2\lambda R_s/(\eta C) \ge 2\lambda R/(\eta C^2) = (G+N)/(C^2(1-\eta\lambda/2))`.

    Args:
        C: finite, > 1. sqrt(2), the usual choice, asks for N >= G.
        lr: finite, > 0; together with `weight_decay`.
        weight_decay: finite, >= 0, with lr * weight_decay < 2.

    Returns:
        The ratio to compare `nsr_batch` with; `math.inf` where lr * weight_decay is so large that no noise is enough.

    Reference: arXiv 2102.12470, the necessary condition for C-closeness, there with N and G of the SDE.

    >>> round(nsr_condition(), 12)
    1.0
    >>> nsr_condition(2, lr=0.5, weight_decay=0.5)
    0.4
    """
    C = number("nsr_condition", "C", C, CLOSENESS)
    if (lr is None) != (weight_decay is None):
        missing = "weight_decay" if weight_decay is None else "lr"
        raise ValueError(f"nsr_condition: {missing} expected a number, as the other of the two is given, got None")
    decay = 0.0
    if lr is not None:
        lr = number("nsr_condition", "lr", lr, POSITIVE)
        weight_decay = number("nsr_condition", "weight_decay", weight_decay, NOT_NEGATIVE)
        decay = lr * weight_decay
        if decay >= 2:
            raise ValueError(
                f"nsr_condition: lr * weight_decay expected < 2, got {lr!r} * {weight_decay!r} = {decay!r}"
            )
    excess = C * C * (1 - decay / 2) - 1
    return 1 / excess if excess > 0 else math.inf


def max_linear_scaling(*, nsr_batch: float, C: float = math.sqrt(2)) -> float:
    r"""Return the largest factor k of batch and learning rate whose run can stay C-close (linear scaling rule).

    .. math::
        k \le C^2 + (C^2 - 1) \frac{N}{G} = C^2 \left(1 + \frac{N}{G}\right) - \frac{N}{G}

    N/G measured at the equilibrium of the run with the *small* batch, on a scale-invariant loss; the batch grows from B
    to kB and lr to k lr. C-close is meant for the noise in units of time, lr tr(Sigma), which the rule keeps. Proof,
    with the two runs' R, G, N: :math:`(k G_1 + N_1)/C \le k (G_2 + N_2) = (2/\eta - k\lambda)\lambda R_2 \le C (2/\eta
    - \lambda)\lambda R_1 = C (G_1 + N_1)`.

    The paper's form is "not C-close if :math:`k > C^2 (1 + N/G)`"; ours is smaller by N/G, from the same proof, because
    it keeps the N_1 of the left side.

    Args:
        nsr_batch: >= 0; `math.inf` where there is no signal, and then no limit.
        C: finite, > 1.

    Returns:
        k, > 1, not rounded.

    Reference: arXiv 2102.12470, the section on the failure of the linear scaling rule; this form is ours.

    >>> max_linear_scaling(nsr_batch=3.0, C=2)
    13.0
    """
    nsr_batch = number("max_linear_scaling", "nsr_batch", nsr_batch, RATIO)
    C = number("max_linear_scaling", "C", C, CLOSENESS)
    return C * C + (C * C - 1) * nsr_batch
