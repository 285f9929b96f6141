"""One param group during one step: what runs on the kernel, and what falls back to torch."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from .. import ops
from ..tracing import in_dispatch_mode
from .dtensor import check_summable, is_dtensor, own_rows, shard
from .exponential_decay import GroupGauge
from .low_precision import group_precision
from .options import BUFFER, GAUGE, LR_MULTIPLIERS, MASTER, number, place

_log = logging.getLogger("normkern")


class Pair(NamedTuple):
    """The gradients of one group in a step from two gradients, such as SVAG's."""

    held: list[Any]  # the first ones; None: no pair, the only gradient is in `grads`
    grads: list[Any]
    has_own_grads: bool  # `grads` are the parameters' own, each of a pair
    l: float
    first_inverse_scale: float
    second_inverse_scale: float


# lr, momentum, dampening, weight_decay, nesterov, maximize, inverse_scale
_Arguments: TypeAlias = tuple[float, float, float, float, bool, bool, float]


class GroupStep:
    """One param group during one step: what runs on the kernel, what falls back to torch, which buffers are new."""

    __slots__ = (
        "buffers",
        "code",
        "created",
        "gauge",
        "grads",
        "has_entries",
        "index",
        "is_whole",
        "left_to_torch",
        "lr",
        "masters",
        "multipliers",
        "on_device",
        "options",
        "pair",
        "params",
        "plan",
        "precision",
        "row",
        "slot",
        "state",
        "stats",
        "torch_sums",
        "wrappers",
    )  # fmt: skip

    def __init__(
        self,
        plan: ops.Pass,
        state: Any,
        index: int,
        options: dict[str, Any],
        inverse_scale: float,
        pair: Pair | None = None,
        scaler: tuple[Tensor | None, Tensor] | None = None,
    ) -> None:
        """Read and check the group; write nothing. `scaler`: grad_scale and found_inf, which the kernel will read."""
        self.plan, self.state, self.index, self.options, self.pair = plan, state, index, options, pair
        params = options["params"]
        self.params = params = params if type(params) is list else list(params)
        lr, weight_decay, self.stats = options["lr"], options["weight_decay"], options["stats"]
        self.on_device: ops.OnDevice | None = None
        if scaler is not None or isinstance(lr, Tensor) or isinstance(weight_decay, Tensor):
            lr, weight_decay = self._numbers_on_device(lr, weight_decay, scaler)
        self.lr: float | Tensor = lr if isinstance(lr, Tensor) else number(lr, "lr", index)
        self.code = 0 if self.stats is None else ops.stats_code(self.stats, place(index))
        momentum = number(options["momentum"], "momentum", index)
        self.slot, self.row = plan.slots, plan.parameters
        multipliers = options.get(LR_MULTIPLIERS)
        self.multipliers: ops.LrMultipliers | None = None
        if multipliers is not None:
            self.multipliers = ops.read_lr_multipliers(multipliers, len(params), place(index))
        self.created: list[tuple[Tensor, str, Tensor]] = []  # parameter, key of its state, new entry
        self.left_to_torch: list[int] = []
        self.has_entries = False  # whether `grads` and `buffers` are read
        self.torch_sums: list[tuple[int, Tensor]] = []
        self.wrappers: list[Tensor] = []  # DTensors whose local part the kernel writes
        self.is_whole = False  # the kernel takes every parameter, all of them plain tensors

        arguments = (
            1.0 if isinstance(self.lr, Tensor) else self.lr,
            momentum,
            number(options["dampening"], "dampening", index),
            1.0 if isinstance(weight_decay, Tensor) else number(weight_decay, "weight_decay", index),
            bool(options["nesterov"]),
            bool(options["maximize"]),
            inverse_scale if pair is None else pair.first_inverse_scale,
        )
        self.gauge = None
        if options["decay"] != "coupled" or GAUGE in options:
            self.gauge = GroupGauge(options, index, None if pair is None else pair.grads, state, arguments)
        gauge = None if self.gauge is None else self.gauge.step
        if multipliers is not None and (gauge is not None or options["decay"] == "exponential"):
            raise ValueError(
                f'{place(index)}: lr_multipliers expected None with decay="exponential", and in the step that leaves '
                "it, as all parameters of a group share one gauge; give each multiplier a group"
            )
        self.precision = precision = group_precision(options, index, self.row)
        all_to_torch = options["differentiable"] or in_dispatch_mode()
        state = state if (momentum != 0 if gauge is None else gauge.has_buffer) else None
        if (
            not all_to_torch
            and (pair is None or pair.has_own_grads)
            and (precision is None or not precision.has_masters)
            and plan.add_whole(
                "sgd_", params, state, (BUFFER,), self._hyper(arguments), self.code, index, self.multipliers, self.row,
                None if pair is None else pair.held,
            )
        ):  # fmt: skip
            self.is_whole = True
            return
        self._add_entries(state, arguments, all_to_torch)

    def _add_entries(self, state: Any, arguments: _Arguments, all_to_torch: bool) -> None:
        """Add the group parameter by parameter, where it cannot go as a whole. `state`: None without momentum."""
        plan, params, pair, precision = self.plan, self.params, self.pair, self.precision
        self.has_entries = True
        self.grads, (self.buffers,), missing = ops.gather(params, state, (BUFFER,))
        if pair is not None and not pair.has_own_grads:
            self.grads = pair.grads
            pairs = enumerate(zip(pair.grads, self.buffers, strict=True))
            missing = [i for i, (g, b) in pairs if g is not None and b is None] if state is not None else []
        if self.gauge is not None:
            self.gauge.check_complete(self.grads, missing)
        grads = [None] * len(params) if all_to_torch else self.grads
        for i in missing:
            p, g = params[i], grads[i]
            if g is not None and ops.kernels_take((p, g)) and p.dtype == g.dtype:
                dtype = p.dtype if precision is None else precision.buffer_dtype(p)
                self.buffers[i] = torch.empty_like(p, dtype=dtype, requires_grad=False)
                self.created.append((p, BUFFER, self.buffers[i]))
        self.masters: list[Any] | None = None
        if precision is not None:
            self.masters, new = precision.masters(params, self.grads, self.state)
            if self.masters is not None:
                self.created += [(params[i], MASTER, self.masters[i]) for i in new]
            converted = precision.convert(params, self.grads, self.buffers)
            self.created += [(params[i], BUFFER, self.buffers[i]) for i in converted]
        refused = plan.add(
            "sgd_", params, grads, [self.buffers], missing, self._hyper(arguments), self.code, self.index,
            held=None if pair is None else pair.held, masters=self.masters, lr_multipliers=self.multipliers,
            first_parameter=self.row,
        )  # fmt: skip
        if all_to_torch:
            self.left_to_torch = [i for i, g in enumerate(self.grads) if g is not None]
            for i in self.left_to_torch:
                self._check_storage(i)
        elif refused:
            self._find_another_way(refused, set(missing), arguments)
        if pair is not None:
            self._check_held(pair)

    def _check_storage(self, i: int) -> None:
        """Check that what torch's loop would read of parameter i is there."""
        lists = {
            "params": self.params, "grads": self.grads, BUFFER: self.buffers, MASTER: self.masters,
            "held": None if self.pair is None else self.pair.held,
        }  # fmt: skip
        for name, tensors in lists.items():
            if tensors is not None:
                ops.check_storage(tensors[i], f"{place(self.index)}: {name}[{i}]")

    def _check_held(self, pair: Pair) -> None:
        """Check held gradients that fall back to torch, as the kernel checks those that it takes."""
        for i in self.left_to_torch:
            held, p = pair.held[i], self.params[i]
            if held is None:
                continue
            if held.shape != p.shape:
                raise ValueError(
                    f"{place(self.index)}: held[{i}] has shape {tuple(held.shape)} but params[{i}] has shape "
                    f"{tuple(p.shape)}"
                )
            if _share_memory(held, pair.grads[i]):
                raise RuntimeError(ops.shared_pair(self.index, i))

    def _numbers_on_device(self, lr: Any, weight_decay: Any, scaler: tuple[Tensor | None, Tensor] | None) -> Any:
        """Return lr and weight_decay: as tensors where the kernel will read them, else as numbers."""
        options, there = self.options, ops.device_index(self.params[0]) if self.params else None
        lr_there = decay_there = None
        if self.pair is None and options["decay"] == "coupled" and GAUGE not in options:
            lr_there, decay_there = (
                x if ops.device_index(x) == there else None for x in map(ops.if_on_device, (lr, weight_decay))
            )
        grad_scale, found_inf = (None, None) if scaler is None else scaler
        self.on_device = (lr_there, decay_there, grad_scale, found_inf)
        return tuple(
            number(x, name, self.index) if at is None else at.detach()
            for x, name, at in ((lr, "lr", lr_there), (weight_decay, "weight_decay", decay_there))
        )

    def _hyper(self, arguments: _Arguments) -> ops.Hyper:
        """Return the group's numbers for the kernel; the last step's object where they are the same."""
        gauge, pair, kept = None if self.gauge is None else self.gauge.step, self.pair, self.plan.hypers
        is_plain = pair is None and gauge is None and self.on_device is None and self.precision is None
        if is_plain and (last := kept.get(self.index)) is not None and last[0] == arguments:
            return last[1]
        lr, momentum, dampening, weight_decay, nesterov, maximize, inverse_scale = arguments
        if is_plain:
            hyper = ops.Hyper(
                lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
                maximize=maximize, inverse_scale=inverse_scale,
            )  # fmt: skip
            kept[self.index] = (arguments, hyper)
            return hyper
        state_dtype, rounding, _ = (None, None, 0) if self.precision is None else self.precision.code()
        return ops.Hyper(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, inverse_scale=inverse_scale,
            second_inverse_scale=1.0 if pair is None else pair.second_inverse_scale, l=1.0 if pair is None else pair.l,
            gauge=gauge, on_device=None if pair is not None else self.on_device, rounding=rounding,
            state_dtype=state_dtype,
        )  # fmt: skip

    def _find_another_way(self, refused: list[int], missing: set[int], arguments: _Arguments) -> None:
        """Step a DTensor through its local shard, and leave what the kernel cannot take to torch's loop."""
        where = place(self.index)
        for i in refused:
            p = self.params[i]
            self._check_storage(i)
            if not (p.is_floating_point() or p.is_complex()):
                raise RuntimeError(
                    f"{where}: params[{i}] is {ops.describe(p)}; expected a floating point or complex dtype"
                )
            if self.options["fused"]:
                _device_dtype_check_for_fused(p)
            if self.stats is not None and is_dtensor(p):
                check_summable(p, f"{where}: params[{i}]")
            if not (is_dtensor(p) and self._add_shard(i, i in missing, arguments)):
                _log.debug("%s: params[%d], %s, is stepped by torch's own loop", where, i, ops.describe(p))
                if p.is_cuda and not ops.cuda_architectures():
                    _warn_of_gpu()
                self.left_to_torch.append(i)

    def _add_shard(self, i: int, first: bool, arguments: _Arguments) -> bool:
        """Add the local part of DTensor i to the pass; return False if the kernel cannot take it either."""
        p, buffer = self.params[i], self.buffers[i]
        if first:
            dtype = p.dtype if self.precision is None else self.precision.buffer_dtype(p)
            buffer = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        held = None if self.pair is None else self.pair.held[i]
        master = None if self.masters is None else self.masters[i]
        with torch.no_grad():
            parts = (p, self.grads[i], buffer, held, master)
            w, g, v, h, m = ([None if x is None else shard(x, like=p)] for x in parts)
        refused = self.plan.add(
            "sgd_", w, g, None if buffer is None else [v], [0] if first else None, self._hyper(arguments), self.code,
            self.index, slots=[self.first_slot(i)], held=None if self.pair is None else h,
            masters=None if self.masters is None else m, row=self.row + i, first_parameter=self.row + i,
            lr_multipliers=None if self.multipliers is None else self.multipliers.only(i),
        )  # fmt: skip
        if refused:
            return False
        if first:
            self.created.append((p, BUFFER, buffer))
        self.wrappers += [x for x in (p, buffer, master) if x is not None]
        return True

    def measured(self, offsets: Iterator[int]) -> list[tuple[Any, int, bool]]:
        """Return for each parameter where its slots begin, read from `offsets`, and whether it has one per row."""
        return [(p, next(offsets), self.stats == "row") for p in self.params] if self.stats else []

    def first_slot(self, i: int) -> int:
        """Return where the sums of parameter i begin; for the shard of a DTensor, those of its first own row."""
        if self.stats is None:
            return 0
        slot = self.slot + sum(ops.slot_count(p, self.code) for p in self.params[:i])
        p = self.params[i]
        return slot + own_rows(p).start if self.stats == "row" and p.ndim >= 2 and is_dtensor(p) else slot

    def lr_now(self) -> float | Tensor:
        """Return the learning rate of this step; a copy if it is a tensor, which may change."""
        return self.lr.clone() if isinstance(self.lr, Tensor) else self.lr


@functools.cache
def _warn_of_gpu() -> None:
    """Warn once that the fallback on a GPU is slow."""
    warnings.warn(
        "normkern: this binary was built for CPUs only, and torch's own loop steps parameters on GPUs. To have kernels "
        "for them: `NORMKERN_CUDA=ON pip install --force-reinstall --no-deps .` in normkern's source folder",
        UserWarning,
        stacklevel=2,
    )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two gradients overlap in memory."""
    if a is b:
        return True
    if a.layout != torch.strided or b.layout != torch.strided or a.is_meta or type(a) is not Tensor:
        return False  # torch makes new values for every such gradient
    ends = [
        x.data_ptr() + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
        for x in (a, b)
    ]
    return a.numel() > 0 and b.numel() > 0 and a.data_ptr() < ends[1] and b.data_ptr() < ends[0]
