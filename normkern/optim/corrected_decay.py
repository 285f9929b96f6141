r"""``decay="corrected"``: weight decay that falls with the learning rate.

Under a learning rate that falls, a constant weight decay moves the equilibrium: the ratio of gradient norm to weight
norm of a scale-invariant weight grows as :math:`\sqrt{\lambda/\eta_t}`, and gradients grow at the end of training. With
:math:`\lambda_t = \lambda \eta_t/\eta_{\max}` the ratio stays (Defazio 2025, arXiv 2506.02285).
"""

from __future__ import annotations

from typing import Any

from .options import NORM, At, number, place

#: The value of the option, and the group key with the largest learning rate of the schedule. OneCycleLR sets it; other
#: schedulers of torch set "initial_lr".
CORRECTED, MAX_LR = "corrected", "max_lr"
#: How far a scheduler's rounding may lead above the largest learning rate, relative to it.
_ROUNDING = 1e-6


def with_decay_of_step(group: dict[str, Any], plain: str, where: str | At) -> dict[str, Any]:
    """Return a param group with the weight decay of this step, and `plain` as its form of decay.

    The group itself where its decay is not corrected.

    Raises:
        ValueError: the group keeps norms; the largest learning rate is not known or not positive, or the learning rate
            is larger.
    """
    if group["decay"] != CORRECTED:
        return group
    if group.get(NORM) is not None:
        raise ValueError(
            f'{place(where)}: norm expected None with decay="corrected", as steps that keep norms apply no weight '
            f"decay, got {group[NORM]!r}"
        )
    lr, weight_decay = number(group["lr"], "lr", where), number(group["weight_decay"], "weight_decay", where)
    largest = group.get(MAX_LR, group.get("initial_lr"))
    if largest is None:
        raise ValueError(
            f'{place(where)}: decay="corrected" expected the largest learning rate of the schedule, as the group\'s '
            f"{MAX_LR} or from a scheduler, which sets initial_lr, got neither"
        )
    most = number(largest, MAX_LR, where)
    if not most > 0 or not lr <= most * (1 + _ROUNDING):
        raise ValueError(
            f'{place(where)}: decay="corrected" expected a learning rate of at most {MAX_LR}, got {lr!r} and {MAX_LR} '
            f"{most!r}"
        )
    return {**group, "weight_decay": weight_decay * min(1.0, lr / most), "decay": plain}
