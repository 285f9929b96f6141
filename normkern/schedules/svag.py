"""`SvagSchedule`: any torch scheduler at the pace of SVAG."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..theory import svag_adam_fraction, svag_effective_steps, svag_fraction

_BASES = ("sgd", "adam")


class SvagSchedule(LRScheduler):
    r"""Stretches a torch LR scheduler to the l times as many steps of an SVAG run.

    SVAG step k, counted from 0, uses the learning rate of step :math:`\lfloor k/l \rfloor` of the original run. So
    `step()`, called after every optimizer step, steps the wrapped scheduler only where :math:`\lfloor k/l \rfloor`
    grows, and for l < 1, where it grows by more than one at a time, as often as it takes. The quotient is exact: l is
    the fraction that its float stands for (`normkern.theory.svag_fraction`).

    With `SVAGAdam` and `SVAGAdamW` the pace is l^2 in place of l: :math:`\lfloor k/l^2 \rfloor`
    (`normkern.theory.svag_adam_fraction`).

    Build optimizer and scheduler as for the original run, with its lr (the optimizer divides by l) and its numbers of
    steps; then wrap the outermost scheduler and take `normkern.theory.svag_steps` steps. Whatever the scheduler moves
    besides lr (OneCycleLR: momentum) follows. A schedule in epochs is turned into one in steps first: a step of SVAG
    sees two batches, so that its epochs have half as many.

    Args:
        scheduler: any `torch.optim.lr_scheduler.LRScheduler` that is stepped without arguments: SequentialLR,
            OneCycleLR, LambdaLR, ... Not ReduceLROnPlateau, which counts no steps. If it was stepped before, it goes on
            from there.
        l: that of the optimizer: a finite number >= 1/2, or >= sqrt(1/2) for Adam. 1 changes nothing.
        base: "sgd" or "adam" (also AdamW and RMSprop), the optimizer that SVAG is made of. None: read from the param
            groups, of which those of adaptive optimizers have ``betas``; another adaptive optimizer than ours, stepped
            with `svag_combine_`, must be named.

    Attributes:
        scheduler, optimizer: what was wrapped, and what it schedules.
        l: `fractions.Fraction`. base: "sgd" or "adam".
        pace: `fractions.Fraction`, the steps per step of the original run: l, or l^2 for Adam.
        steps: k, the calls of `step()`.
        effective_steps: :math:`\lfloor k/\text{pace} \rfloor`, the steps of the wrapped scheduler.

    A scheduler that refuses steps beyond its end (OneCycleLR) may be asked for one by the last call of a run with l < 1
    whose number of original steps is no multiple of 1/l; its error leaves `steps` as it was.

    Raises:
        ValueError: `scheduler` is none, or is a ReduceLROnPlateau; `l` is no number >= 1/2, or another than that of the
            optimizer, if that is a SVAG of ours; `base` is another than that of the optimizer, or is missing.

    Reference: Li, Malladi, Arora 2021, arXiv 2102.12470: schedules are indexed by effective steps; for Adam Malladi,
    Lyu, Panigrahi, Arora 2022, arXiv 2205.10287.

    >>> import torch
    >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    >>> schedule = SvagSchedule(torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5), l=1.5)
    >>> for k in range(7):
    ...     opt.step()
    ...     print(k, schedule.effective_steps, schedule.get_last_lr())
    ...     schedule.step()
    0 0 [0.8]
    1 0 [0.8]
    2 1 [0.8]
    3 2 [0.4]
    4 2 [0.4]
    5 3 [0.4]
    6 4 [0.2]
    """

    def __init__(self, scheduler: LRScheduler, l: float | Fraction, *, base: str | None = None) -> None:
        if not isinstance(scheduler, LRScheduler):
            got = type(scheduler).__name__
            if isinstance(scheduler, type):
                got = f"the class {scheduler.__name__}: construct it first, with its optimizer"
            raise ValueError(f"SvagSchedule: scheduler expected an LRScheduler, got {got}")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("SvagSchedule: scheduler expected one that counts steps, got ReduceLROnPlateau")
        if base is not None and base not in _BASES:
            raise ValueError(f'SvagSchedule: base expected "sgd", "adam" or None, got {base!r}')
        self.base = _base_of(scheduler.optimizer.param_groups, base)
        try:
            self.l = svag_fraction(l)
            self.pace = svag_adam_fraction(l) if self.base == "adam" else self.l
        except ValueError as error:
            sentence = str(error).replace("svag_adam_fraction", "SvagSchedule", 1)
            raise ValueError(sentence.replace("svag_fraction", "SvagSchedule", 1)) from None
        for i, group in enumerate(scheduler.optimizer.param_groups):
            if float(group.get("l", l)) != float(l):
                raise ValueError(
                    f"SvagSchedule: l expected {group['l']!r}, as the optimizer has it in param_groups[{i}], got {l!r}"
                )
        self.scheduler = scheduler
        self.optimizer = scheduler.optimizer
        self.steps = self.effective_steps = 0

    def step(self, epoch: int | None = None) -> None:
        """Count one optimizer step. `epoch` must be None: torch's deprecated jumps have no meaning here."""
        if epoch is not None:
            raise ValueError(f"SvagSchedule.step: epoch expected None, got {epoch!r}")
        due = svag_effective_steps(steps=self.steps + 1, l=self.pace)
        while self.effective_steps < due:
            self.scheduler.step()
            self.effective_steps += 1
        self.steps += 1

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rates in force, one per param group: the wrapped scheduler's `get_last_lr`."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return plain integers, l as (numerator, denominator), base, and the wrapped scheduler's own state."""
        return {
            "base": self.base,
            "l": (self.l.numerator, self.l.denominator),
            "steps": self.steps,
            "effective_steps": self.effective_steps,
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. The optimizer's own state_dict holds the learning rates in force.

        Raises:
            ValueError: it is no `SvagSchedule`'s state, or one of another l or base; nothing was loaded.
        """
        where = "SvagSchedule.load_state_dict"
        expected = ("base", "l", "steps", "effective_steps", "scheduler")
        if not isinstance(state_dict, Mapping) or not set(expected) <= set(state_dict):
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"{where}: state_dict expected the keys {list(expected)}, got {got}")
        mine = (self.l.numerator, self.l.denominator)
        base, l, steps, effective_steps, scheduler = (state_dict[key] for key in expected)
        if base != self.base:
            raise ValueError(f"{where}: base expected {self.base!r}, that of this schedule, got {base!r}")
        if not isinstance(l, (tuple, list)) or tuple(l) != mine:
            raise ValueError(f"{where}: l expected {mine}, that of this schedule, got {l!r}")
        for name, count in (("steps", steps), ("effective_steps", effective_steps)):
            if type(count) is not int or count < 0:
                raise ValueError(f"{where}: {name} expected an integer >= 0, got {count!r}")
        self.scheduler.load_state_dict(scheduler)
        self.steps, self.effective_steps = steps, effective_steps

    def __repr__(self) -> str:
        return f"SvagSchedule({type(self.scheduler).__name__}, l={self.l}, steps={self.steps})"


def _base_of(groups: list[dict[str, Any]], base: str | None) -> str:
    """Return what SVAG is made of, from the param groups.

    Raises:
        ValueError: it is another than `base`, or is not known.
    """
    for i, group in enumerate(groups):
        is_adaptive = "betas" in group or "alpha" in group  # Adam and RMSprop
        if "l" in group or (is_adaptive and base is None):
            own = "adam" if is_adaptive else "sgd"
            if base is None and "l" not in group:
                raise ValueError(
                    f'SvagSchedule: base expected "adam", as param_groups[{i}] is of an adaptive optimizer, which '
                    'takes l^2 steps, or "sgd" if it takes l steps, got None'
                )
            if base not in (None, own):
                raise ValueError(
                    f"SvagSchedule: base expected {own!r}, as the optimizer has it in param_groups[{i}], got {base!r}"
                )
            return own
    return base or "sgd"
