"""The gauge of ``decay="exponential"``: how stored weights stand for those of the run with weight decay."""

from __future__ import annotations

from ._binary import GaugeStep, binary
from .types import Buffers, Gauge


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
    r"""Take one step of the gauge, by which a step without weight decay follows one with it on scale-invariant weights.

    The stored :math:`(w_s, b_s)` stand for weights w and momentum buffer b of the run with weight decay:

    .. math::
        w = f w_s, \quad b = b_s/f + z w, \quad f = a\,2^e \in [2^{-1/2}, 2^{1/2})

    and the gradient at :math:`w_s` is f times that at w. a, all the decay so far, and z follow the optimizer's own
    recurrence on one number with zero gradient, for any schedule of everything:

    .. math::
        z' = \frac{\mu z + (1-\tau)\lambda}{q}, \quad q = \frac{a'}{a} = 1 - \eta(\mu z + (1-\tau)\lambda), \quad
        w_s' = 2^{-k}\Bigl(w_s - \frac{\eta}{f^2 q} b_s'\Bigr)

    with :math:`e' = e + k` such that f' stays in its range. With nesterov
    :math:`q = 1 - \eta(\lambda + \mu q z')`, and :math:`\mu(1-\eta\lambda)` for its buffer.

    Args:
        gauge: (f, z, e); `NEW_GAUGE` before the first step.
        lr, momentum, dampening, weight_decay, nesterov: of the run with weight decay, at this step.
        buffers: which momentum buffers exist.
        leave: the step that returns to coupled weight decay, after which :math:`w_s = w, b_s = b`.

    Returns:
        The argument `gauge` of `sgd_`; its ``next`` is the gauge of the next step. None if lr * weight_decay is more
        than `most_decay(momentum)` = :math:`(1-\sqrt\mu)^2`, where a would change its sign, or no number.

    Reference: Li and Arora, arXiv 1910.07454, for constant hyperparameters; the extension to
    any schedule, and to nesterov, is derived here.

    >>> from normkern.ops import NEW_GAUGE
    >>> step = gauge_step(NEW_GAUGE, 0.5, 0.0, 0.0, 0.8, buffers=Buffers.NONE)  # w' = w - 0.5 (g + 0.8 w)
    >>> step.keep, step.grad_to_weight  # ws' = (w - g 0.5/0.6) / 2, which stands for 1.2 ws'
    (0.5, 0.4166666666666667)
    >>> step.next
    (1.2, 0.0, 1)
    """
    return binary.gauge_step(gauge, lr, momentum, dampening, weight_decay, nesterov, buffers, leave)
