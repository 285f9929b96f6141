"""A step of Adam or AdamW on a list of tensors: `adamw_` and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_traced
from ._binary import Hyper, Pass, describe, kernel_takes
from .checks import as_float, inverses, why_refused
from .launch import run_pass
from .step_arguments import (
    check_masters,
    check_norm_arguments,
    check_on_cpu,
    read_lr_multipliers,
    split_numbers,
    with_new_masters,
)
from .types import Norm, OnDevice, Rounding, Stats, precision, stats_code


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: list[Tensor | None],
    exp_avg_sqs: list[Tensor | None],
    steps: list[Tensor | None],
    *,
    lr: float | Tensor,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Tensor = 1e-2,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: float | Tensor = 1.0,
    stats: Stats = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
    lr_multipliers: Sequence[float] | Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    rounding: Rounding | None = None,
    masters: list[Tensor | None] | None = None,
    norm: Norm = None,
    radii: Sequence[Tensor | None] | None = None,
) -> Tensor | None:
    r"""Take one step of AdamW on a list of tensors, in one pass over memory; of Adam, if decay is not decoupled.

    .. math::
        t' = t + 1, \quad d = \pm g/\mathrm{grad\_scale}, \quad m' = \beta_1 m + (1-\beta_1) d, \quad
        v' = \beta_2 v + (1-\beta_2) d^2

    .. math::
        w' = w - \eta\lambda w - \frac{\eta}{1-\beta_1^{t'}} \,
        \frac{m'}{\sqrt{v'}/\sqrt{1-\beta_2^{t'}} + \epsilon}

    Without `decoupled`, :math:`d = \pm g/\mathrm{grad\_scale} + \lambda w` and :math:`\eta\lambda w` is left out.
    Arithmetic in float32 (float64 for float64 tensors), one rounding at the store; numbers of the call, such as
    :math:`\eta\lambda` and :math:`\eta/(1-\beta_1^t)`, are computed in float64 before.

    Args:
        params: tensors of float64, float32, bfloat16 or float16 on a CPU or a CUDA device, any shapes and strides;
            updated in place. With `stats` all are on one device.
        grads: same shapes, dtypes and devices; None skips the parameter. Read only.
        exp_avgs, exp_avg_sqs: m and v, one of each per parameter, updated in place; None entries are created as zeros
            and put into the list. Their dtype is the parameter's or, unless it is float64, float32 or bfloat16.
        steps: t of each parameter, a tensor of one float32 or float64 number, on the CPU or beside the parameter;
            updated in place. None entries are created as zeros on the CPU, or with `found_inf` beside the parameter.
        lr, beta1, beta2, eps, weight_decay, decoupled, maximize: as in `torch.optim.AdamW`, whose
            ``decoupled_weight_decay`` is `decoupled`. lr and weight_decay, and both betas if all `steps` are there too,
            may be CUDA tensors of one float32 or float64 number beside the parameters: read when the kernel runs.
        grad_scale: what the gradients were multiplied with; a CUDA tensor of one float32 number is read then too.
        stats, clip_coef, lr_multipliers, rounding, masters: as in `sgd_`.
        found_inf: of a GradScaler, a CUDA tensor of one float32 number: if it is not 0 when the kernel runs nothing is
            written and the sums are NaN. `steps` must lie beside the parameters.
        state_dtype: the dtype of new entries of `exp_avgs` and `exp_avg_sqs`; None: that of their parameters.
        norm, radii: as in `sgd_`, with :math:`u = m'/(\sqrt{v'}/\sqrt{1-\beta_2^{t'}} + \epsilon)`, zero where m' is.
            Weight decay is not applied.

    Returns:
        None, or with `stats` a float64 tensor (slots, len(SUMS)) on their device: `SUMS` of every slot, parameter after
        parameter; NaN for a skipped one. Nothing is synchronised.

    Raises:
        TypeError: an entry is not a plain tensor of these dtypes on a device that the binary has kernels for; dtypes or
            devices differ.
        ValueError: lengths or shapes differ, a tensor overlaps itself or part of another in memory, `lr_multipliers` or
            `clip_coef` are something else, a scale is 0; with `norm` as in `sgd_`. Nothing is written.
        RuntimeError: the device refuses the kernel.

    Reference: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101; `torch.optim.AdamW`.

    >>> w, g = torch.tensor([3.0, 4.0]), torch.tensor([1.0, -2.0])
    >>> m, v, t = [None], [None], [None]
    >>> adamw_([w], [g], m, v, t, lr=0.1, weight_decay=0.5, stats="tensor")
    tensor([[25.0000,  5.0000, -5.0000,  0.0725, -1.1500]], dtype=torch.float64)
    >>> w, m, t
    (tensor([2.7500, 3.9000]), [tensor([ 0.1000, -0.2000])], [tensor(1.)])
    """
    if is_traced():
        return _traced_adamw_(
            params, grads, (exp_avgs, exp_avg_sqs, steps), lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, decoupled=decoupled, maximize=maximize, grad_scale=grad_scale, stats=stats,
            found_inf=found_inf, clip_coef=clip_coef, lr_multipliers=lr_multipliers,
            stored=(state_dtype, rounding, masters, norm),
        )  # fmt: skip
    params, grads = list(params), list(grads)
    lists: Any = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "masters": masters}
    for name, given in lists.items():
        if not (isinstance(given, list) or (given is None and name == "masters")):
            raise TypeError(f"adamw_: {name} expected a list, into which new entries are put, got {describe(given)}")
    state = [list(given) for given in (exp_avgs, exp_avg_sqs, steps)]
    _fill(params, grads, state, state_dtype, on_device=found_inf is not None)
    copies = None if masters is None else with_new_masters(params, grads, masters)
    step = Pass()
    step.begin()
    code = stats_code(stats, "adamw_")
    on_device: OnDevice | None = None
    numbers: Any = {"lr": lr, "weight_decay": weight_decay, "grad_scale": grad_scale, "beta1": beta1, "beta2": beta2}
    if norm is not None:
        numbers |= {"lr": as_float("adamw_", "lr", lr), "weight_decay": 0.0}
    if found_inf is not None or any(isinstance(x, Tensor) for x in numbers.values()):
        floats, there = split_numbers("adamw_", numbers)
        numbers = dict(zip(numbers, floats, strict=True))
        on_device = (*there[:3], found_inf, *there[3:])
    inverse_scale, _ = inverses("adamw_", numbers.pop("grad_scale"), None)
    multipliers = None if lr_multipliers is None else read_lr_multipliers(lr_multipliers, len(params), "adamw_")
    check_norm_arguments("adamw_", norm, radii, numbers["lr"], params, grads, multipliers)
    _, seeded, first_parameter = precision(None, rounding, 0 if rounding is None else rounding.first)
    hyper = Hyper(
        **numbers, eps=eps, decoupled=decoupled, maximize=maximize, inverse_scale=inverse_scale, on_device=on_device,
        rounding=seeded, keeps_norm=norm is not None, by_row=norm == "keep_rows",
    )  # fmt: skip
    refused = step.add(
        "adamw_", params, grads, state[:2], None, hyper, code, masters=copies, lr_multipliers=multipliers,
        first_parameter=first_parameter, counts=state[2], radii=None if radii is None else list(radii),
    )  # fmt: skip
    if refused:
        i = refused[0]
        if norm is not None:
            check_on_cpu("adamw_", i, params)
        if copies is not None:
            check_masters("adamw_", i, params, copies)
        _check_step(i, params, grads, state[2])
        named = {"params": params, "grads": grads, "exp_avgs": state[0], "exp_avg_sqs": state[1]}
        raise TypeError(why_refused("adamw_", i, named))
    if clip_coef is not None:
        step.clip([clip_coef])
    table = run_pass(step, measured=stats is not None, may_skip=found_inf is not None)
    for given, made in zip((exp_avgs, exp_avg_sqs, steps), state, strict=True):
        given[:] = made
    if masters is not None and copies is not None:
        masters[:] = copies
    return table


def _fill(
    params: list[Any], grads: list[Any], state: list[list[Any]], state_dtype: torch.dtype | None, on_device: bool
) -> None:
    """Put zeros where a parameter that has a gradient has no state yet."""
    for entries, is_count in zip(state, (False, False, True), strict=True):
        for i, (p, g, x) in enumerate(zip(params, grads, entries, strict=False)):
            if x is not None or g is None or not isinstance(p, Tensor):
                continue
            if is_count:
                entries[i] = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
            else:
                entries[i] = torch.zeros_like(p, dtype=state_dtype or p.dtype, requires_grad=False)


def _check_step(i: int, params: list[Any], grads: list[Any], steps: list[Any]) -> None:
    """Raise TypeError if it is the count of steps i that no kernel takes."""
    p, t = params[i], steps[i]
    if not (kernel_takes(p) and kernel_takes(grads[i])):
        return
    fits = kernel_takes(t) and t.numel() == 1 and t.dtype in (torch.float32, torch.float64)
    if not fits or (t.device.type != "cpu" and t.device != p.device):
        shape = f" of shape {tuple(t.shape)}" if isinstance(t, Tensor) else ""
        raise TypeError(
            f"adamw_: steps[{i}] expected one float32 or float64 number on the CPU or beside params[{i}], "
            f"{describe(p)}, got {describe(t)}{shape}"
        )


def _traced_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: tuple[list[Tensor | None], ...],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float | Tensor,
    grad_scale: float | Tensor,
    stats: Stats,
    found_inf: Tensor | None,
    clip_coef: Tensor | None,
    lr_multipliers: Sequence[float] | Tensor | None,
    stored: tuple[Any, ...],
    **others: Any,
) -> Tensor | None:
    """Run `adamw_` through ``torch.ops``. `stored`: state_dtype, rounding, masters and norm."""
    for name, given in zip(("state_dtype", "rounding", "masters", "norm"), stored, strict=True):
        if given is not None:
            raise NotImplementedError(
                f"adamw_: {name} expected None under torch.compile and dispatch modes, got {describe(given)}"
            )
    if lr_multipliers is not None and not isinstance(lr_multipliers, Tensor):
        lr_multipliers = torch.tensor(list(lr_multipliers), dtype=torch.float64)
    params, grads = list(params), list(grads)
    full = [list(given) for given in state]
    _fill(params, params, full, None, on_device=found_inf is not None)
    for given, made in zip(state, full, strict=True):
        for i, g in enumerate(grads):
            if g is not None:
                given[i] = made[i]
    numbers: Any = {"lr": lr, "weight_decay": weight_decay, "grad_scale": grad_scale, "beta1": beta1, "beta2": beta2}
    tensors = {"found_inf": found_inf, "clip_coef": clip_coef, "lr_multipliers": lr_multipliers}
    op = torch.ops.normkern.adamw_.default
    if any(isinstance(x, Tensor) for x in (*numbers.values(), *tensors.values())):
        op = torch.ops.normkern.adamw_.tensor
        numbers = {k: x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for k, x in numbers.items()}
        numbers |= tensors
    table: Tensor = op(params, grads, *full, stats=stats, **numbers, **others)
    return None if stats is None else table
