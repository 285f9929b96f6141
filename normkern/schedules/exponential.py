"""`EquivalentExponentialLR`: a growing learning rate in place of weight decay, for any schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch.optim.optimizer import Optimizer

from .. import ops
from ..optim.options import BUFFER
from .growing import CURE, GrowingLR, Growth, Plan, a_list, finite

Schedule: TypeAlias = Callable[[int], float]


class _State(NamedTuple):
    """The state of one param group."""

    gauge: ops.Gauge  # of the weights, before the step whose learning rate is in force
    next: ops.Gauge  # after it
    buffers: ops.Buffers  # after it: NONE, KEPT, or RESTING since before the scale changed


_UNMAPPED = _State(ops.NEW_GAUGE, ops.NEW_GAUGE, ops.Buffers.NONE)


class EquivalentExponentialLR(GrowingLR):
    r"""Sets learning rates with which SGD without weight decay follows, on scale-invariant weights, the run with it.

    .. math::
        \tilde\eta_t = \frac{\eta_t}{a_t a_{t+1}}, \qquad
        \frac{a_{t+1}}{a_t} = 1 - \eta_t (\mu_t z_t + (1-\tau_t) \lambda),

        z_{t+1} = \frac{a_t}{a_{t+1}} (\mu_t z_t + (1-\tau_t) \lambda), \qquad a_0 = 1, z_0 = 0

    where :math:`\eta_t, \lambda, \mu_t, \tau_t` are lr, weight decay, momentum and dampening of the run that is
    followed. Its weights are :math:`w_t = a_t \tilde w_t`: other lengths, the same directions, so the same function,
    exactly, at every step. With everything constant the learning rate soon grows by alpha**-2 a step, alpha =
    `theory.exponential_factor`; where the schedule of :math:`\eta_t` drops, so does this one, then growing more
    slowly.

    Give the optimizer ``weight_decay=0`` and the same momentum and dampening, and call `step()` after each of its
    steps. What is not scale-invariant (the last layer, its bias, the affine parameters of a last normalisation) belongs
    into a param group that is not among `groups`, with a weight decay of its own.

    Args:
        optimizer: `normkern.SGD`, `torch.optim.SGD`, or one with the same update; without nesterov. Buffers that it
            already has are taken as those of the run to be followed.
        weight_decay: of the run with weight decay; a finite number >= 0, or a list, one per param group, of which those
            of groups that are not mapped are not used.
        schedule: ``schedule(step) -> lr`` of the run with weight decay, the lr itself, for step = 0, 1, ...; or a list,
            one per param group. None: constant at the group's initial lr. Not part of checkpoints.
        last_epoch: as in torch: n > -1 begins at step n + 1 of a run whose optimizer has taken the steps up to n, all
            with the momentum that the groups have now.
        groups: indices of the param groups that get the map. None: all. The others get ``schedule(step)``.

    Attributes:
        weight_decay, groups: as lists of one per group, and of indices.
        last_epoch: the step whose learning rates are in force.

    Momentum and dampening are read at each `step()`: one that changes is changed before the `step()` that sets the
    learning rate it goes with. Every parameter of a mapped group has a gradient at every step. Under a GradScaler call
    `step()` only where the optimizer has stepped.

    What else sees the weights' length sees it grow: thresholds of gradient clipping are to shrink like a_t (gradients
    do), an average over weights is to be of `true_scale` times them. Running statistics of a batch normalisation lag
    behind activations that grow by 1/alpha a step: a constant factor close to 1, harmless. Half precision gradients
    fade with a_t and may underflow; that is not noticed here.

    The learning rate and the weights grow until they leave their dtype, which takes some hundred epochs of usual
    settings in float32. Then `step()` raises and changes nothing. The learning rate is compared at each step with the
    largest number of the dtype it is used in: float32, float64 for float64 parameters; where torch's own loop steps
    float16 or bfloat16 parameters, theirs. The largest weight is measured each time that 1/a_t has doubled, which
    synchronises; else nothing is synchronised.

    Raises:
        TypeError: optimizer is no `torch.optim.Optimizer`.
        ValueError: at construction or at a step, before anything is changed: the optimizer is no SGD; a mapped group
            has nesterov, a weight decay, or l != 1 of `normkern.SVAG`; lr * weight_decay > (1 - sqrt(momentum))^2,
            where the scale would change its sign; momentum becomes 0 in the middle; lr or weights are about to leave
            their range; a schedule returns no finite number >= 0; an argument is none of the above.

    Reference: Li and Arora 2019, arXiv 1910.07454, for constant hyperparameters; for any schedule, and with
    buffers that begin as they do, ours.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = torch.optim.SGD([w], lr=0.5)
    >>> schedule = EquivalentExponentialLR(opt, weight_decay=1.0)  # weights of the run with it halve at each step
    >>> for step in range(3):
    ...     print(step, schedule.get_last_lr(), schedule.true_scale())
    ...     opt.step()
    ...     schedule.step()
    0 [1.0] [1.0]
    1 [4.0] [0.5]
    2 [16.0] [0.25]
    """

    _states: list[_State]

    def __init__(
        self,
        optimizer: Optimizer,
        weight_decay: float | Sequence[float],
        schedule: Schedule | Sequence[Schedule] | None = None,
        last_epoch: int = -1,
        *,
        groups: Sequence[int] | None = None,
    ) -> None:
        self._check_arguments(optimizer, weight_decay, groups, last_epoch)
        count = len(optimizer.param_groups)
        self._schedules: list[Schedule | None]
        if isinstance(schedule, (list, tuple)):
            if len(schedule) != count:
                raise ValueError(
                    f"EquivalentExponentialLR: schedule expected a function or {count}, one per param group, got "
                    f"{len(schedule)}"
                )
            self._schedules = list(schedule)
        else:
            self._schedules = [schedule] * count  # type: ignore[list-item]
        for f in self._schedules:
            if not callable(f) and schedule is not None:
                raise ValueError(f"EquivalentExponentialLR: schedule expected a function of the step, got {f!r}")
        super().__init__(optimizer, last_epoch)

    def _start(self) -> list[_State]:
        groups, states = self._groups_now(), [_UNMAPPED] * len(self.weight_decay)
        for i in self.groups:
            if self.last_epoch == -1 and any(
                self.optimizer.state.get(p, {}).get(BUFFER) is not None for p in groups[i]["params"]
            ):
                states[i] = _UNMAPPED._replace(buffers=ops.Buffers.KEPT)
            for step in range(self.last_epoch + 1):
                states[i], _ = self._follow(i, step, states[i], self._scheduled(i, step))
        return states

    def _plan(self, step: int) -> Plan:
        self._groups_now()
        lrs = [self._scheduled(i, step) for i in range(len(self.weight_decay))]
        states = list(self._states)
        for i in self.groups:
            states[i], growth = self._follow(i, step, states[i], lrs[i])
            lrs[i] = self._within_range(i, step, growth)
        return Plan(lrs, states)

    def _scheduled(self, i: int, step: int) -> float:
        """Return lr of the run with weight decay."""
        schedule = self._schedules[i]
        if schedule is None:
            return self._initial[i]
        return finite(schedule(step), f"{self._place(i)}: schedule({step})")

    def _follow(self, i: int, step: int, state: _State, lr: float) -> tuple[_State, Growth]:
        """Return the step `step` of group i, with lr of the run with weight decay."""
        momentum, dampening = self._momentum_now(i)
        gauge, buffers, after = state.next, state.buffers, ops.Buffers.KEPT
        if momentum == 0:
            if gauge[1] != 0:
                raise ValueError(
                    f"{self._place(i)}: momentum of step {step} expected to stay above 0 once it was, as weight decay "
                    f"is part of the buffers, got {momentum!r}; {CURE} can follow"
                )
            buffers, after = ops.Buffers.NONE, buffers
        elif buffers is ops.Buffers.RESTING:
            raise ValueError(
                f"{self._place(i)}: momentum of step {step} expected to stay 0, as its buffers are older than the "
                f"present scale of the weights, got {momentum!r}; {CURE} can follow"
            )
        elif buffers is ops.Buffers.NONE:
            buffers = ops.Buffers.FIRST
        moved = ops.gauge_step(gauge, lr, momentum, dampening, self.weight_decay[i], False, buffers)
        if moved is None:
            self._check_bound(i, lr, momentum, ops.most_decay(momentum), f"of step {step}")
            raise ValueError(
                f"{self._place(i)}: decay of step {step} expected less than all of the weights; momentum, dampening "
                f"and lr, now {momentum!r}, {dampening!r} and {lr!r}, change too fast for weight_decay "
                f"{self.weight_decay[i]!r}"
            )
        if momentum == 0 and after is ops.Buffers.KEPT and moved.moved != 1:
            after = ops.Buffers.RESTING
        scale, _, exponent = gauge
        growth = Growth(lr / (scale * scale * moved.moved), 2 * exponent, moved.shift)
        return _State(gauge, moved.next, after), growth

    def true_scale(self) -> list[float]:
        return [math.ldexp(scale, -exponent) for (scale, _, exponent), *_ in self._states]

    true_scale.__doc__ = GrowingLR.true_scale.__doc__

    def log2_true_scale(self) -> list[float]:
        """Return log2 of `true_scale`, which never underflows."""
        return [math.log2(scale) - exponent for (scale, _, exponent), *_ in self._states]

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, without the schedule and the optimizer."""
        return {
            **super().state_dict(),
            "gauges": [state.gauge for state in self._states],
            "next_gauges": [state.next for state in self._states],
            "buffers": [int(state.buffers) for state in self._states],
        }

    def _loaded(self, state_dict: Mapping[str, Any], base_lrs: list[float], where: str) -> list[_State]:
        columns = [
            a_list(state_dict[name], len(self.weight_decay), f"{where}: {name}")
            for name in ("gauges", "next_gauges", "buffers")
        ]
        for name, gauges in zip(("gauges", "next_gauges"), columns, strict=False):
            for i, gauge in enumerate(gauges):
                if not _is_gauge(gauge):
                    raise ValueError(f"{where}: {name}[{i}] expected (scale > 0, z, exponent), got {gauge!r}")
        for i, buffers in enumerate(columns[2]):
            if type(buffers) is not int or buffers not in (0, 2, 3):
                raise ValueError(f"{where}: buffers[{i}] expected 0, 2 or 3, got {buffers!r}")
        return [_State(tuple(a), tuple(b), ops.Buffers(c)) for a, b, c in zip(*columns, strict=True)]

    def __repr__(self) -> str:
        return (
            f"EquivalentExponentialLR(weight_decay={self.weight_decay}, groups={list(self.groups)}, "
            f"last_epoch={self.last_epoch})"
        )


def _is_gauge(x: Any) -> bool:
    if not isinstance(x, (tuple, list)) or len(x) != 3:
        return False
    scale, z, exponent = x
    finite_floats = type(scale) is float is type(z) and 0 < scale < math.inf and math.isfinite(z)
    return finite_floats and type(exponent) is int
