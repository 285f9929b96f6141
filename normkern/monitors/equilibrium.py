"""`EquilibriumMonitor`: how far each layer is from the balance of decay and updates, from the optimizer's sums."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..optim.adam import Adam
from ..optim.pair_steps import PairSteps
from ..optim.sgd import SGD
from .equilibrium_report import COLUMNS, EquilibriumReport, equilibrium, numbers
from .momentum_sums import MomentumSums
from .report import arrange
from .step_reader import Average, Hyperparameters, RowIndex, StepReader

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Steps that a monitor keeps for its plot; when there are so many, every other one is dropped.
_HISTORY = 512
_TENSORS = {"mean": len(COLUMNS), "weight": 1, "count": 1, "seen": 1, "time": 1, "buffer_sq": 1}


class EquilibriumMonitor:
    r"""Monitors the balance of weight decay and updates in a network with normalisation, without another pass.

    Scale-invariant weights settle at a length where decay and updates balance, and turn there by an angle per step that
    lr, weight decay and momentum alone decide: :math:`\sqrt{2\eta\lambda/(1+\mu)}`. The monitor compares measured
    and predicted values: see `Equilibrium` for the results, and :mod:`normkern.theory` for the formulas. Groups may
    differ in all options; nesterov, dampening, ``decay="exponential"`` (with weights at their true scale),
    ``stats="row"`` and SVAG (with lr and momentum as the kernel has them) are supported, and AdamW: there the angle is
    :math:`\sqrt{2\eta\lambda(1-\beta_1)/(1+\beta_1)}`, and the length follows from the measured size of the steps. The
    weight decay of Adam, which is part of its gradient, has no formula.

    Args:
        optimizer: a `normkern.SGD`, `AdamW`, or SVAG of them with statistics, or what a framework has wrapped around
            it.
        ema: decay of the averages per step, in [0, 1). Their weights are normalised, so that the first steps are not
            biased towards zero; 0 keeps the last step alone.

    `update` after each step, before the scheduler's; it does not synchronise, `report` does. When parameters are added,
    or ``stats`` changes, the averages begin anew.

    Raises:
        TypeError: the optimizer is none of normkern's. ValueError: it has no statistics, or `ema` is outside [0, 1).

    Reference: Li, Lyu, Arora 2020, arXiv 2010.02916; Wan et al., arXiv 2006.08419; for AdamW Kosson, Messmer, Jaggi
    2023, arXiv 2305.17212, to leading order.

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

    def __init__(self, optimizer: SGD | Adam, ema: float = 0.99) -> None:
        self._reader = StepReader(optimizer, "EquilibriumMonitor", takes_adam=True)
        if isinstance(ema, bool) or not isinstance(ema, Real) or not 0 <= ema < 1:
            raise ValueError(f"EquilibriumMonitor: ema expected a number in [0, 1), got {ema!r}")
        self.ema = float(ema)
        self.steps = 0
        self._row_index: RowIndex | None = None

    def _begin(self, row_index: RowIndex, device: torch.device) -> None:
        self._row_index = row_index
        self.steps = 0
        self._average = Average(self.ema, row_index.rows, len(COLUMNS), device)
        self._time = torch.zeros(row_index.rows, 1, dtype=torch.float64, device=device)
        self._seen = torch.zeros(row_index.rows, 1, dtype=torch.bool, device=device)
        self._momentum_sums = MomentumSums(row_index.rows, device)
        self._groups: tuple[Hyperparameters, ...] = ()
        self._numbers = self._time
        self._interval = 1
        self._history: list[tuple[int, Tensor]] = []

    def update(self) -> bool:
        """Read the optimizer's last step.

        Returns:
            Whether there was a new one: not before the first, not twice, and not where a GradScaler skipped it.

        Raises:
            ValueError: the optimizer no longer has statistics.
        """
        step = self._reader.read()
        if step is None:
            return False
        x = step.sums
        if self._row_index is None or step.row_index.layout != self._row_index.layout:
            self._begin(step.row_index, x.weight_sq.device)
        if step.groups != self._groups:
            self._groups = step.groups
            self._numbers = step.row_index.of_groups([numbers(h) for h in step.groups], x.weight_sq.device)
        lr, decay, is_sgd, balanced, weight_of_grad, weight_of_dot, update_of_grad, update_of_dot = (
            self._numbers.unbind(1)
        )
        w, g, dot = x.weight_sq, x.grad_sq, self._momentum_sums.dots(step)
        force, unit = g, w * g
        if any(h.rule != "sgd" for h in step.groups):
            # |s|^2 of u = -lr (s + weight_decay w)
            shrink = lr * decay
            moved_sq = x.update_sq + shrink * (2 * x.weight_update_dot + shrink * w)
            step_sq = moved_sq / torch.where(lr > 0, lr, 1.0).square()
            force, unit = torch.where(is_sgd > 0, g, step_sq), torch.where(is_sgd > 0, unit, step_sq)
            dot = torch.where(is_sgd > 0, dot, 0.0)
        columns = torch.stack(
            [
                w,
                g,
                unit,
                x.angular_update.square(),
                lr,
                dot,
                weight_of_grad * force + weight_of_dot * dot,
                update_of_grad * force + update_of_dot * dot,
                balanced * w,
                x.weight_grad_dot.square() / torch.where(g > 0, w * g, 1.0),
            ],
            dim=1,
        )
        self._seen = columns.isfinite().all(1, keepdim=True)
        self._average.add(columns, self._seen)
        self._time = self._time + torch.where(self._seen, (lr * decay).unsqueeze(1), 0.0)
        self.steps += 1
        if self.steps % self._interval == 0:
            self._remember()
        return True

    def _remember(self) -> None:
        assert self._row_index is not None
        begin = self._row_index.first_parameter
        self._history.append((self.steps, torch.cat([self._average.mean[begin:], self._time[begin:]], 1)))
        if len(self._history) >= _HISTORY:
            self._history = self._history[1::2]
            self._interval *= 2

    def report(self) -> EquilibriumReport:
        """Return the results of the steps so far. Synchronises.

        Raises:
            RuntimeError: no step has been read.
        """
        row_index = self._taken_in("report")
        count, seen = self._average.count[:, 0].tolist(), self._seen[:, 0].tolist()
        means, time = self._average.mean.tolist(), self._time[:, 0].tolist()
        nsr = self._nsr(row_index)
        rows = [
            equilibrium(row_index.indices[g], self._groups[g], means[i], int(count[i]), seen[i], time[i], nsr[i])
            for i, g in enumerate(row_index.group_of_rows())
        ]
        return EquilibriumReport(self.steps, *arrange(row_index, self._reader.names(row_index), rows))

    def _taken_in(self, method: str) -> RowIndex:
        if self._row_index is None or self.steps == 0:
            raise RuntimeError(
                f"EquilibriumMonitor.{method}: expected an update() after a step before it, but none has been taken in"
            )
        return self._row_index

    def _nsr(self, row_index: RowIndex) -> list[float | None]:
        optimizer = self._reader.optimizer
        if not isinstance(optimizer, PairSteps):
            return [None] * row_index.rows
        try:
            noise = optimizer.noise()
        except RuntimeError:  # no pair of gradients yet
            return [None] * row_index.rows
        table = torch.stack([noise.slot_grad_sq_norm_unbiased, noise.slot_trace_sigma], 1)
        if len(table) != row_index.slots:
            return [None] * row_index.rows
        signal, spread = row_index.sums(table.to(self._time.device)).unbind(1)
        return [None if math.isnan(x) else x for x in (spread / signal).tolist()]

    def to_dict(self) -> dict[str, Any]:
        """Return `report` as plain numbers: ``{"steps", "groups", "parameters", "rows"}``. Synchronises."""
        return self.report().to_dict()

    def plot(self, to: Any) -> list[Axes]:
        """Draw angular updates, and lengths over those of balance, against time: solid measured, dashed predicted.

        Parameters that have no equilibrium are left out. Time is the sum of lr * weight_decay.

        Args:
            to: a path to write a picture to, by its ending; or one matplotlib Axes (the angles), or two.

        Returns:
            The axes drawn on.

        Raises:
            RuntimeError: no step has been read. TypeError: `to` is nothing of these. ImportError: no matplotlib.
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
        report, row_index = self.report(), self._taken_in("plot")
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
                g = row_index.parameters + row_index.indices.index(parameter.group)
                axes[0].plot(time[:, g], predicted[:, g], "k--", linewidth=1.5, label=label, zorder=3)
            if len(axes) == 2:
                axes[1].plot(time[:, i], length[:, i], color=color, linewidth=1, label=name)
        axes[0].set_ylabel("angle between w and w' (radians)")
        axes[-1].set_xlabel("time: sum of lr * weight_decay")
        if drawn and row_index.parameters <= 20:
            axes[0].legend(fontsize="small")
        if len(axes) == 2:
            axes[1].axhline(1, color="k", linestyle="--", linewidth=1.5)
            axes[1].set_ylabel("|w| / |w| at equilibrium")

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and tensors, for `load_state_dict`."""
        state: dict[str, Any] = {"ema": self.ema, "steps": self.steps, "layout": None}
        if self._row_index is not None:
            state |= {
                "layout": self._row_index.layout,
                "groups": [tuple(h) for h in self._groups],
                "mean": self._average.mean,
                "weight": self._average.weight,
                "count": self._average.count,
                "seen": self._seen,
                "time": self._time,
                "buffer_sq": self._momentum_sums.buffer_sq.unsqueeze(1),
                "interval": self._interval,
                "history": list(self._history),
            }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: it is no state of such a monitor, or does not fit the optimizer; nothing is changed.
        """
        where = "EquilibriumMonitor.load_state_dict"
        row_index = self._reader.check_state(where, state_dict, ("ema",), _TENSORS, ("groups", "interval", "history"))
        ema = state_dict["ema"]
        if isinstance(ema, bool) or not isinstance(ema, float) or not 0 <= ema < 1:
            raise ValueError(f"{where}: ema expected a number in [0, 1), got {ema!r}")
        self.ema = ema
        self.steps = 0
        self._row_index = None
        if row_index is None:
            return
        self._reader.pass_over()
        device = self._reader.device()
        self._begin(row_index, device)
        self.steps = state_dict["steps"]
        self._average.mean, self._average.weight, self._average.count, self._seen, self._time, buffer_sq = (
            state_dict[name].to(device) for name in _TENSORS
        )
        self._momentum_sums.buffer_sq = buffer_sq[:, 0]
        self._groups = tuple(Hyperparameters(*h) for h in state_dict["groups"])
        self._numbers = row_index.of_groups([numbers(h) for h in self._groups], device)
        self._interval = state_dict["interval"]
        self._history = [(k, x.to(device)) for k, x in state_dict["history"]]

    def __repr__(self) -> str:
        return f"EquilibriumMonitor(ema={self.ema}, steps={self.steps})"

    def __str__(self) -> str:
        return repr(self) if self.steps == 0 else str(self.report())
