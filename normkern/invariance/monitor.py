"""`InvarianceMonitor`: whether declared scale-invariant parameters still are, from the statistics of steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..names import strip_prefixes
from ..optim.parameter_names import optimizer_names
from ..optim.step_stats import StepStats
from ..optim.unwrap import unwrap_optimizer
from .groups import JOINT


class InvarianceMonitor:
    r"""Averages :math:`\langle w,g\rangle / (|w| |g|)` of scale-invariant parameters, and warns when it drifts.

    It is zero, but for rounding, as long as a loss does not see the scale of w; the eps of a norm, statistics that are
    not those of the batch (eval mode), or a layer that has no norm behind it make it differ. `update` reads
    ``opt.stats()`` after a step, at no further pass over the parameters.

    On a CPU every update looks at the averages. Elsewhere that would synchronise, and happens at every `every`-th
    update and in `report`.

    Args:
        optimizer: `normkern.SGD` or `normkern.SVAG` with ``stats``, or what a framework has wrapped around it.
        names: of parameters, or tuples of names for sets that are invariant only together. None: the param groups with
            ``scale_invariant`` true, and in those the sets under ``joint``, as `invariance.param_groups` makes them.
        ema: the share that an average keeps at an update, 0 <= ema < 1.
        threshold: of the average's absolute value, > 0. More where rounding is: 4 units in the last place over the
            root of the number of entries.
        every: updates, >= 1.

    Raises:
        ValueError: the optimizer measures nothing, nothing is declared, a name is unknown, or a number is out of range.

    >>> import normkern
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = normkern.SGD([{"params": [("w", w)], "scale_invariant": True}], lr=0.1, stats="tensor")
    >>> monitor = InvarianceMonitor(opt)
    >>> w.grad = torch.tensor([4.0, -3.0])
    >>> opt.step()
    >>> monitor.update()
    >>> monitor.report()
    {'w': {'cosine': 0.0, 'updates': 1, 'drifted': False}}
    """

    def __init__(
        self,
        optimizer: Any,
        names: Iterable[str | Iterable[str]] | None = None,
        *,
        ema: float = 0.9,
        threshold: float = 1e-3,
        every: int = 100,
    ) -> None:
        wrapped, optimizer = optimizer, unwrap_optimizer(optimizer)
        if not callable(getattr(optimizer, "stats", None)) or not hasattr(optimizer, "param_groups"):
            raise ValueError(
                'InvarianceMonitor: optimizer expected one with statistics, such as normkern.SGD(..., stats="tensor"), '
                f"got {type(wrapped).__name__}{'' if wrapped is optimizer else f' around {type(optimizer).__name__}'}"
            )
        if not 0 <= ema < 1:
            raise ValueError(f"InvarianceMonitor: ema expected a number in [0, 1), got {ema!r}")
        if not 0 < threshold < math.inf:
            raise ValueError(f"InvarianceMonitor: threshold expected a finite number > 0, got {threshold!r}")
        if type(every) is not int or every < 1:
            raise ValueError(f"InvarianceMonitor: every expected an integer >= 1, got {every!r}")
        self._optimizer, self._ema, self._threshold, self._every = optimizer, ema, threshold, every
        units = None if names is None else [(n,) if isinstance(n, str) else tuple(n) for n in names]
        self._names = None if units is None else [tuple(map(strip_prefixes, unit)) for unit in units]
        self._count = 0
        self._warned: set[tuple[str, ...]] = set()
        self._layout: Any = None
        self._units = self._declared()
        self._mean = self._weight = self._seen = torch.zeros(0, dtype=torch.float64)

    def update(self) -> None:
        """Read the last step; call it once per step. Parameters without a gradient, or with NaN, keep their average.

        Raises:
            RuntimeError: there was no step.
            UserWarning: as a warning; an average is above the threshold, once for each parameter or set.
        """
        stats: StepStats = self._optimizer.stats()
        layout = (stats.names, stats.slots)
        if layout != self._layout:
            self._lay_out(stats)
            self._layout = layout
        columns = torch.stack([stats.weight_grad_dot, stats.weight_sq, stats.grad_sq], 1)[self._slots]
        sums = columns.new_zeros(len(self._units), 3).index_add_(0, self._unit_of, columns)
        cosine = sums[:, 0] / (sums[:, 1].sqrt() * sums[:, 2].sqrt())
        seen = cosine.isfinite()
        self._weight = torch.where(seen, self._ema * self._weight + 1, self._weight)
        change = (cosine.nan_to_num(0.0, 0.0, 0.0) - self._mean) / self._weight.clamp(min=1)
        self._mean = torch.where(seen, self._mean + change, self._mean)
        self._seen = self._seen + seen
        self._count += 1
        if self._mean.device.type == "cpu" or self._count % self._every == 0:
            self._look()

    def report(self) -> dict[str, dict[str, float | int | bool]]:
        """Return for each name, or names joined by " + ": cosine (the average; NaN without any), updates, drifted.

        Synchronises, and warns as `update` does.
        """
        if self._layout is None:
            return {" + ".join(u): {"cosine": math.nan, "updates": 0, "drifted": False} for u in self._units}
        drifted = self._look()
        rows = zip(self._units, self._mean.tolist(), self._seen.tolist(), strict=True)
        return {
            " + ".join(unit): {"cosine": x if n else math.nan, "updates": int(n), "drifted": unit in drifted}
            for unit, x, n in rows
        }

    def _declared(self) -> list[tuple[str, ...]]:
        """Return declared parameters and sets, each once."""
        measured: list[str] = []
        everything: list[str] = []
        units: list[tuple[str, ...]] = []
        all_of = optimizer_names(self._optimizer)
        for index, group in enumerate(self._optimizer.param_groups):
            names = all_of[index]
            everything += names
            measured += names if group.get("stats") is not None else []
            if self._names is None and group.get("scale_invariant"):
                sets = [tuple(map(strip_prefixes, s)) for s in group.get(JOINT, ())]
                inside = {n for s in sets for n in s}
                units += [(n,) for n in names if n not in inside] + sets
        units = list(dict.fromkeys(units if self._names is None else self._names))
        if not units:
            raise ValueError(
                "InvarianceMonitor: expected a param group with scale_invariant=True, as invariance.param_groups makes "
                "them, or names; got neither"
            )
        for name in (n for unit in units for n in unit):
            if name not in everything:
                raise ValueError(f"InvarianceMonitor: names expected those of the optimizer's parameters, got {name!r}")
            if name not in measured:
                raise ValueError(
                    f"InvarianceMonitor: {name!r} expected to be in a param group with statistics; construct the "
                    'optimizer with stats="tensor" or "row"'
                )
        return units

    def _lay_out(self, stats: StepStats) -> None:
        """Find the slots of the declared parameters, and keep the averages of those known before."""
        old = {} if self._layout is None else {unit: i for i, unit in enumerate(self._units)}
        self._units = self._declared()
        params: dict[str, Tensor] = {}
        for names, group in zip(optimizer_names(self._optimizer), self._optimizer.param_groups, strict=True):
            params |= zip(names, group["params"], strict=True)
        slots: list[int] = []
        unit_of: list[int] = []
        limits: list[float] = []
        # A group that was added since the last step has no slots yet.
        self._units = [u for u in self._units if all(n in stats.slots for n in u)]
        for i, unit in enumerate(self._units):
            for name in unit:
                where = range(stats.slots[name].start, stats.slots[name].stop)
                slots += where
                unit_of += [i] * len(where)
            entries = sum(params[n].numel() for n in unit)
            eps = max(torch.finfo(params[n].dtype).eps for n in unit)
            limits.append(max(self._threshold, 4 * eps / math.sqrt(max(entries, 1))))
        device = stats.weight_sq.device
        self._slots = torch.tensor(slots, dtype=torch.long, device=device)
        self._unit_of = torch.tensor(unit_of, dtype=torch.long, device=device)
        self._limits = torch.tensor(limits, dtype=torch.float64, device=device)
        kept = [(i, old[u]) for i, u in enumerate(self._units) if u in old]
        now = torch.zeros(3, len(self._units), dtype=torch.float64, device=device)
        for i, j in kept:
            now[:, i] = torch.stack([self._mean[j], self._weight[j], self._seen[j]])
        self._mean, self._weight, self._seen = now.unbind(0)

    def _look(self) -> set[tuple[str, ...]]:
        """Return the parameters and sets above their limits; warn of each the first time."""
        above = (self._mean.abs() > self._limits).tolist()
        drifted = {unit for unit, is_above in zip(self._units, above, strict=True) if is_above}
        for i, unit in enumerate(self._units):
            if unit in drifted and unit not in self._warned:
                self._warned.add(unit)
                warnings.warn(
                    f"normkern: {' + '.join(unit)} is declared scale-invariant, but <w,g> / (|w| |g|) averages "
                    f"{self._mean[i].item():.3g}, and expected is at most {self._limits[i].item():.3g}: the loss sees "
                    "its scale",
                    UserWarning,
                    stacklevel=3,
                )
        return drifted
