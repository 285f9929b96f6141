"""`GrowingLR`: the base of schedules that replace weight decay: accepted optimizers, ranges, checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from ..optim.options import LR_MULTIPLIERS, number
from ..optim.sgd import SGD
from ..optim.svag import SVAG
from ..optim.unwrap import unwrap_optimizer

#: Keys of the param groups of optimizers that are no SGD, all of torch's among them.
_NOT_OF_SGD = ("betas", "eps", "etas", "lambd", "history_size")
CURE = 'normkern.SGD(decay="exponential")'


class Growth(NamedTuple):
    """The learning rate of one step, mantissa * 2**exponent, and how often the weights' scale doubles in it."""

    mantissa: float
    exponent: int
    doublings: int


class Plan(NamedTuple):
    """The values that one step of the scheduler will write."""

    lrs: list[float]
    states: list[Any]


class GrowingLR(LRScheduler):
    """A scheduler that follows, without weight decay, a run with it. Subclasses implement `_start` and `_plan`.

    A step is planned with every check, then written; an error leaves scheduler and optimizer as they were.
    """

    _planned: Plan | None = None

    def __init__(self, optimizer: Optimizer, last_epoch: int) -> None:
        """Initialise, after `_check_arguments` and the subclass's own checks."""
        self.optimizer, self.last_epoch = optimizer, last_epoch
        if last_epoch == -1 or all("initial_lr" in group for group in optimizer.param_groups):
            self._begin([group.get("initial_lr", group["lr"]) for group in optimizer.param_groups])
            self._planned = self._plan(last_epoch + 1)
        super().__init__(optimizer, last_epoch)

    def _check_arguments(self, optimizer: Any, weight_decay: Any, groups: Any, last_epoch: Any) -> None:
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.optimizer = optimizer
        count = len(optimizer.param_groups)
        if type(last_epoch) is not int or last_epoch < -1:
            raise ValueError(f"{name}: last_epoch expected an integer >= -1, got {last_epoch!r}")
        if isinstance(weight_decay, (list, tuple)):
            if len(weight_decay) != count:
                raise ValueError(
                    f"{name}: weight_decay expected a number or {count}, one per param group, got {len(weight_decay)}"
                )
            self.weight_decay = [finite(x, f"{name}: weight_decay[{i}]") for i, x in enumerate(weight_decay)]
        else:
            self.weight_decay = [finite(weight_decay, f"{name}: weight_decay")] * count
        if groups is None:
            groups = range(count)
        if isinstance(groups, (str, bytes, Mapping)) or not isinstance(groups, Iterable):
            raise ValueError(f"{name}: groups expected indices of param groups or None, got {groups!r}")
        chosen = list(groups)
        for index in chosen:
            if type(index) is not int or not 0 <= index < count:
                raise ValueError(f"{name}: groups expected indices >= 0 and < {count}, got {index!r}")
            if chosen.count(index) > 1:
                raise ValueError(f"{name}: groups expected each index once, got {index} twice")
        self.groups = tuple(sorted(chosen))
        for i, group in enumerate(optimizer.param_groups):
            if "lr" not in group:
                raise ValueError(f"{self._place(i)}: lr expected a number, got none")

    def _begin(self, lrs: Sequence[Any]) -> None:
        """Begin with initial learning rates; `last_epoch` stays."""
        self._initial = [finite(lr, f"{self._place(i)}: initial lr") for i, lr in enumerate(lrs)]
        self._states = self._start()

    def _start(self) -> list[Any]:
        """Return the states of the groups before the step after `last_epoch`."""
        raise NotImplementedError

    def _plan(self, step: int) -> Plan:
        """Return everything that the scheduler's step to `step` will write, checked."""
        raise NotImplementedError

    def _initial_step(self) -> None:
        if self._planned is None:  # SequentialLR begins its first scheduler a second time
            self._begin(self.base_lrs)
        super()._initial_step()

    def step(self, epoch: int | None = None) -> None:
        """Count one optimizer step, and set the learning rates of the next. `epoch` must be None.

        Raises:
            ValueError: as the class says; neither the scheduler nor the optimizer has changed.
        """
        if epoch is not None:
            raise ValueError(f"{type(self).__name__}.step: epoch expected None, got {epoch!r}")
        try:
            if self._planned is None:
                self._planned = self._plan(self.last_epoch + 1)
            states = self._planned.states
            super().step()
        finally:
            self._planned = None
        self._states = states

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is not None:
            raise ValueError(
                f"{type(self).__name__}: expected steps one by one from its own first, got a jump to {epoch!r}; "
                "a sequence of schedules is one schedule of the run with weight decay"
            )
        super()._update_lr()

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates that a step in progress sets; else those in force, with torch's warning."""
        if self._planned is not None:
            return [*self._planned.lrs]
        warnings.warn(
            "To get the last learning rate computed by the scheduler, please use `get_last_lr()`.",
            UserWarning,
            stacklevel=2,
        )
        return list(self.get_last_lr())

    def true_scale(self) -> list[float]:
        """Return a_t per param group: the run with weight decay has the weights a_t * w, where w are those of this run.

        It holds for the weights between `step()` and the optimizer's next step. 1.0 for a group that is not mapped; 0.0
        where it underflows (`log2_true_scale` does not). Plain numbers, nothing is synchronised.
        """
        return [2.0**x for x in self.log2_true_scale()]

    def log2_true_scale(self) -> list[float]:
        """Return log2 of `true_scale`, which never underflows."""
        raise NotImplementedError

    def _place(self, i: int) -> str:
        """Return how an error about a param group begins: while constructing, and later in a step."""
        return f"{type(self).__name__}{'.step' if hasattr(self, '_last_lr') else ''}: param_groups[{i}]"

    def _groups_now(self) -> list[dict[str, Any]]:
        """Return the param groups, and check that the mapped ones suit this schedule."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.weight_decay):
            raise ValueError(
                f"{type(self).__name__}.step: expected the {len(self.weight_decay)} param groups of its construction, "
                f"got {len(groups)}"
            )
        for i in self.groups:
            group = groups[i]
            other = next((key for key in _NOT_OF_SGD if key in group), None)
            if other is not None:
                raise ValueError(f"{self._place(i)}: expected one of an SGD, got {other!r} among its options")
            if group.get("nesterov"):
                raise ValueError(f"{self._place(i)}: nesterov expected False, got True; {CURE} follows it")
            if number(group.get("weight_decay", 0), "weight_decay", self._place(i)) != 0:
                raise ValueError(
                    f"{self._place(i)}: weight_decay expected 0, as the learning rate takes its place, got "
                    f"{group['weight_decay']!r}"
                )
            if group.get(LR_MULTIPLIERS) is not None:
                raise ValueError(
                    f"{self._place(i)}: lr_multipliers expected None, as one learning rate takes the place of a "
                    "group's weight decay; give each multiplier a group"
                )
            if isinstance(unwrap_optimizer(self.optimizer), SVAG) and group["l"] != 1:
                raise ValueError(
                    f"{self._place(i)}: l expected 1, as SVAG steps with lr/l, got {group['l']!r}; "
                    'normkern.SVAG(decay="exponential") follows any'
                )
        return groups

    def _momentum_now(self, i: int) -> tuple[float, float]:
        """Return momentum and dampening of group i; 0 where the optimizer has none."""
        group, where = self.optimizer.param_groups[i], self._place(i)
        return finite(group.get("momentum", 0), f"{where}: momentum"), number(
            group.get("dampening", 0), "dampening", where
        )

    def _check_bound(self, i: int, lr: float, momentum: float, most: float, when: str) -> None:
        """Check that lr * weight_decay is at most `most`, (1 - sqrt(momentum))^2, up to rounding.

        Beyond it the scale would oscillate through 0.
        """
        decay = lr * self.weight_decay[i]
        if not decay <= most * (1 + 1e-12):
            raise ValueError(
                f"{self._place(i)}: lr * weight_decay {when} expected at most (1 - sqrt(momentum))**2 = {most:.6g} "
                f"with momentum {momentum!r}, got {lr!r} * {self.weight_decay[i]!r} = {decay:.6g}"
            )

    def _within_range(self, i: int, step: int, growth: Growth) -> float:
        """Return the learning rate as a float, if it and the weights of its step fit their dtypes.

        Synchronises where the weights' scale doubles, not else: they are measured then.
        """
        group = self.optimizer.param_groups[i]
        try:
            lr = math.ldexp(growth.mantissa, growth.exponent)
        except OverflowError:
            lr = math.inf
        if not lr < torch.finfo(torch.float16).max:  # the least of all limits
            limit, dtype = self._largest_lr(group)
            if not lr < limit:
                size = math.log2(growth.mantissa) + growth.exponent
                raise ValueError(
                    f"{self._place(i)}: lr of step {step} expected below {limit:.5g}, the largest {dtype}, got "
                    f"2**{size:.2f}; {CURE} does not overflow"
                )
        if growth.doublings > 0:
            for j, p in enumerate(group["params"]):
                largest = largest_weight(p)
                if largest == 0:
                    continue
                limit = torch.finfo(p.dtype).max
                if math.ldexp(largest, growth.doublings + 1) > limit:
                    raise ValueError(
                        f"{self._place(i)}: weights at step {step} expected at most 1/{2 ** (growth.doublings + 1)} of "
                        f"{limit:.5g}, the largest {p.dtype}, as they grow, got {largest:.5g} in params[{j}]; "
                        f"{CURE} does not overflow"
                    )
        return lr

    def _largest_lr(self, group: dict[str, Any]) -> tuple[float, torch.dtype]:
        """Return the smallest limit of the dtypes that the learning rate will be converted to."""
        dtypes = {p.dtype.to_real() for p in group["params"] if p.is_floating_point() or p.is_complex()}
        if isinstance(unwrap_optimizer(self.optimizer), SGD) or group.get("fused"):
            # torch's loops turn lr into a number of the parameter's dtype, and raise where float16 has none.
            dtypes = {d if d == torch.float64 else torch.float32 for d in dtypes}
        if isinstance(group["lr"], Tensor) and group["lr"].is_floating_point():
            dtypes.add(group["lr"].dtype)
        dtypes.add(torch.float64)
        return min(((torch.finfo(d).max, d) for d in dtypes), key=lambda pair: pair[0])

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, without the optimizer and without arguments that are functions."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": [float(lr) for lr in self._last_lr],
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "weight_decay": list(self.weight_decay),
            "groups": list(self.groups),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the learning rates in force then are set again.

        So it may be called before or after the optimizer's own.

        Raises:
            ValueError: it is no state of such a scheduler, or one of other arguments; nothing was loaded.
        """
        where = f"{type(self).__name__}.load_state_dict"
        expected = list(self.state_dict())
        if not isinstance(state_dict, Mapping) or not set(expected) <= set(state_dict):
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"{where}: state_dict expected the keys {expected}, got {got}")
        for name, least in (("last_epoch", 0), ("_step_count", 1)):
            if type(state_dict[name]) is not int or state_dict[name] < least:
                raise ValueError(f"{where}: {name} expected an integer >= {least}, got {state_dict[name]!r}")
        lists = {}
        for name in ("_last_lr", "base_lrs"):
            given = a_list(state_dict[name], len(self.weight_decay), f"{where}: {name}")
            lists[name] = [finite(x, f"{where}: {name}[{i}]") for i, x in enumerate(given)]
        for name in self._fixed():
            same(state_dict[name], self.state_dict()[name], f"{where}: {name}")
        states = self._loaded(state_dict, lists["base_lrs"], where)
        for group, lr in zip(self.optimizer.param_groups, lists["_last_lr"], strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self.base_lrs, self._initial = [*lists["base_lrs"]], lists["base_lrs"]
        self._last_lr = [*lists["_last_lr"]]
        self._states = states

    def _fixed(self) -> tuple[str, ...]:
        """Return the entries of a state that must equal this scheduler's."""
        return ("weight_decay", "groups")

    def _loaded(self, state_dict: Mapping[str, Any], base_lrs: list[float], where: str) -> list[Any]:
        """Return the states of the groups from a checkpoint, checked; the last step that may fail."""
        raise NotImplementedError


def finite(value: Any, where: str) -> float:
    """Return a number >= 0, or a tensor of one (synchronised), as a float."""
    x = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(x, Real) and not isinstance(x, bool):
        try:
            if 0 <= float(x) < math.inf:
                return float(x)
        except OverflowError:  # an integer or a fraction
            pass
    raise ValueError(f"{where} expected a finite number >= 0, got {value!r}")


def a_list(value: Any, length: int, where: str) -> list[Any]:
    """Return a list, checked to have `length` entries."""
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise ValueError(f"{where} expected a list of {length}, got {value!r}")
    return list(value)


def same(value: Any, mine: Any, where: str) -> None:
    """Check that an argument of the scheduler is the same in the checkpoint."""
    if type(value) is not type(mine) or value != mine:
        raise ValueError(f"{where} expected {mine!r}, that of this schedule, got {value!r}")


def largest_weight(p: Tensor) -> float:
    """Return max |w|, of a DTensor over all its shards; 0 without numbers, NaN if one is NaN. Synchronises."""
    if p.is_meta or not (p.is_floating_point() or p.is_complex()):
        return 0.0
    w = p.detach()
    if w.layout != torch.strided:
        w = (w.coalesce() if w.layout == torch.sparse_coo else w).values()
    if w.numel() == 0:
        return 0.0
    norm: Any = torch.linalg.vector_norm(w, math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
