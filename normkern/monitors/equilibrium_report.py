"""`Equilibrium` and `EquilibriumReport`, the results of an `EquilibriumMonitor`, from its averages."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..theory.decoupled import adamw_balance, adamw_steps_to_equilibrium
from ..theory.equilibrium import Balance, balance
from ..theory.relaxation import steps_to_equilibrium
from .report import Report, ReportEntry, table
from .step_reader import Hyperparameters

#: Root mean square of <w,g>/(|w||g|) above which the loss is not scale-invariant in the weights.
_COSINE = 1e-2
#: A length has settled where |w|^4 is as close as this to its value at equilibrium, in relation to that value.
SETTLED = 0.1
#: The averaged columns: balance_sq is the |w|^2 at which |g|^2 and <b,g> of a step would balance, balance_update_sq
#: the |u|^2 there, balanced_weight_sq the |w|^2 that it is compared with; all are 0 in steps without equilibrium. For
#: AdamW |s|^2 of the step eta s takes the place of |g|^2 and of unit_grad_sq, as it does not depend on |w|.
COLUMNS = (
    "weight_sq",
    "grad_sq",
    "unit_grad_sq",
    "angle_sq",
    "lr",
    "buffer_grad_dot",
    "balance_sq",
    "balance_update_sq",
    "balanced_weight_sq",
    "cosine_sq",
)


@dataclass(frozen=True)
class Equilibrium(ReportEntry):
    r"""The results of an `EquilibriumMonitor` for one slot, one parameter or one param group.

    Measured numbers are averages over the steps taken in, with the monitor's `ema`, and so are the two predictions that
    are compared with them; None where there is no equilibrium, for the `reason` given.

    Attributes:
        group: position of the param group.
        steps: number of steps read, without those where it was not stepped or a sum was not finite.
        weight_norm, grad_norm: root mean squares of :math:`|w|` and :math:`|g|`.
        effective_lr: :math:`\eta/|w|^2`, a ratio of means; for AdamW :math:`\eta/|w|`.
        intrinsic_lr: :math:`\eta\lambda` of the last step.
        angular_update: root mean square of the angle between w and w', in radians.
        predicted_angular_update: the same at equilibrium, `normkern.theory.equilibrium_angle`: lr, weight decay and
            momentum alone decide it, except that with nesterov the correlation has a part; for AdamW
            `normkern.theory.adamw_equilibrium_angle`.
        residual: :math:`|w|_*^4/|w|^4 - 1`, where :math:`|w|_*` is the length at which the present gradients (for AdamW
            the present steps without decay) would be in balance: 0 at equilibrium, above where the norm will grow,
            below where it will shrink.
        equilibrium_weight_norm: that length, for the hyperparameters of the last step.
        steps_to_equilibrium: steps in which :math:`|w|^4` approaches it by a factor of e; inf without equilibrium.
        steps_left: about how many more steps |w| takes to settle, if the gradients stay as they are: 0 if |w|^4 is
            within 10 % of its value at equilibrium; inf where it does not come closer; None where there is no
            prediction.
        time: the sum of lr * weight_decay over its steps; of order 1 once equilibrium can have been reached.
        correlation: :math:`r = \langle b,g\rangle/|g|^2`, b the momentum buffer before the step, ratio of means: 0
            where noise dominates. The predictions include it (see :mod:`normkern.theory`). 0 for AdamW, whose
            predictions take the size of its steps as it is.
        cosine: root mean square of :math:`\langle w,g\rangle/(|w||g|)`: 0 where the loss is scale-invariant.
        nsr: noise-to-signal ratio of the batch gradient, from `SVAG.noise`; None with other optimizers.
        reason: why there is no prediction, or what is missing; else None.
    """

    group: int
    steps: int
    weight_norm: float
    grad_norm: float
    effective_lr: float
    intrinsic_lr: float
    angular_update: float
    predicted_angular_update: float | None
    residual: float | None
    equilibrium_weight_norm: float | None
    steps_to_equilibrium: float
    steps_left: float | None
    time: float
    correlation: float
    cosine: float
    nsr: float | None
    reason: str | None

    @property
    def verdict(self) -> str | None:
        """ "settled", or "not yet" and about how many more steps it takes; None where there is no prediction."""
        if self.steps_left is None:
            return None
        return "settled" if self.steps_left == 0 else f"not yet{_more(self.steps_left)}"


class EquilibriumReport(Report[Equilibrium]):
    __doc__ = Report.__doc__

    @property
    def verdict(self) -> str:
        """Whether the lengths of all parameters that have an equilibrium have settled, and if not, how long it takes.

        A group whose tensors are scale-invariant only together counts as one.
        """
        left = []
        for i, group in self.groups.items():
            own = [p.steps_left for p in self.parameters.values() if p.group == i and p.steps_left is not None]
            left += own or [x for x in [group.steps_left] if x is not None]
        if not left:
            return "no equilibrium: nothing settles"
        waiting = [x for x in left if x > 0]
        if not waiting:
            return f"settled: {len(left)} of {len(left)}"
        return f"not settled yet: {len(left) - len(waiting)} of {len(left)}{_more(max(waiting))}"

    def __str__(self) -> str:
        lines = [("", "|w|", "|w| at eq.", "residual", "effective lr", "angle", "predicted", "")]
        for i, group in self.groups.items():
            lines.append((f"group {i}", *_cells(group), group.reason or group.verdict or ""))
            for name, parameter in self.parameters.items():
                if parameter.group == i:
                    rows = "" if len(self.slots[name]) == 1 else f" ({len(self.slots[name])} rows)"
                    remark = parameter.reason or parameter.verdict or ""
                    remark = "" if remark == group.reason else remark
                    lines.append((f"  {name}{rows}", *_cells(parameter), remark))
        heads = [
            f"group {i}: intrinsic lr {group.intrinsic_lr:.3g}, {group.steps_to_equilibrium:.4g} steps to equilibrium, "
            f"time {group.time:.3g}"
            for i, group in self.groups.items()
        ]
        return "\n".join([f"after {self.steps} steps: {self.verdict}", *heads, *table(lines)])


def _more(steps: float) -> str:
    """Return how many steps are left, in words, to two digits."""
    if steps == math.inf:
        return ", and the weights shrink to zero"
    return f", about {float(f'{steps:.1e}'):,.0f} more steps"


def _why_none(h: Hyperparameters) -> str | None:
    """Return why a group has no equilibrium; None if it has one."""
    if h.lr == 0:
        return "lr is 0: nothing moves"
    if h.weight_decay == 0:
        return "weight_decay is 0: no equilibrium, the norm grows for ever"
    if h.rule == "adam":
        return "weight_decay of Adam is part of the gradient: no formula, AdamW has one"
    try:
        _balance(h)
    except ValueError as error:
        return str(error)
    return None


def _arguments(h: Hyperparameters) -> tuple[float, float, float, bool]:
    """Return lr, weight_decay, momentum and nesterov of the equivalent run without dampening."""
    return h.lr * (1 - h.dampening), h.weight_decay, h.momentum, h.nesterov


def _balance(h: Hyperparameters) -> Balance:
    if h.rule == "adamw":
        return adamw_balance("equilibrium", h.lr, h.weight_decay, h.momentum)
    return balance("equilibrium", *_arguments(h))


def _slow(h: Hyperparameters) -> float:
    """Return the steps in which |w|^4 approaches equilibrium by a factor of e."""
    if h.rule == "adamw":
        return adamw_steps_to_equilibrium("equilibrium", h.lr, h.weight_decay)
    lr, decay, momentum, _ = _arguments(h)
    return steps_to_equilibrium(lr=lr, weight_decay=decay, momentum=momentum)


def numbers(h: Hyperparameters) -> list[float]:
    """Return lr, weight_decay, whether it is SGD, whether there is an equilibrium, and its `Balance`, of a group."""
    at = _NO_BALANCE if _why_none(h) else _balance(h)
    return [h.lr, h.weight_decay, float(h.rule == "sgd"), float(at is not _NO_BALANCE), *at]


_NO_BALANCE = Balance(0.0, 0.0, 0.0, 0.0)


def equilibrium(
    group: int, h: Hyperparameters, means: list[float], steps: int, seen: bool, time: float, nsr: float | None
) -> Equilibrium:
    """Return the results of one row from its means, in the order of `COLUMNS`."""
    m = dict(zip(COLUMNS, means if steps else [math.nan] * len(means), strict=True))
    reason, cosine = _why_none(h), math.sqrt(m["cosine_sq"])
    slow = _slow(h) if reason is None else math.inf
    is_sgd = h.rule == "sgd"
    if steps == 0:
        reason = "not measured: never stepped with finite numbers"
    elif reason is None and m["balanced_weight_sq"] == 0:
        reason = "not measured since there is an equilibrium"
    elif reason is None and cosine > _COSINE:
        reason = f"not scale-invariant by itself: |<w,g>| is {cosine:.2g} |w| |g|"
    predicted = residual = norm = left = None
    correlation = m["buffer_grad_dot"] / m["grad_sq"] if m["grad_sq"] else 0.0
    if reason is None:
        at = _balance(h)
        length = at.weight_of_grad + correlation * at.weight_of_dot
        has_no_balance = (m["balance_sq"] <= 0) != (m["grad_sq"] == 0) or m["balance_update_sq"] < 0
        if length <= 0 or (is_sgd and has_no_balance):
            reason = "gradients undo the momentum buffer: it shrinks, and nothing balances yet"
        else:
            of_nothing = at.update_of_grad / at.weight_of_grad
            predicted = math.sqrt(m["balance_update_sq"] / m["balance_sq"] if m["balance_sq"] else of_nothing)
            # Gradients shrink as 1/|w|, and so |w|^2 of balance is |w|_*^4/|w|^2; steps of AdamW do not depend on |w|.
            ratio = m["balance_sq"] / m["balanced_weight_sq"]
            residual = (ratio if is_sgd else ratio**2) - 1
            norm = (length * m["unit_grad_sq"]) ** (0.25 if is_sgd else 0.5)
            left = steps_left(residual, slow)
    if reason is None and not seen:
        reason = "not measured in the last step: not stepped, or no finite numbers"
    return Equilibrium(
        group=group,
        steps=steps,
        weight_norm=math.sqrt(m["weight_sq"]),
        grad_norm=math.sqrt(m["grad_sq"]),
        effective_lr=m["lr"] / (m["weight_sq"] if is_sgd else math.sqrt(m["weight_sq"])),
        intrinsic_lr=h.lr * h.weight_decay,
        angular_update=math.sqrt(m["angle_sq"]),
        predicted_angular_update=predicted,
        residual=residual,
        equilibrium_weight_norm=norm,
        steps_to_equilibrium=slow,
        steps_left=left,
        time=time,
        correlation=correlation,
        cosine=cosine,
        nsr=nsr,
        reason=reason,
    )


def steps_left(residual: float, slow: float) -> float:
    """Return the steps until |w|^4 is within `SETTLED` of its value at equilibrium; `slow` bring it e times closer."""
    if residual <= -1:  # no gradient: the weights shrink to zero
        return math.inf
    away = abs(1 / (1 + residual) - 1)
    return 0.0 if away <= SETTLED else slow * math.log(away / SETTLED)


def _cells(x: Equilibrium) -> tuple[str, str, str, str, str, str]:
    predictions = (x.equilibrium_weight_norm, x.residual, x.predicted_angular_update)
    norm, residual, predicted = ("-" if p is None else f"{p:.4g}" for p in predictions)
    return f"{x.weight_norm:.4g}", norm, residual, f"{x.effective_lr:.4g}", f"{x.angular_update:.4g}", predicted
