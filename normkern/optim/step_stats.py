"""The sums of a step: `Measured`, as a step leaves them, and `StepStats`, as users read them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops

#: What `StepStats.scalars` returns where it is not told.
_LOGGED = ("weight_norm", "grad_norm", "update_norm", "angular_update", "effective_lr")


class StepStats:
    r"""The norms and inner products of one optimizer step, per slot.

    A slot is a parameter (``stats="tensor"``) or one index of its first dimension (``stats="row"``, for parameters with
    at least two dimensions). Every parameter keeps its slots; they hold NaN if it was not stepped. With w and g before
    the step (g after unscaling, before clipping, before ``maximize`` turns its sign) and u = w' - w as stored, the
    columns are

    ===================== =====================
    ``weight_sq``         :math:`|w|^2`
    ``grad_sq``           :math:`|g|^2`
    ``weight_grad_dot``   :math:`\langle w, g\rangle`
    ``update_sq``         :math:`|u|^2`
    ``weight_update_dot`` :math:`\langle w, u\rangle`
    ===================== =====================

    float64 tensors of shape (slots,) on the parameters' device. Reading them, or the derived quantities, does not
    synchronise; `scalars` and `to_dict` do. Names are those of the model, without what wrappers such as
    `DistributedDataParallel` and `torch.compile` add to them; `SGD.name_parameters` gives names to groups without.

    >>> import normkern
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> w.grad = torch.tensor([4.0, -3.0])
    >>> opt = normkern.SGD([("w", w)], lr=0.5, stats="tensor")
    >>> opt.step()
    >>> stats = opt.stats()
    >>> stats.names, stats.slots
    (['w'], {'w': slice(0, 1, None)})
    >>> stats.effective_lr
    tensor([0.0200], dtype=torch.float64)
    >>> stats.to_dict()["w"]["next_weight_sq"]
    31.25
    >>> stats.scalars(["grad_norm"], prefix="train/")
    {'train/grad_norm/w': 5.0, 'train/grad_norm/all': 5.0}
    """

    names: list[str]
    slots: dict[str, slice]

    def __init__(
        self,
        table: Tensor,
        names: list[str],
        offsets: tuple[int, ...],
        lr: list[float | Tensor],
        totals: Tensor | None = None,
        part_of: str | None = None,
        is_adaptive: bool = False,
        kept: list[bool] | None = None,
    ) -> None:
        """Name the rows of a table.

        Args:
            table: columns `ops.SUMS`.
            names, offsets, lr: per parameter; `offsets` are where the slots begin.
            totals: (len(ops.SUMS),), the sums of all parameters; None: they are those of the table.
            is_adaptive: the size of an update does not depend on that of the gradient, as with Adam.
            kept: per parameter, whether the step kept its norm and lr is relative to it; None: none of them.
            part_of: who has given the optimizer a part of the parameters only, with no `totals`; None: they are all.
        """
        ends = (*offsets[1:], table.shape[0])
        self.names = names
        self.slots = {n: slice(a, b) for n, a, b in zip(names, offsets, ends, strict=True)}
        self._table = table
        self._counts = [b - a for a, b in zip(offsets, ends, strict=True)]
        self._lr = lr
        self._totals, self._part_of, self._is_adaptive = totals, part_of, is_adaptive
        self._kept = kept if kept is not None and any(kept) else None

    @property
    def weight_sq(self) -> Tensor:
        """|w|^2 before the step."""
        return ops.column(self._table, "weight_sq")

    @property
    def grad_sq(self) -> Tensor:
        """|g|^2."""
        return ops.column(self._table, "grad_sq")

    @property
    def weight_grad_dot(self) -> Tensor:
        """<w, g>: 0 up to rounding where the loss is scale-invariant in w (arXiv 1812.03981, lemma 2.4)."""
        return ops.column(self._table, "weight_grad_dot")

    @property
    def update_sq(self) -> Tensor:
        """|u|^2, u = w' - w as stored: an update that rounds away in bfloat16 is 0 here."""
        return ops.column(self._table, "update_sq")

    @property
    def weight_update_dot(self) -> Tensor:
        """<w, u>."""
        return ops.column(self._table, "weight_update_dot")

    @cached_property
    def weight_norm(self) -> Tensor:
        """|w| before the step."""
        return self.weight_sq.sqrt()

    @cached_property
    def grad_norm(self) -> Tensor:
        """|g|."""
        return self.grad_sq.sqrt()

    @cached_property
    def update_norm(self) -> Tensor:
        """|u|."""
        return self.update_sq.sqrt()

    @cached_property
    def cosine(self) -> Tensor:
        """<w, g> / (|w| |g|); NaN if either is zero."""
        return self.weight_grad_dot / (self.weight_norm * self.grad_norm)

    @cached_property
    def next_weight_sq(self) -> Tensor:
        """|w'|^2 = |w|^2 + 2 <w, u> + |u|^2."""
        return self.weight_sq + 2 * self.weight_update_dot + self.update_sq

    @cached_property
    def angular_update(self) -> Tensor:
        """The angle between w and w', in radians: atan2(|w x u|, <w, w'>), accurate for small angles."""
        cross = (self.weight_sq * self.update_sq - self.weight_update_dot.square()).clamp(min=0).sqrt()
        return torch.atan2(cross, self.weight_sq + self.weight_update_dot)

    @cached_property
    def effective_lr(self) -> Tensor:
        """The learning rate on the unit sphere, lr with its multiplier: lr / |w|^2 (arXiv 2010.02916, section 2).

        Of `AdamW` and `Adam`, whose updates are as large for any size of the gradient, lr / |w|. Where ``norm=`` keeps
        norms it is lr itself.
        """
        divisor = self.weight_norm if self._is_adaptive else self.weight_sq
        if self._kept is not None:
            on_sphere = _filled([float(kept) for kept in self._kept], self._counts, self._table.device) != 0
            divisor = torch.where(on_sphere, torch.where(divisor.isnan(), divisor, 1.0), divisor)
        return _filled(self._lr, self._counts, self._table.device) / divisor

    def scalars(self, quantities: str | Iterable[str] = _LOGGED, prefix: str = "") -> dict[str, float]:
        """Return one flat dict of plain numbers, as loggers take them: ``{prefix}{quantity}/{name}`` -> number.

        Fits Lightning's ``log_dict``, ``log_metrics``, ``wandb.log``, TensorBoard, JSON. A parameter with a slot for
        each row is one vector here. The name "all" has the quantity of all parameters as one vector: the global norms,
        the angle by which all weights turn. Numbers that are not finite are left out: those of parameters that were not
        stepped; the cosine of zeros; the effective learning rate of all where parameters differ in lr.

        Args:
            quantities: names of attributes of this class.
            prefix: begins every key, such as "train/".

        Synchronises once, however many numbers there are. Where `ZeroRedundancyOptimizer` has split the parameters,
        there is no "all", unless the optimizer was constructed with ``group=``.

        Raises:
            ValueError: a quantity is unknown. TypeError: `prefix` is no string.
        """
        chosen = _chosen(quantities)
        if not isinstance(prefix, str):
            raise TypeError(f"StepStats.scalars: prefix expected a string, got {prefix!r}")
        table, names, lr = self._by_parameter(), list(self.names), list(self._lr)
        kept = [False] * len(lr) if self._kept is None else list(self._kept)
        if self._part_of is None:
            stepped = ~table.isnan().all(1, keepdim=True)
            totals = torch.where(stepped, table, 0.0).sum(0) if self._totals is None else self._totals
            table = torch.cat([table, totals.view(1, -1)])
            names.append("all")
            alike = len(set(kept)) == 1 and len(_runs(lr, [1] * len(lr))) == 1
            lr.append(lr[0] if alike else math.nan)
            kept.append(alike and kept[0])
        vectors = StepStats(
            table, [""] * len(names), tuple(range(len(names))), lr, is_adaptive=self._is_adaptive, kept=kept
        )
        rows = torch.stack([getattr(vectors, quantity) for quantity in chosen]).tolist() if chosen else []
        return {
            f"{prefix}{quantity}/{name}": x
            for quantity, row in zip(chosen, rows, strict=True)
            for name, x in zip(names, row, strict=True)
            if math.isfinite(x)
        }

    def _by_parameter(self) -> Tensor:
        """Return the table with one row for each parameter: the sums of its slots."""
        table = self._table[:, : len(ops.SUMS)]
        if all(count == 1 for count in self._counts):
            return table
        counts = torch.tensor(self._counts, device=table.device)
        of = torch.arange(len(self._counts), device=table.device).repeat_interleave(counts)
        return table.new_zeros(len(self._counts), table.shape[1]).index_add_(0, of, table)

    def to_dict(self) -> dict[str, dict[str, float | list[float]]]:
        """Return plain numbers for a logger: name -> quantity -> number (a list for ``stats="row"``). Synchronises."""
        columns = {q: getattr(self, q).tolist() for q in (*ops.SUMS, *_DERIVED)}
        return {
            name: {q: column[s] if count != 1 else column[s.start] for q, column in columns.items()}
            for (name, s), count in zip(self.slots.items(), self._counts, strict=True)
        }

    def __repr__(self) -> str:
        return f"StepStats({len(self.names)} parameters, {self._table.shape[0]} slots)"


class Measured:
    """The sums of a step, from which `stats()` makes its result; names are made when the caller asks for them."""

    __slots__ = ("_stats", "clip_coef", "groups", "is_adaptive", "kept", "multipliers", "offsets", "part_of", "table",
                 "totals", "who")  # fmt: skip

    def __init__(
        self,
        table: Tensor,
        offsets: tuple[int, ...],
        groups: list[tuple[int, float | Tensor, list[Any], int]],
        multipliers: dict[int, ops.LrMultipliers],
        clip_coef: Tensor | None,
        who: str,
        is_adaptive: bool,
        kept: set[int],
    ) -> None:
        """`groups`: index, lr, parameters and their number of each measured one; `multipliers` of the lr, by group.

        `kept`: the groups whose norms the step kept.
        """
        self.table, self.offsets, self.groups = table, offsets, groups
        self.multipliers, self.clip_coef = multipliers, clip_coef
        self.who, self.is_adaptive, self.kept = who, is_adaptive, kept
        self.totals: Tensor | None = None  # of all ranks, where the parameters are split over them
        self.part_of: str | None = None
        self._stats: StepStats | None = None

    def stats(self, names_of: Callable[[list[tuple[int, Sequence[Tensor]]]], list[str]]) -> StepStats:
        """Return the `StepStats`, the same object each time. `names_of` returns the names of groups' parameters."""
        if self._stats is None:
            lr: list[float | Tensor] = []
            for index, group_lr, params, size in self.groups:
                if len(params) != size:
                    raise ValueError(
                        f"{self.who}.stats: param_groups[{index}] has {len(params)} params, but had {size} at the last "
                        "step; expected a step after params are added or removed"
                    )
                multipliers = self.multipliers.get(index)
                lr += [group_lr if multipliers is None else group_lr * multipliers.value(i) for i in range(size)]
            names = names_of([(index, params) for index, _, params, _ in self.groups])
            kept = [index in self.kept for index, _, _, size in self.groups for _ in range(size)]
            self._stats = StepStats(
                self.table, names, self.offsets, lr, self.totals, self.part_of, self.is_adaptive, kept
            )
        return self._stats

    def own_totals(self) -> Tensor:
        """Return the sums of all parameters that were stepped."""
        table = self.table[:, : len(ops.SUMS)]
        stepped = ~table.isnan().all(1, keepdim=True)
        return torch.where(stepped, table, 0.0).sum(0)


def _chosen(quantities: str | Iterable[str]) -> list[str]:
    """Return names of quantities, checked."""
    chosen = [quantities] if isinstance(quantities, str) else list(quantities)
    known = (*ops.SUMS, *_DERIVED)
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise ValueError(f"StepStats.scalars: unknown quantity {name!r}; {hint}")
    return chosen


def _filled(numbers: Sequence[float | Tensor], counts: list[int], device: torch.device) -> Tensor:
    """Return each number as often as its count says, in float64."""
    parts = [torch.empty(0, dtype=torch.float64, device=device)]
    for x, count in _runs(numbers, counts):  # filled on the device: a copy from the host would wait
        if isinstance(x, Tensor):
            parts.append(x.double().view(1).expand(count))
        else:
            parts.append(torch.full((count,), x, dtype=torch.float64, device=device))
    return torch.cat(parts)


def _runs(lr: Sequence[float | Tensor], counts: list[int]) -> list[tuple[float | Tensor, int]]:
    """Return runs of one learning rate, and how many slots each has."""
    runs: list[tuple[float | Tensor, int]] = []
    for x, count in zip(lr, counts, strict=True):
        if runs and (x is runs[-1][0] or (isinstance(x, float) and x == runs[-1][0])):
            runs[-1] = (x, runs[-1][1] + count)
        else:
            runs.append((x, count))
    return runs


_DERIVED = (
    "weight_norm",
    "grad_norm",
    "update_norm",
    "cosine",
    "next_weight_sq",
    "angular_update",
    "effective_lr",
)
