"""`EquilibriumMonitor`: how far each layer is from the balance of decay and updates, from the optimizer's sums."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..optim.sgd import SGD
from ..optim.svag import SVAG
from .equilibrium_report import COLUMNS, EquilibriumReport, equilibrium, numbers
from .momentum_sums import BufferSums
from .report import arranged
from .step_reader import Average, Hyperparameters, Levels, Steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Moments that a monitor keeps for its plot; when there are so many, every other one goes.
_HISTORY = 512
_TENSORS = {"mean": len(COLUMNS), "weight": 1, "count": 1, "seen": 1, "time": 1, "buffer_sq": 1}


class EquilibriumMonitor:
    r"""Watches the balance of weight decay and updates in a network with normalisation, at no extra pass.

    Weights that the loss is scale-invariant in settle at a length where decay and updates balance, and turn there by an
    angle per step that lr, weight decay and momentum alone decide: :math:`\sqrt{2\eta\lambda/(1+\mu)}`. The monitor
    compares: see `Equilibrium` for what it tells, and :mod:`normkern.theory` for the formulas. Groups may differ in
    all options; nesterov, dampening, ``decay="exponential"`` (weights are told at their true scale), ``stats="row"``
    and SVAG (lr and momentum as the kernel has them) are allowed for.

    Args:
        optimizer: a `normkern.SGD` or `SVAG` with statistics.
        ema: decay of the averages per step, in [0, 1). Their weights are normalised, so that the first steps are not
            biased towards zero; 0 is the last step alone.

    `update` after each step, before the scheduler's; it does not synchronise, `report` does. When parameters are added,
    or ``stats`` changes, the averages begin anew.

    Raises:
        TypeError: the optimizer is no `normkern.SGD`. ValueError: it measures nothing, or `ema` is outside [0, 1).

    Reference: Li, Lyu, Arora 2020, arXiv 2010.02916; Wan et al., arXiv 2006.08419.

    >>> import normkern
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = normkern.SGD([("w", w)], lr=0.5, weight_decay=0.02, stats="tensor")
    >>> monitor = EquilibriumMonitor(opt)
    >>> w.grad = torch.tensor([4.0, -3.0])
    >>> opt.step()
    >>> monitor.update()
    True
    >>> report = monitor.report().parameters["w"]
    >>> round(report.effective_lr, 6), report.intrinsic_lr, round(report.predicted_angular_update, 6)
    (0.02, 0.01, 0.141421)
    >>> round(report.equilibrium_weight_norm, 3)  # |w|^4 = 0.5 * 625 / (0.02 * 1.99)
    9.413
    """

    ema: float
    steps: int

    def __init__(self, optimizer: SGD, ema: float = 0.99) -> None:
        self._source = Steps(optimizer, "EquilibriumMonitor")
        if isinstance(ema, bool) or not isinstance(ema, Real) or not 0 <= ema < 1:
            raise ValueError(f"EquilibriumMonitor: ema expected a number in [0, 1), got {ema!r}")
        self.ema = float(ema)
        self.steps = 0
        self._levels: Levels | None = None

    def _begin(self, levels: Levels, device: torch.device) -> None:
        self._levels = levels
        self.steps = 0
        self._average = Average(self.ema, levels.rows, len(COLUMNS), device)
        self._time = torch.zeros(levels.rows, 1, dtype=torch.float64, device=device)
        self._seen = torch.zeros(levels.rows, 1, dtype=torch.bool, device=device)
        self._buffers = BufferSums(levels.rows, device)
        self._groups: tuple[Hyperparameters, ...] = ()
        self._numbers = self._time
        self._interval = 1
        self._history: list[tuple[int, Tensor]] = []

    def update(self) -> bool:
        """Takes in the optimizer's last step.

        Returns:
            Whether there was a new one: not before the first, not twice, and not where a GradScaler skipped it.

        Raises:
            ValueError: the optimizer no longer measures anything.
        """
        step = self._source.read()
        if step is None:
            return False
        x = step.sums
        if self._levels is None or step.levels.layout != self._levels.layout:
            self._begin(step.levels, x.weight_sq.device)
        if step.groups != self._groups:
            self._groups = step.groups
            self._numbers = step.levels.of_groups([numbers(h) for h in step.groups], x.weight_sq.device)
        lr, decay, balanced, weight_of_grad, weight_of_dot, update_of_grad, update_of_dot = self._numbers.unbind(1)
        w, g, dot = x.weight_sq, x.grad_sq, self._buffers.dots(step)
        columns = torch.stack(
            [
                w,
                g,
                w * g,
                x.angular_update.square(),
                lr,
                dot,
                weight_of_grad * g + weight_of_dot * dot,
                update_of_grad * g + update_of_dot * dot,
                balanced * w,
                x.weight_grad_dot.square() / torch.where(g > 0, w * g, 1.0),
            ],
            dim=1,
        )
        self._seen = columns.isfinite().all(1, keepdim=True)
        self._average.add(columns, self._seen)
        self._time = self._time + torch.where(self._seen, decay.unsqueeze(1), 0.0)
        self.steps += 1
        if self.steps % self._interval == 0:
            self._remember()
        return True

    def _remember(self) -> None:
        assert self._levels is not None
        begin = self._levels.first_parameter
        self._history.append((self.steps, torch.cat([self._average.mean[begin:], self._time[begin:]], 1)))
        if len(self._history) >= _HISTORY:
            self._history = self._history[1::2]
            self._interval *= 2

    def report(self) -> EquilibriumReport:
        """What the steps so far have told. Synchronises.

        Raises:
            RuntimeError: no step has been taken in.
        """
        levels = self._taken_in("report")
        count, seen = self._average.count[:, 0].tolist(), self._seen[:, 0].tolist()
        means, time = self._average.mean.tolist(), self._time[:, 0].tolist()
        nsr = self._nsr(levels)
        rows = [
            equilibrium(levels.indices[g], self._groups[g], means[i], int(count[i]), seen[i], time[i], nsr[i])
            for i, g in enumerate(levels.group_of_rows())
        ]
        return EquilibriumReport(self.steps, *arranged(levels, self._source.names(levels), rows))

    def _taken_in(self, method: str) -> Levels:
        if self._levels is None or self.steps == 0:
            raise RuntimeError(
                f"EquilibriumMonitor.{method}: expected an update() after a step before it, but none has been taken in"
            )
        return self._levels

    def _nsr(self, levels: Levels) -> list[float | None]:
        optimizer = self._source.optimizer
        if not isinstance(optimizer, SVAG):
            return [None] * levels.rows
        try:
            noise = optimizer.noise()
        except RuntimeError:  # no pair of gradients yet
            return [None] * levels.rows
        table = torch.stack([noise.slot_grad_sq_norm_unbiased, noise.slot_trace_sigma], 1)
        if len(table) != levels.slots:
            return [None] * levels.rows
        signal, spread = levels.sums(table.to(self._time.device)).unbind(1)
        return [None if math.isnan(x) else x for x in (spread / signal).tolist()]

    def to_dict(self) -> dict[str, Any]:
        """`report` as plain numbers: ``{"steps", "groups", "parameters", "rows"}``. Synchronises."""
        return self.report().to_dict()

    def plot(self, to: Any) -> list[Axes]:
        """Draws angular updates, and lengths over those of balance, against time: solid measured, dashed predicted.

        Parameters that have no equilibrium are left out. Time is the sum of lr * weight_decay.

        Args:
            to: a path to write a picture to, by its ending; or one matplotlib Axes (the angles), or two.

        Returns:
            The axes drawn on.

        Raises:
            RuntimeError: no step has been taken in. TypeError: `to` is nothing of these. ImportError: no matplotlib.
        """
        self._taken_in("plot")
        figure = None
        if isinstance(to, (str, os.PathLike)):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(9, 7), layout="constrained")
            axes = list(figure.subplots(2, 1, sharex=True))
        else:
            axes = list(to) if isinstance(to, Sequence) or hasattr(to, "flat") else [to]
            if len(axes) not in (1, 2) or not all(hasattr(a, "plot") and hasattr(a, "set_xlabel") for a in axes):
                raise TypeError(f"EquilibriumMonitor.plot: to expected a path or one or two Axes, got {to!r}")
        self._draw(axes)
        if figure is not None:
            figure.savefig(to)
        return axes

    def _draw(self, axes: list[Axes]) -> None:
        report, levels = self.report(), self._taken_in("plot")
        history = torch.stack([x for _, x in self._history]).cpu()  # (moments, parameters and groups, columns)
        columns = dict(zip((*COLUMNS, "time"), history.unbind(2), strict=True))
        angle, time = columns["angle_sq"].sqrt(), columns["time"]
        predicted = (columns["balance_update_sq"] / columns["balance_sq"]).sqrt()
        length = (columns["balanced_weight_sq"] / columns["balance_sq"]) ** 0.25
        drawn: set[int] = set()
        for i, (name, parameter) in enumerate(report.parameters.items()):
            if parameter.residual is None:
                continue
            color = f"C{i % 10}"
            axes[0].plot(time[:, i], angle[:, i], color=color, linewidth=1, label=name)
            if parameter.group not in drawn:
                drawn.add(parameter.group)
                label = "predicted" if len(drawn) == 1 else None
                g = levels.parameters + levels.indices.index(parameter.group)
                axes[0].plot(time[:, g], predicted[:, g], "k--", linewidth=1.5, label=label, zorder=3)
            if len(axes) == 2:
                axes[1].plot(time[:, i], length[:, i], color=color, linewidth=1, label=name)
        axes[0].set_ylabel("angle between w and w' (radians)")
        axes[-1].set_xlabel("time: sum of lr * weight_decay")
        if drawn and levels.parameters <= 20:
            axes[0].legend(fontsize="small")
        if len(axes) == 2:
            axes[1].axhline(1, color="k", linestyle="--", linewidth=1.5)
            axes[1].set_ylabel("|w| / |w| at equilibrium")

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors, for `load_state_dict`."""
        state: dict[str, Any] = {"ema": self.ema, "steps": self.steps, "layout": None}
        if self._levels is not None:
            state |= {
                "layout": self._levels.layout,
                "groups": [tuple(h) for h in self._groups],
                "mean": self._average.mean,
                "weight": self._average.weight,
                "count": self._average.count,
                "seen": self._seen,
                "time": self._time,
                "buffer_sq": self._buffers.buffer_sq.unsqueeze(1),
                "interval": self._interval,
                "history": list(self._history),
            }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: it is no monitor's, or one of another optimizer; nothing is changed.
        """
        where = "EquilibriumMonitor.load_state_dict"
        levels = self._source.check_state(where, state_dict, ("ema",), _TENSORS, ("groups", "interval", "history"))
        ema = state_dict["ema"]
        if isinstance(ema, bool) or not isinstance(ema, float) or not 0 <= ema < 1:
            raise ValueError(f"{where}: ema expected a number in [0, 1), got {ema!r}")
        self.ema = ema
        self.steps = 0
        self._levels = None
        if levels is None:
            return
        self._source.pass_over()
        device = self._source.device()
        self._begin(levels, device)
        self.steps = state_dict["steps"]
        self._average.mean, self._average.weight, self._average.count, self._seen, self._time, buffer_sq = (
            state_dict[name].to(device) for name in _TENSORS
        )
        self._buffers.buffer_sq = buffer_sq[:, 0]
        self._groups = tuple(Hyperparameters(*h) for h in state_dict["groups"])
        self._numbers = levels.of_groups([numbers(h) for h in self._groups], device)
        self._interval = state_dict["interval"]
        self._history = [(k, x.to(device)) for k, x in state_dict["history"]]

    def __repr__(self) -> str:
        return f"EquilibriumMonitor(ema={self.ema}, steps={self.steps})"

    def __str__(self) -> str:
        return repr(self) if self.steps == 0 else str(self.report())
