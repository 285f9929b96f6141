"""`TEXP`: tapered exponential learning rates, step decay with weight decay as the paper rewrites it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import Optimizer

from .. import ops
from ..optim.options import BUFFER
from ..theory import exponential_decay
from .growing import GrowingLR, Growth, Plan, finite


class _Phase(NamedTuple):
    """One phase between two milestones, of the run with weight decay at its equilibrium there."""

    lr: float
    alpha: float
    log2_alpha: float
    z: float  # what of the momentum buffer is along the weights


class TEXP(GrowingLR):
    r"""Sets the exponential learning rates that replace weight decay under step decay, as in the paper.

    .. math::
        \tilde\eta_t = \frac{\eta_I}{A_t A_{t+1}}, \qquad A_{t+1} = \alpha_I A_t, \quad A_0 = 1, \qquad
        \eta_I = \eta_0 \gamma^I \text{ for } T_I \le t < T_{I+1}

    with :math:`\alpha_I` = `theory.exponential_factor` of phase I: the learning rate grows by :math:`\alpha_I^{-2}` a
    step, and at a milestone is multiplied with :math:`\gamma / (\alpha_{I-1} \alpha_I)`. Without momentum this is the
    run with weight decay, exactly. With momentum it is at each phase's start what that run tends to: close, not equal.
    TEXP++ makes it exact by changing the momentum buffers, where :math:`z_I = (1-\alpha_I)/(\alpha_I \eta_I)`:

    .. math::
        \tilde b_0 = -z_0 \tilde w_0, \qquad
        \tilde b \mathrel{+}= A_T^2 (z_{I-1} - z_I) \tilde w_T \text{ at each milestone } T = T_I

    `EquivalentExponentialLR` is exact for every schedule and leaves the buffers alone: use that one, unless it is the
    paper's that you want.

    Args:
        optimizer: `normkern.SGD`, `torch.optim.SGD` or one with the same update; ``weight_decay=0``, no nesterov, no
            dampening, a constant momentum. All its param groups are mapped; one with a weight_decay of 0 here has plain
            step decay. For `plus_plus` a `torch.optim.SGD`, of which `normkern.SGD` is one.
        weight_decay: of the run with weight decay; a finite number >= 0, or a list, one per param group.
        milestones: the steps T_1 < T_2 < ... at which lr drops; integers >= 1.
        gamma: what it is multiplied with; a finite number > 0.
        last_epoch: as in torch: n > -1 begins at step n + 1. Not for `plus_plus`.
        plus_plus: TEXP++. Constructing writes the buffers of all parameters that require gradients, from the weights at
            that moment; there must be none, so a checkpoint of the optimizer is loaded afterwards. What is followed is
            the run that starts without buffers.

    Attributes:
        weight_decay, milestones, gamma, plus_plus: as given.
        last_epoch: the step whose learning rates are in force.

    Calls, ranges, what is synchronised, and what else sees the growing weights: as for `EquivalentExponentialLR`. With
    `plus_plus` `step()` also writes the buffers at a milestone, and the weights are not to be changed by others.

    Raises:
        TypeError: optimizer is no `torch.optim.Optimizer`.
        ValueError: at construction or at a step, before anything is changed: as `EquivalentExponentialLR`; a dampening;
            a momentum that changes; with `plus_plus` buffers that exist already, or a last_epoch.

    Reference: Li and Arora 2019, arXiv 1910.07454, TEXP and TEXP++, here for torch's buffers.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = torch.optim.SGD([w], lr=0.5)
    >>> schedule = TEXP(opt, weight_decay=1.0, milestones=[2], gamma=0.5)  # halving, from step 2 on times 3/4
    >>> for step in range(4):
    ...     print(step, [round(lr, 4) for lr in schedule.get_last_lr()])
    ...     opt.step()
    ...     schedule.step()
    0 [1.0]
    1 [4.0]
    2 [5.3333]
    3 [9.4815]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weight_decay: float | Sequence[float],
        milestones: Sequence[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
        *,
        plus_plus: bool = False,
    ) -> None:
        self._check_arguments(optimizer, weight_decay, None, last_epoch)
        if not isinstance(milestones, (list, tuple)) or any(type(t) is not int for t in milestones):
            raise ValueError(f"TEXP: milestones expected a list of integers, got {milestones!r}")
        if any(b <= a for a, b in zip([0, *milestones], milestones, strict=False)):
            raise ValueError(f"TEXP: milestones expected to grow, from 1 on, got {milestones!r}")
        self.milestones, self.gamma = list(milestones), finite(gamma, "TEXP: gamma")
        if self.gamma == 0:
            raise ValueError(f"TEXP: gamma expected a number > 0, got {gamma!r}")
        if type(plus_plus) is not bool:
            raise ValueError(f"TEXP: plus_plus expected True or False, got {plus_plus!r}")
        self.plus_plus = plus_plus
        if plus_plus:
            if not isinstance(optimizer, torch.optim.SGD):
                raise ValueError(
                    "TEXP: optimizer expected a torch.optim.SGD, as plus_plus writes its buffers, got "
                    f"{type(optimizer).__name__}"
                )
            if last_epoch != -1:
                raise ValueError(
                    f"TEXP: last_epoch expected -1 with plus_plus, got {last_epoch!r}; load_state_dict resumes a run"
                )
        super().__init__(optimizer, last_epoch)

    def _start(self) -> list[None]:
        self._groups_now()
        self._momentum = [self._momentum_now(i)[0] for i in self.groups]
        self._phases = [self._phases_of(i, lr) for i, lr in enumerate(self._initial)]
        if self.plus_plus:
            for i, j, p in self._buffered():
                if self.optimizer.state.get(p, {}).get(BUFFER) is not None:
                    raise ValueError(
                        f"{self._place(i)}: expected no momentum buffers yet, as plus_plus writes the first, got one "
                        f"for params[{j}]; construct the scheduler before the optimizer's load_state_dict"
                    )
        return [None for _ in self.groups]

    def _phases_of(self, i: int, initial: float) -> list[_Phase]:
        phases, momentum, weight_decay = [], self._momentum[i], self.weight_decay[i]
        if not momentum < 1:
            raise ValueError(f"{self._place(i)}: momentum expected a number in [0, 1), got {momentum!r}")
        for phase, step in enumerate([0, *self.milestones]):
            lr = initial * self.gamma**phase
            if not 0 < lr < math.inf:
                raise ValueError(f"{self._place(i)}: lr from step {step} expected a finite number > 0, got {lr!r}")
            self._check_bound(i, lr, momentum, ops.most_decay(momentum), f"from step {step}")
            decay = exponential_decay(lr=lr, weight_decay=weight_decay, momentum=momentum)
            if decay == 1:
                raise ValueError(
                    f"{self._place(i)}: lr * weight_decay from step {step} expected less than 1, the whole of the "
                    f"weights, got {lr!r} * {weight_decay!r}"
                )
            phases.append(_Phase(lr, 1 - decay, math.log1p(-decay) / math.log(2), decay / ((1 - decay) * lr)))
        return phases

    def _plan(self, step: int) -> Plan:
        self._groups_now()
        lrs = []
        for i in self.groups:
            momentum, dampening = self._momentum_now(i)
            if dampening != 0:
                raise ValueError(f"{self._place(i)}: dampening expected 0, got {dampening!r}")
            if momentum != self._momentum[i]:
                raise ValueError(
                    f"{self._place(i)}: momentum expected to stay {self._momentum[i]!r}, got {momentum!r}; "
                    "EquivalentExponentialLR follows one that changes"
                )
            phase = self._phases[i][bisect_right(self.milestones, step)]
            log2_scale = self._log2_scale(i, step)
            exponent = math.floor(-2 * log2_scale)
            mantissa = phase.lr / phase.alpha * 2 ** (-2 * log2_scale - exponent)
            doublings = math.floor(-self._log2_scale(i, step + 1)) - math.floor(-log2_scale)
            lrs.append(self._within_range(i, step, Growth(mantissa, exponent, doublings)))
        return Plan(lrs, self._states)

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        step = self.last_epoch
        if not self.plus_plus or step not in (0, *self.milestones):
            return
        phase = bisect_right(self.milestones, step)
        with torch.no_grad():
            for i, _, p in self._buffered():
                phases, scale = self._phases[i], 2.0 ** self._log2_scale(i, step)
                before = phases[phase - 1].z if step else 0.0
                share = scale * scale * (before - phases[phase].z)
                state = self.optimizer.state[p]
                if step == 0:
                    state[BUFFER] = p.detach() * share
                elif state.get(BUFFER) is not None:
                    state[BUFFER].add_(p, alpha=share)

    step.__doc__ = GrowingLR.step.__doc__

    def _buffered(self) -> list[tuple[int, int, torch.Tensor]]:
        """Return (group, index, parameter) of all parameters that will have buffers."""
        return [
            (i, j, p)
            for i in self.groups
            if self._momentum[i] != 0
            for j, p in enumerate(self.optimizer.param_groups[i]["params"])
            if p.requires_grad
        ]

    def _log2_scale(self, i: int, step: int) -> float:
        """Return log2 of A at a step, without a sum over the steps, in which rounding errors would grow."""
        edges = [0, *self.milestones, math.inf]
        steps = [max(0, min(step, end) - start) for start, end in pairwise(edges)]
        return math.fsum(n * phase.log2_alpha for n, phase in zip(steps, self._phases[i], strict=True))

    def log2_true_scale(self) -> list[float]:
        """Return log2 of `true_scale`, which never underflows."""
        return [self._log2_scale(i, self.last_epoch) for i in self.groups]

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, without the optimizer."""
        own = {
            "milestones": list(self.milestones),
            "gamma": self.gamma,
            "plus_plus": self.plus_plus,
            "momentum": list(self._momentum),
        }
        return {**super().state_dict(), **own}

    def _fixed(self) -> tuple[str, ...]:
        return (*super()._fixed(), "milestones", "gamma", "plus_plus", "momentum")

    def _loaded(self, state_dict: Mapping[str, Any], base_lrs: list[float], where: str) -> list[None]:
        self._phases = [self._phases_of(i, lr) for i, lr in enumerate(base_lrs)]
        return list(self._states)

    def __repr__(self) -> str:
        return (
            f"TEXP(weight_decay={self.weight_decay}, milestones={self.milestones}, gamma={self.gamma}, "
            f"plus_plus={self.plus_plus}, last_epoch={self.last_epoch})"
        )
