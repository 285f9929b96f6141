"""`AutoRateMonitor`: how scale-invariant weights tune their own learning rate, and the bound on convergence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..optim.sgd import SGD
from ..theory import least_unit_grad_bound
from .report import Report, ReportEntry, arrange, table
from .step_reader import Hyperparameters, RowIndex, StepReader

#: Sums over steps, the least |g_v|^2, and |w|^2 before the first and after the last; NaN where there is none.
_COLUMNS = ("unit_grad_sq_sum", "growth_sum", "lr_sq_sum", "least_unit_grad_sq", "first_weight_sq", "last_weight_sq",
            "effective_lr", "steps")  # fmt: skip


@dataclass(frozen=True)
class AutoRate(ReportEntry):
    r"""The results of an `AutoRateMonitor` for one slot, one parameter or one param group.

    Attributes:
        group: position of the param group.
        steps: number of steps read, without those where it was not stepped, lr was 0 or a sum was not finite.
        unit_grad_sq_sum: :math:`\sum_t |g_{v,t}|^2 = \sum_t N_t |g_t|^2`, from gradients and norms, N = |w|^2.
        growth_sum: :math:`\sum_t N_t (N_{t+1} - N_t)/\eta_t^2`, from norms alone.
        mismatch: growth_sum / unit_grad_sq_sum - 1: 0 up to rounding for a scale-invariant loss.
        least_unit_grad: :math:`\min_t |g_{v,t}|`, the quantity of the theorems.
        bound: :math:`\sqrt{N_T (N_T - N_0) / \sum_t \eta_t^2}`, an upper limit of least_unit_grad.
        first_weight_norm, last_weight_norm: :math:`|w|` before the first and after the last step.
        effective_lr: :math:`\eta/|w|^2` of the last step: the rate that was tuned.
        reason: why mismatch or bound is None or not valid; None if both hold.
    """

    group: int
    steps: int
    unit_grad_sq_sum: float
    growth_sum: float
    mismatch: float | None
    least_unit_grad: float
    bound: float | None
    first_weight_norm: float
    last_weight_norm: float
    effective_lr: float
    reason: str | None


class AutoRateReport(Report[AutoRate]):
    __doc__ = Report.__doc__

    def __str__(self) -> str:
        lines = [("", "|w|", "effective lr", "least |g_v|", "bound", "mismatch", "")]
        for i, group in self.groups.items():
            lines.append((f"group {i}", *_cells(group), group.reason or ""))
            for name, parameter in self.parameters.items():
                if parameter.group == i:
                    remark = "" if parameter.reason == group.reason else parameter.reason or ""
                    lines.append((f"  {name}", *_cells(parameter), remark))
        return "\n".join([f"after {self.steps} steps", *table(lines)])


class AutoRateMonitor:
    r"""Monitors how scale-invariant weights tune their own learning rate, without another pass over memory.

    Without momentum and weight decay every step lengthens them by :math:`\eta^2|g|^2`. For the gradient
    :math:`g_v = |w| g` at w/|w|, and :math:`N = |w|^2`, at any lr and for any batches,

    .. math::
        \sum_{t<T} |g_{v,t}|^2 = \sum_{t<T} \frac{N_t (N_{t+1}-N_t)}{\eta_t^2}, \qquad
        \min_{t<T} |g_{v,t}| \le \sqrt{\frac{N_T (N_T-N_0)}{\sum_t \eta_t^2}}

    The monitor adds up both sides of each, from the first step that it reads. `normkern.invariance.param_groups` splits
    a model, `normkern.schedules.PowerDecayLR` is the schedule.

    Args:
        optimizer: a `normkern.SGD` or `SVAG` with statistics, or what a framework has wrapped around it. Groups with
            momentum or weight decay are reported without mismatch and bound.

    `update` after each step; it does not synchronise, `report` does. When parameters are added, or ``stats`` changes,
    the sums begin anew.

    Raises:
        TypeError: the optimizer is no `normkern.SGD`. ValueError: it has no statistics.

    Reference: Arora, Li, Lyu 2018, arXiv 1812.03981; see `theory.unit_grad_sq_from_growth`, `least_unit_grad_bound`.

    >>> import normkern
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = normkern.SGD([("w", w)], lr=0.5, stats="tensor")
    >>> monitor = AutoRateMonitor(opt)
    >>> w.grad = torch.tensor([4.0, -3.0])
    >>> opt.step()
    >>> monitor.update()
    True
    >>> w = monitor.report().parameters["w"]
    >>> w.unit_grad_sq_sum, w.growth_sum, w.least_unit_grad, round(w.bound, 3)
    (625.0, 625.0, 25.0, 27.951)
    """

    steps: int

    def __init__(self, optimizer: SGD) -> None:
        self._reader = StepReader(optimizer, "AutoRateMonitor")
        self.steps = 0
        self._row_index: RowIndex | None = None

    def _begin(self, row_index: RowIndex, device: torch.device) -> None:
        self._row_index = row_index
        self.steps = 0
        self._columns = torch.zeros(row_index.rows, len(_COLUMNS), dtype=torch.float64, device=device)
        self._columns[:, _COLUMNS.index("least_unit_grad_sq")] = torch.inf
        self._reasons: list[str | None] = [None] * len(row_index.layout)

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
        self._reasons = [old or _why_not(h) for old, h in zip(self._reasons, step.groups, strict=True)]
        (lr,) = step.row_index.of_groups([[h.lr] for h in step.groups], x.weight_sq.device).unbind(1)
        w, unit = x.weight_sq, x.weight_sq * x.grad_sq
        growth = w * (2 * x.weight_update_dot + x.update_sq) / lr.square()
        sums, growths, lr_sq, least, first, _, _, count = self._columns.unbind(1)
        new = torch.stack(
            [
                sums + unit,
                growths + growth,
                lr_sq + lr.square(),
                torch.minimum(least, unit),
                torch.where(count == 0, w, first),
                x.next_weight_sq,
                lr / w,
                count + 1,
            ],
            dim=1,
        )
        self._columns = torch.where(new.isfinite().all(1, keepdim=True), new, self._columns)
        self.steps += 1
        return True

    def report(self) -> AutoRateReport:
        """Return the results of the steps so far. Synchronises.

        Raises:
            RuntimeError: no step has been read.
        """
        row_index = self._row_index
        if row_index is None:
            raise RuntimeError(
                "AutoRateMonitor.report: expected an update() after a step before it, but none has been taken in"
            )
        columns, of = self._columns.tolist(), row_index.group_of_rows()
        rows = [_auto_rate(row_index.indices[g], columns[i], self._reasons[g]) for i, g in enumerate(of)]
        return AutoRateReport(self.steps, *arrange(row_index, self._reader.names(row_index), rows))

    def to_dict(self) -> dict[str, Any]:
        """Return `report` as plain numbers: ``{"steps", "groups", "parameters", "rows"}``. Synchronises."""
        return self.report().to_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and a tensor, for `load_state_dict`."""
        state: dict[str, Any] = {"steps": self.steps, "layout": None}
        if self._row_index is not None:
            state |= {"layout": self._row_index.layout, "reasons": list(self._reasons), "columns": self._columns}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: it is no state of such a monitor, or does not fit the optimizer; nothing is changed.
        """
        where = "AutoRateMonitor.load_state_dict"
        row_index = self._reader.check_state(where, state_dict, (), {"columns": len(_COLUMNS)}, ("reasons",))
        self._row_index = None
        self.steps = 0
        if row_index is None:
            return
        self._reader.pass_over()
        device = self._reader.device()
        self._begin(row_index, device)
        self.steps = state_dict["steps"]
        self._reasons, self._columns = list(state_dict["reasons"]), state_dict["columns"].to(device)

    def __repr__(self) -> str:
        return f"AutoRateMonitor(steps={self.steps})"

    def __str__(self) -> str:
        return repr(self) if self.steps == 0 else str(self.report())


def _why_not(h: Hyperparameters) -> str | None:
    """Return why the weight norm grows by more, or less, than the gradient makes it; None if it does not."""
    if h.momentum:
        return f"momentum was {h.momentum:g}: steps are not their own gradients alone"
    if h.weight_decay:
        return f"weight_decay was {h.weight_decay:g}: the norm does not grow by gradients alone"
    return None


def _auto_rate(group: int, columns: list[float], reason: str | None) -> AutoRate:
    m = dict(zip(_COLUMNS, columns, strict=True))
    mismatch = bound = None
    if m["steps"] == 0:
        m = dict.fromkeys(_COLUMNS, math.nan) | {"steps": 0.0}
        reason = "not measured: never stepped with finite numbers and lr > 0"
    elif reason is None:
        mismatch = m["growth_sum"] / m["unit_grad_sq_sum"] - 1 if m["unit_grad_sq_sum"] else 0.0
        if m["last_weight_sq"] < m["first_weight_sq"]:
            reason = "not scale-invariant: the norm fell"
        else:
            bound = least_unit_grad_bound(
                first_weight_sq=m["first_weight_sq"], last_weight_sq=m["last_weight_sq"], lr_sq_sum=m["lr_sq_sum"]
            )
    return AutoRate(
        group=group,
        steps=int(m["steps"]),
        unit_grad_sq_sum=m["unit_grad_sq_sum"],
        growth_sum=m["growth_sum"],
        mismatch=mismatch,
        least_unit_grad=math.sqrt(m["least_unit_grad_sq"]),
        bound=bound,
        first_weight_norm=math.sqrt(m["first_weight_sq"]),
        last_weight_norm=math.sqrt(m["last_weight_sq"]),
        effective_lr=m["effective_lr"],
        reason=reason,
    )


def _cells(x: AutoRate) -> tuple[str, str, str, str, str]:
    bound, mismatch = ("-" if p is None else f"{p:.4g}" for p in (x.bound, x.mismatch))
    return f"{x.last_weight_norm:.4g}", f"{x.effective_lr:.4g}", f"{x.least_unit_grad:.4g}", bound, mismatch
