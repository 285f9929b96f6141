"""`StepReader`: the sums of an optimizer's steps, for slots, parameters and param groups. Used by monitors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..optim.corrected_decay import with_decay_of_step
from ..optim.options import LR_MULTIPLIERS, NORM, number
from ..optim.pair_steps import PairSteps
from ..optim.parameter_names import all_names
from ..optim.step_stats import StepStats
from ..optim.unwrap import expect_fused, expect_sgd


class Hyperparameters(NamedTuple):
    """The hyperparameters of one param group in one step, as the kernel has them.

    `rule`: "sgd"; or with beta1 as the momentum "adamw", or "adam", whose weight decay is part of the gradient.
    """

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    rule: str = "sgd"


class Step(NamedTuple):
    """One step: the sums of every row, and the hyperparameters of each measured group."""

    row_index: RowIndex
    sums: StepStats
    groups: tuple[Hyperparameters, ...]


class RowIndex:
    """Rows of a monitor: one for every slot, then one for every parameter (unless each has one slot) and every group.

    The last two have the sums of all their slots, as of one vector.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """`groups`: of each measured one its position in the optimizer and the number of slots of each parameter."""
        self.layout = tuple((index, tuple(counts)) for index, counts in groups)
        self.indices = [index for index, _ in self.layout]
        counts = [count for _, group in self.layout for count in group]
        self.slots, self.parameters = sum(counts), len(counts)
        self.has_rows = any(count != 1 for count in counts)
        group_of = [g for g, (_, group) in enumerate(self.layout) for _ in group]
        self.slices: list[slice] = []  # of each parameter's slots
        for count in counts:
            start = self.slices[-1].stop if self.slices else 0
            self.slices.append(slice(start, start + count))
        self.first_parameter = self.slots if self.has_rows else 0
        self.first_group = self.first_parameter + self.parameters
        self.rows = self.first_group + len(self.layout)
        self._parameter_of_slot = torch.arange(self.parameters).repeat_interleave(torch.tensor(counts).long())
        groups_of_parameters = torch.tensor(group_of).long()
        self._group_of_slot = groups_of_parameters[self._parameter_of_slot]
        parts = [self._group_of_slot, *([groups_of_parameters] if self.has_rows else [])]
        self._group_of_row = torch.cat([*parts, torch.arange(len(self.layout))])

    def sums(self, table: Tensor) -> Tensor:
        """Return the rows for a table of slots. A slot that is all NaN was not stepped, and adds nothing."""
        self._go_to(table.device)
        stepped = ~table.isnan().all(1, keepdim=True)
        x = torch.cat([torch.where(stepped, table, 0.0), stepped.to(table.dtype)], 1)
        sizes = [(len(self.layout), self._group_of_slot)]
        if self.has_rows:
            sizes.insert(0, (self.parameters, self._parameter_of_slot))
        parts = [table]
        for size, of in sizes:
            total = x.new_zeros(size, x.shape[1]).index_add_(0, of, x)
            parts.append(torch.where(total[:, -1:] > 0, total[:, :-1], torch.nan))
        return torch.cat(parts)

    def of_groups(self, numbers: Sequence[Sequence[float]], device: torch.device) -> Tensor:
        """Return for every row the numbers of its group."""
        self._go_to(device)
        # From pinned memory, so that the host does not wait for the device.
        host = torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)[self._group_of_row]

    def group_of_rows(self) -> list[int]:
        """Return which of the measured groups each row belongs to."""
        of: list[int] = self._group_of_row.tolist()
        return of

    def _go_to(self, device: torch.device) -> None:
        if self._group_of_row.device != device:
            self._parameter_of_slot = self._parameter_of_slot.to(device)
            self._group_of_slot, self._group_of_row = self._group_of_slot.to(device), self._group_of_row.to(device)


class StepReader:
    """Reads the steps of an optimizer, each one once."""

    def __init__(self, optimizer: Any, who: str, takes_adam: bool = False) -> None:
        expect = expect_fused if takes_adam else expect_sgd
        self.optimizer, self._who = expect(optimizer, who), who
        part_of = self.optimizer._run.part_of
        if part_of is not None:
            warnings.warn(
                f"normkern: {who} reads the parameters of this process alone: {part_of} has split them, so its "
                "numbers of a param group cover this part only",
                UserWarning,
                stacklevel=4,
            )
        self._last: object = None
        self._key: object = None
        self._row_index: RowIndex | None = None
        self.check()

    def check(self) -> None:
        """Check that the optimizer measures something, and has one learning rate for each group."""
        if all(group["stats"] is None for group in self.optimizer.param_groups):
            raise ValueError(
                f'{self._who}: optimizer expected one with stats="tensor" or "row", got one that measures nothing; '
                'pass stats="tensor" to the optimizer'
            )
        groups = self.optimizer.param_groups
        for index, group in enumerate(groups):
            if group[NORM] is not None:
                raise ValueError(
                    f"{self._who}: param_groups[{index}]: norm expected None, as the norms that it keeps have no "
                    f"equilibrium to come to, got {group[NORM]!r}"
                )
        self._check_multipliers(i for i, group in enumerate(groups) if group.get(LR_MULTIPLIERS) is not None)

    def _check_multipliers(self, groups: Iterable[int]) -> None:
        for index in groups:
            raise ValueError(
                f"{self._who}: param_groups[{index}]: lr_multipliers expected None, as a monitor needs one learning "
                "rate for each group; give each multiplier a group"
            )

    def row_index(self) -> RowIndex:
        """Return the rows of the next step, according to the param groups."""
        default = "tensor" if isinstance(self.optimizer, PairSteps) else None  # SVAG always measures
        groups: list[tuple[int, list[int]]] = []
        for i, group in enumerate(self.optimizer.param_groups):
            stats = group["stats"] or default
            if stats is not None:
                code = ops.stats_code(stats, self._who)  # type: ignore[arg-type]
                groups.append((i, [ops.slot_count(p, code) for p in group["params"]]))
        return RowIndex(groups)

    def read(self) -> Step | None:
        """Return the last step, unless it was read before or there was none. Nothing is synchronised."""
        measured = self.optimizer._run.measured
        if measured is None or measured is self._last:
            self.check()
            return None
        self._check_multipliers(measured.multipliers)
        self._last = measured
        table, sizes = measured.table, [(index, size) for index, _, _, size in measured.groups]
        key = (measured.offsets, len(table), sizes)
        if self._row_index is None or key != self._key:
            ends = [*measured.offsets[1:], len(table)]
            counts = [b - a for a, b in zip(measured.offsets, ends, strict=True)]
            groups, at = [], 0
            for index, size in sizes:
                groups.append((index, counts[at : at + size]))
                at += size
            self._key, self._row_index = key, RowIndex(groups)
        table = table[:, : len(ops.SUMS)]
        if measured.clip_coef is not None:  # a step of the clipped gradient is an ordinary one
            once = measured.clip_coef.to(table.device)
            of_grad = torch.ones_like(table[:1])
            of_grad[:, ops.SUMS.index("grad_sq")], of_grad[:, ops.SUMS.index("weight_grad_dot")] = once.square(), once
            table = table * of_grad
        sums = self._row_index.sums(table)
        hyperparameters = tuple(
            self._hyperparameters(index, number(lr, "lr", self._who)) for index, lr, _, _ in measured.groups
        )
        return Step(self._row_index, StepStats(sums, [""], (0,), [math.nan]), hyperparameters)

    def _hyperparameters(self, index: int, lr: float) -> Hyperparameters:
        options = self.optimizer.param_groups[index]
        where = f"{self._who}: param_groups[{index}]"
        if isinstance(self.optimizer, PairSteps):
            options = self.optimizer._kernel_options(index, options)
        if "betas" in options:
            return self._hyperparameters_of_adam(options, lr, where)
        options = with_decay_of_step({**options, "lr": lr}, "coupled", where)
        momentum, dampening, decay = (number(options[k], k, where) for k in ("momentum", "dampening", "weight_decay"))
        return Hyperparameters(lr, momentum, dampening if momentum else 0.0, decay, bool(options["nesterov"]))

    @staticmethod
    def _hyperparameters_of_adam(options: dict[str, Any], lr: float, where: str) -> Hyperparameters:
        if "decay" in options:
            options = with_decay_of_step({**options, "lr": lr}, "decoupled", where)
        beta1 = number(options["betas"][0], "betas[0]", where)
        decay = number(options["weight_decay"], "weight_decay", where)
        rule = "adamw" if options["decoupled_weight_decay"] or decay == 0 else "adam"
        return Hyperparameters(lr, beta1, 0.0, decay, False, rule)

    def names(self, row_index: RowIndex) -> list[str]:
        """Return the names of the parameters."""
        optimizer = self.optimizer
        measured = optimizer._run.measured
        params = {} if measured is None else {index: params for index, _, params, _ in measured.groups}
        groups = [(i, params.get(i, optimizer.param_groups[i]["params"])) for i, _ in row_index.layout]
        names = all_names(groups, optimizer.param_groups, optimizer._run.names)
        if len(names) != row_index.parameters:
            raise ValueError(
                f"{self._who}: expected the parameters of the last step that was read, {row_index.parameters}, but the "
                f"param groups have {len(names)}; expected an update() after a step"
            )
        return names

    def pass_over(self) -> None:
        """Skip the last step: the loaded state contains it."""
        self._last = self.optimizer._run.measured

    def device(self) -> torch.device:
        """Return the device of the sums."""
        return next((p.device for g in self.optimizer.param_groups for p in g["params"]), torch.device("cpu"))

    def check_state(
        self, where: str, state: Any, always: Sequence[str], tensors: Mapping[str, int], others: Sequence[str]
    ) -> RowIndex | None:
        """Check that a monitor's state_dict fits the optimizer: rows and columns of its `tensors`.

        Returns:
            The rows; None if the state is of a monitor before its first step.

        Raises:
            ValueError: it does not fit.
        """
        if not isinstance(state, Mapping) or not {"steps", "layout", *always} <= set(state):
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"{where}: state_dict expected what state_dict() returned, got {got}")
        if type(state["steps"]) is not int or state["steps"] < 0:
            raise ValueError(f"{where}: steps expected an integer >= 0, got {state['steps']!r}")
        layout = state["layout"]
        if layout is None:
            return None
        row_index = self.row_index()
        if tuple((index, tuple(counts)) for index, counts in layout) != row_index.layout:
            raise ValueError(f"{where}: layout expected {_words(row_index.layout)}, got {_words(layout)}")
        for name in (*others, *tensors):
            if name not in state:
                raise ValueError(f"{where}: state_dict expected {name!r}, got {sorted(map(str, state))}")
        for name, width in tensors.items():
            x = state[name]
            if not isinstance(x, Tensor) or x.shape != (row_index.rows, width):
                shape = tuple(x.shape) if isinstance(x, Tensor) else x
                raise ValueError(f"{where}: {name} expected shape {(row_index.rows, width)}, got {shape!r}")
        return row_index


def _words(layout: Any) -> str:
    return ", ".join(f"{len(counts)} parameters with {sum(counts)} slots in group {index}" for index, counts in layout)


class Average:
    """Means over steps of columns, row by row, with normalised weights ``decay**age``, so without bias towards zero.

    ``decay=1`` is the plain mean. A row that is not seen in a step keeps its mean.
    """

    def __init__(self, decay: float, rows: int, columns: int, device: torch.device) -> None:
        self.decay = decay
        self.weight = torch.zeros(rows, 1, dtype=torch.float64, device=device)
        self.count = torch.zeros_like(self.weight)
        self.mean = torch.zeros(rows, columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor, seen: Tensor) -> None:
        """Add one step: `x` (rows, columns), `seen` (rows, 1)."""
        self.count = self.count + seen
        self.weight = torch.where(seen, self.decay * self.weight + 1, self.weight)
        self.mean = torch.where(seen, self.mean + (x - self.mean) / self.weight, self.mean)
