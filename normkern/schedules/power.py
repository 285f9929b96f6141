"""`PowerDecayLR`: learning rates that fall as a power of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer


class PowerDecayLR(LRScheduler):
    r"""Sets the learning rate of step t, counted from 0, to :math:`\eta_t = \eta_0 (t+1)^{-a}`: call `step` at each.

    For auto rate tuning give scale-invariant weights, in a param group of their own, any exponent from 0, a constant
    lr, to 1/2, and all others 1/2: then SGD without momentum and weight decay converges at the rate :math:`T^{-1/4}`
    of the gradient norm, up to logarithms, whatever lr the first group has. Full-batch gradient descent needs no
    schedule: exponents 0.

    Args:
        optimizer: any.
        exponent: a, a finite number >= 0; or a list, one per param group.
        last_epoch: as in torch.

    Raises:
        ValueError: an exponent is no such number, or there are not as many as groups.

    Reference: Arora, Li, Lyu 2018, arXiv 1812.03981, theorem 4.2.

    >>> import torch
    >>> invariant, rest = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    >>> opt = torch.optim.SGD([{"params": [invariant], "lr": 0.3}, {"params": [rest], "lr": 0.1}])
    >>> schedule = PowerDecayLR(opt, exponent=[0, 0.5])
    >>> for t in range(4):
    ...     opt.step()
    ...     schedule.step()
    >>> [round(lr, 6) for lr in schedule.get_last_lr()]
    [0.3, 0.044721]
    """

    def __init__(self, optimizer: Optimizer, exponent: float | Sequence[float] = 0.5, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"PowerDecayLR: optimizer expected an Optimizer, got {type(optimizer).__name__}")
        count = len(optimizer.param_groups)
        if isinstance(exponent, (list, tuple)):
            if len(exponent) != count:
                raise ValueError(
                    f"PowerDecayLR: exponent expected a number or {count}, one per param group, got {len(exponent)}"
                )
            self.exponents = [_exponent(a, f"exponent[{i}]") for i, a in enumerate(exponent)]
        else:
            self.exponents = [_exponent(exponent, "exponent")] * count
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates of the step that `last_epoch` counts."""
        return [lr * math.pow(self.last_epoch + 1, -a) for lr, a in zip(self.base_lrs, self.exponents, strict=True)]

    def __repr__(self) -> str:
        return f"PowerDecayLR(exponent={self.exponents}, last_epoch={self.last_epoch})"


def _exponent(a: Any, name: str) -> float:
    x = float(a) if isinstance(a, Real) and not isinstance(a, bool) else math.nan
    if not 0 <= x < math.inf:
        raise ValueError(f"PowerDecayLR: {name} expected a finite number >= 0, got {a!r}")
    return x
