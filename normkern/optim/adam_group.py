"""One param group of `Adam` or `AdamW` during one step: its options, its state, its ways of stepping."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from .. import ops
from .group_step import GroupStep, Scaler
from .options import EXP_AVG, EXP_AVG_SQ, STEP, At, number, place

#: torch's name of the largest average of squares so far, of which no kernel knows.
_MAX_EXP_AVG_SQ = "max_exp_avg_sq"

# lr, beta1, beta2, eps, weight_decay, decoupled, maximize, inverse_scale
_Arguments: TypeAlias = tuple[float, float, float, float, float, bool, bool, float]


class AdamGroupStep(GroupStep):
    """One param group of `Adam` during one step."""

    __slots__ = ("_arguments",)

    op = "adam_"
    state_keys = (EXP_AVG, EXP_AVG_SQ, STEP)

    def _read(self, inverse_scale: float, scaler: Scaler | None) -> tuple[str, ...]:
        options, at = self.options, self.at
        if not (options["capturable"] or options["fused"]) and self.params and self.params[0].is_cuda:
            self._check_capture()
        beta1, beta2 = check_betas(options["betas"], at)
        lr, weight_decay = options["lr"], options["weight_decay"]
        if self.sphere is not None:  # lr was checked, and there is no decay
            lr, weight_decay = number(lr, "lr", at), 0.0
        if scaler is not None or any(isinstance(x, Tensor) for x in (lr, weight_decay, beta1, beta2)):
            values, there = self._numbers_on_device({"lr": lr, "weight_decay": weight_decay}, scaler)
            # The bias correction follows from the betas where the counts of steps are.
            betas, betas_there = self._numbers_on_device(
                {"betas[0]": beta1, "betas[1]": beta2}, scaler, options["capturable"] or options["fused"]
            )
            self.on_device = (*there, *(scaler or (None, None)), *betas_there)
            lr, weight_decay, beta1, beta2 = *values, *betas
        self.lr = lr if isinstance(lr, Tensor) else number(lr, "lr", at)
        numbers = {"lr": self.lr, "betas[0]": beta1, "betas[1]": beta2, "eps": options["eps"]}
        numbers["weight_decay"] = weight_decay
        floats = {name: 0.5 if isinstance(x, Tensor) else number(x, name, at) for name, x in numbers.items()}
        for name in ("betas[0]", "betas[1]"):
            if not 0 <= floats[name] < 1:
                raise ValueError(
                    f"{place(at)}: {name} expected a number of at least 0 and below 1, got {floats[name]!r}"
                )
        self._arguments: _Arguments = (
            floats["lr"], floats["betas[0]"], floats["betas[1]"], floats["eps"], floats["weight_decay"],
            bool(options["decoupled_weight_decay"]), bool(options["maximize"]), inverse_scale,
        )  # fmt: skip
        return self.state_keys

    def _check_capture(self) -> None:
        """Raise if a graph is captured, which would keep the bias correction of this step for ever."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{place(self.at)}: expected capturable=True or fused=True in a CUDA graph, whose replays count steps "
                "on the device, got neither"
            )

    def _hyper(self) -> ops.Hyper:
        kept, norm = self.plan.hypers, None if self.sphere is None else self.sphere.norm
        arguments = (*self._arguments, norm)
        is_plain = self.on_device is None and self.precision is None
        if is_plain and (last := kept.get(self.index)) is not None and last[0] == arguments:
            return last[1]
        lr, beta1, beta2, eps, weight_decay, decoupled, maximize, inverse_scale, _ = arguments
        state_dtype, rounding, _ = (None, None, 0) if self.precision is None else self.precision.code()
        hyper = ops.Hyper(
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled,
            maximize=maximize, inverse_scale=inverse_scale, on_device=self.on_device, rounding=rounding,
            state_dtype=state_dtype, keeps_norm=norm is not None, by_row=norm == "keep_rows",
        )  # fmt: skip
        if is_plain:
            kept[self.index] = (arguments, hyper)
        return hyper

    def _is_left_to_torch(self) -> bool:
        return super()._is_left_to_torch() or bool(self.options["amsgrad"])

    def _new_entry(self, p: Tensor, key: str) -> Tensor:
        if key == STEP:
            fused = self.options["fused"]
            # As in torch.
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32
            if fused or self.options["capturable"]:
                return torch.zeros((), dtype=dtype, device=p.device)
            return torch.tensor(0.0, dtype=dtype, device="cpu")
        dtype = p.dtype if self.precision is None else self.precision.buffer_dtype(p)
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)

    def _check_for_torch(self, i: int) -> None:
        super()._check_for_torch(i)
        if self.grads[i].layout != torch.strided:
            raise RuntimeError(
                f"{place(self.at)}: Adam does not support sparse gradients, please consider SparseAdam instead; "
                f"params[{i}] has {ops.describe(self.grads[i])}"
            )
        p = self.params[i]
        if self.grads[i].dtype != p.dtype and self.precision is None:
            raise RuntimeError(
                f"{place(self.at)}: grads[{i}] is {ops.describe(self.grads[i])} but params[{i}] is {ops.describe(p)}; "
                "expected one dtype, as torch's Adam does, or master_weights=True"
            )

    def step_by_torch(self, which: list[int], grads: list[Tensor], lr: Any, sparse: bool) -> None:
        """Step some parameters, by position, with these gradients and this learning rate by torch's own loop."""
        options, params = self.options, [self.params[i] for i in which]
        keys = (*self.state_keys, *((_MAX_EXP_AVG_SQ,) if options["amsgrad"] else ()))
        lists = {key: [self._entry(p, key) for p in params] for key in keys}
        for step in lists[STEP]:
            if options["differentiable"] and step.requires_grad:
                raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
        beta1, beta2 = options["betas"]
        torch_adam(
            params,
            grads,
            lists[EXP_AVG],
            lists[EXP_AVG_SQ],
            lists.get(_MAX_EXP_AVG_SQ, []),
            lists[STEP],
            foreach=False,
            capturable=options["capturable"] and all(p.device.type != "cpu" for p in params),
            differentiable=options["differentiable"],
            fused=False,
            has_complex=any(p.is_complex() for p in params),
            amsgrad=options["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            maximize=options["maximize"],
            decoupled_weight_decay=options["decoupled_weight_decay"],
        )

    def _entry(self, p: Tensor, key: str) -> Tensor:
        """Return an entry of a parameter's state, made if there is none."""
        entries: dict[str, Tensor | None] = self.state[p]
        entry = entries.get(key)
        if entry is None:
            entries[key] = entry = self._new_entry(p, key)
        return entry

    def step_by_reference(self, i: int, grad: Tensor, stats: ops.Stats, more: dict[str, Any]) -> Tensor | None:
        """Step parameter i by `reference`, which has the options that torch's loop lacks; return the sums."""
        from ..reference import adamw_

        p, options = self.params[i], self.options
        state: list[Tensor | None] = [self._entry(p, key) for key in self.state_keys]
        m, v, step = ([x] for x in state)
        return adamw_(
            [p],
            [grad],
            m,
            v,
            step,
            lr=self.lr,
            beta1=float(options["betas"][0]),
            beta2=float(options["betas"][1]),
            eps=float(options["eps"]),
            weight_decay=float(options["weight_decay"]),
            decoupled=bool(options["decoupled_weight_decay"]),
            maximize=bool(options["maximize"]),
            stats=stats,
            **more,
        )


class AdamWGroupStep(AdamGroupStep):
    """One param group of `AdamW` during one step."""

    __slots__ = ()

    op = "adamw_"


def check_betas(betas: Any, where: str | At) -> tuple[Any, Any]:
    """Return both betas of a param group.

    Raises:
        ValueError: they are no pair.
    """
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise ValueError(f"{place(where)}: betas expected a pair of numbers, got {betas!r}") from None
    return beta1, beta2
