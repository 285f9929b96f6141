"""How weights without decay stand for those of the run with it, from step to step."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

from . import _binary as loaded
from ._binary import GaugeStep


class Buffers(IntEnum):
    """What a param group has of momentum buffers when a step begins."""

    NONE = 0  #: none, and momentum is 0
    FIRST = 1  #: none yet: the step makes them
    KEPT = 2
    RESTING = 3  #: those of earlier steps, but momentum is 0


#: (scale, z, exponent): how weights without decay stand for those of the run with it. See `gauge_step`.
Gauge: TypeAlias = tuple[float, float, int]
NEW_GAUGE: Gauge = (1.0, 0.0, 0)


def gauge_step(
    gauge: Gauge,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool = False,
    buffers: Buffers = Buffers.KEPT,
    leave: bool = False,
) -> GaugeStep | None:
    r"""One step of the gauge: how a step without weight decay follows one with it, on scale-invariant weights.

    What is stored, :math:`(w_s, b_s)`, stands for weights w and momentum buffer b of the run with weight decay:

    .. math::
        w = f w_s, \quad b = b_s/f + z w, \quad f = a\,2^e \in [2^{-1/2}, 2^{1/2})

    and the gradient at :math:`w_s` is f times that at w. a, all the decay so far, and z follow the optimizer's own
    recurrence on one number with zero gradient, for any schedule of everything:

    .. math::
        z' = \frac{\mu z + (1-\tau)\lambda}{q}, \quad q = \frac{a'}{a} = 1 - \eta(\mu z + (1-\tau)\lambda), \quad
        w_s' = 2^{-k}\Bigl(w_s - \frac{\eta}{f^2 q} b_s'\Bigr)

    with :math:`e' = e + k` such that f' stays in its range. Nesterov has its own:
    :math:`q = 1 - \eta(\lambda + \mu q z')`, and :math:`\mu(1-\eta\lambda)` for its buffer.

    Args:
        gauge: (f, z, e); `NEW_GAUGE` where nothing has decayed yet.
        lr, momentum, dampening, weight_decay, nesterov: of the run with weight decay, at this step.
        buffers: what there is of momentum buffers.
        leave: the step that returns to coupled weight decay, after which :math:`w_s = w, b_s = b`.

    Returns:
        What `sgd_` takes as `gauge`; its ``next`` is the gauge of the next step. None if lr * weight_decay is more than
        `most_decay(momentum)` = :math:`(1-\sqrt\mu)^2`, where a would change its sign, or no number.

    Reference: Li and Arora, arXiv 1910.07454, for constant hyperparameters; for any schedule, and nesterov, ours.

    >>> step = gauge_step(NEW_GAUGE, 0.5, 0.0, 0.0, 0.8, buffers=Buffers.NONE)  # w' = w - 0.5 (g + 0.8 w)
    >>> step.keep, step.grad_to_weight  # ws' = (w - g 0.5/0.6) / 2, which stands for 1.2 ws'
    (0.5, 0.4166666666666667)
    >>> step.next
    (1.2, 0.0, 1)
    """
    return loaded.binary.gauge_step(gauge, lr, momentum, dampening, weight_decay, nesterov, buffers, leave)
