"""One param group of `SGD` or `SVAG` during one step: its options, its momentum buffers, its ways of stepping."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from .. import ops
from .dtensor import is_dtensor
from .exponential_decay import GroupGauge
from .group_step import GroupStep, Scaler
from .options import BUFFER, GAUGE, LR_MULTIPLIERS, number, place

# lr, momentum, dampening, weight_decay, nesterov, maximize, inverse_scale
_Arguments: TypeAlias = tuple[float, float, float, float, bool, bool, float]


class SgdGroupStep(GroupStep):
    """One param group of `SGD` during one step; with `pair`, of `SVAG`."""

    __slots__ = ("_arguments", "is_rescaled")

    op = "sgd_"
    state_keys = (BUFFER,)

    def _read(self, inverse_scale: float, scaler: Scaler | None) -> tuple[str, ...]:
        options, at, pair = self.options, self.at, self.pair
        lr, weight_decay = options["lr"], options["weight_decay"]
        self.is_rescaled = False  # whether a power of two was taken out of the stored weights
        if self.sphere is not None:  # lr was checked, and there is no decay
            lr, weight_decay = number(lr, "lr", at), 0.0
        if scaler is not None or isinstance(lr, Tensor) or isinstance(weight_decay, Tensor):
            may_read = pair is None and options["decay"] == "coupled" and GAUGE not in options
            (lr, weight_decay), there = self._numbers_on_device(
                {"lr": lr, "weight_decay": weight_decay}, scaler, may_read
            )
            self.on_device = (*there, *(scaler or (None, None)))
        self.lr = lr if isinstance(lr, Tensor) else number(lr, "lr", at)
        momentum = number(options["momentum"], "momentum", at)
        self._arguments: _Arguments = (
            1.0 if isinstance(self.lr, Tensor) else self.lr,
            momentum,
            number(options["dampening"], "dampening", at),
            1.0 if isinstance(weight_decay, Tensor) else number(weight_decay, "weight_decay", at),
            bool(options["nesterov"]),
            bool(options["maximize"]),
            inverse_scale if pair is None else pair.first_inverse_scale,
        )
        if options["decay"] != "coupled" or GAUGE in options:
            self.gauge = GroupGauge(options, at, None if pair is None else pair.grads, self.state, self._arguments)
        gauge = None if self.gauge is None else self.gauge.step
        if options.get(LR_MULTIPLIERS) is not None and (gauge is not None or options["decay"] == "exponential"):
            raise ValueError(
                f'{place(at)}: lr_multipliers expected None with decay="exponential", and in the step that leaves '
                "it, as all parameters of a group share one gauge; give each multiplier a group"
            )
        return self.state_keys if (momentum != 0 if gauge is None else gauge.has_buffer) else ()

    def _hyper(self) -> ops.Hyper:
        gauge, pair, kept = None if self.gauge is None else self.gauge.step, self.pair, self.plan.hypers
        arguments, norm = self._arguments, None if self.sphere is None else self.sphere.norm
        is_plain = pair is None and gauge is None and self.on_device is None and self.precision is None
        if is_plain and (last := kept.get(self.index)) is not None and last[0] == (arguments, norm):
            return last[1]
        lr, momentum, dampening, weight_decay, nesterov, maximize, inverse_scale = arguments
        if is_plain:
            hyper = ops.Hyper(
                lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
                maximize=maximize, inverse_scale=inverse_scale, keeps_norm=norm is not None, by_row=norm == "keep_rows",
            )  # fmt: skip
            kept[self.index] = ((arguments, norm), hyper)
            return hyper
        state_dtype, rounding, _ = (None, None, 0) if self.precision is None else self.precision.code()
        return ops.Hyper(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, inverse_scale=inverse_scale,
            second_inverse_scale=1.0 if pair is None else pair.second_inverse_scale, l=1.0 if pair is None else pair.l,
            gauge=gauge, on_device=None if pair is not None else self.on_device, rounding=rounding,
            state_dtype=state_dtype, keeps_norm=norm is not None, by_row=norm == "keep_rows",
        )  # fmt: skip

    def _new_entry(self, p: Tensor, key: str) -> Tensor:
        dtype = p.dtype if self.precision is None else self.precision.buffer_dtype(p)
        new = torch.zeros_like if is_dtensor(p) else torch.empty_like
        return new(p, dtype=dtype, requires_grad=False)

    def _unwritten(self, missing: dict[str, list[int]]) -> list[int]:
        return missing.get(BUFFER, [])

    def step_by_torch(self, which: list[int], grads: list[Tensor], lr: Any, sparse: bool) -> None:
        """Step some parameters, by position, with these gradients and this learning rate by torch's own loop."""
        options, params = self.options, [self.params[i] for i in which]
        buffers = [self.entries[BUFFER][i] for i in which]
        torch_sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=sparse,
            foreach=False,
            fused=bool(options["fused"]) and sparse,  # raises torch's error
            weight_decay=options["weight_decay"],
            momentum=options["momentum"],
            lr=lr,
            dampening=options["dampening"],
            nesterov=options["nesterov"],
            maximize=options["maximize"],
        )
        if options["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p][BUFFER] = buffer

    def step_by_reference(self, i: int, grad: Tensor, stats: ops.Stats, more: dict[str, Any]) -> Tensor | None:
        """Step parameter i by `reference`, which has the options that torch's loop lacks; return the sums."""
        from ..reference import sgd_

        p, options, buffers = self.params[i], self.options, [self.entries[BUFFER][i]]
        sums = sgd_(
            [p],
            [grad],
            buffers,
            lr=self.lr,
            momentum=float(options["momentum"]),
            dampening=float(options["dampening"]),
            weight_decay=float(options["weight_decay"]),
            nesterov=bool(options["nesterov"]),
            maximize=bool(options["maximize"]),
            stats=stats,
            gauge=None if self.gauge is None else self.gauge.step,
            **more,
        )
        if buffers[0] is not None:
            self.state[p][BUFFER] = buffers[0]
        return sums
