"""A step of SGD or SVAG on a list of tensors: `sgd_` and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_traced
from ._binary import GaugeStep, Hyper, Pass, describe
from .checks import as_float, check_l, inverses, why_refused
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


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float | Tensor = 1.0,
    stats: Stats = None,
    held: Sequence[Tensor | None] | None = None,
    l: float = 1.0,
    held_scale: float = 1.0,
    gauge: GaugeStep | None = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
    lr_multipliers: Sequence[float] | Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    rounding: Rounding | None = None,
    masters: list[Tensor | None] | None = None,
    norm: Norm = None,
    radii: Sequence[Tensor | None] | None = None,
) -> Tensor | None:
    r"""Take one step of SGD on a list of tensors, in one pass over memory; of SVAG, if there are pairs of gradients.

    .. math::
        d = \pm g/\mathrm{grad\_scale} + \lambda w, \quad v' = \mu v + (1-\tau) d, \quad w' = w - \eta v'

    with :math:`v' = d` where there is no buffer yet, and :math:`w' = w - \eta (d + \mu v')` for nesterov. Arithmetic in
    float32 (float64 for float64 tensors), one rounding at the store. For a pair, :math:`g_1` in
    `held` and :math:`g_2` in `grads`, each divided by its scale, the gradient is (l = 1: :math:`g_1`, to the bit)

    .. math::
        g = \tfrac12 (g_1 + g_2) + \tfrac12 \sqrt{2l-1}\,(g_1 - g_2)

    Args:
        params: tensors of float64, float32, bfloat16 or float16 on a CPU or a CUDA device, any shapes and strides;
            updated in place. With `stats` all are on one device.
        grads: same shapes, dtypes and devices; None skips the parameter. Read only.
        momentum_buffers: one per parameter, updated in place; None entries are created and put into the list.
            Needed if `momentum` is not 0. Their dtype is the parameter's or, unless it is float64, float32 or bfloat16.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`. lr and weight_decay may be
            CUDA tensors of one float32 or float64 number beside the parameters: read when the kernel runs.
        grad_scale: what the gradients were multiplied with; a CUDA tensor of one float32 number is read then too, but
            for pairs.
        stats: "tensor" sums over each parameter, "row" over each index of its first dimension (ndim >= 2).
        held: the first gradients of pairs; None entries are no pairs. Pairs are always measured: None is "tensor" then.
        l: SVAG's, at least 1/2. The learning rate is taken as it is.
        held_scale: what the held gradients were multiplied with.
        gauge: `gauge_step` of the same lr, momentum, dampening, weight_decay and nesterov. Then `params` and
            `momentum_buffers` are what it says they are, before and after the step; the sums are of the true weights.
        found_inf: of a GradScaler, a CUDA tensor of one float32 number: if it is not 0 when the kernel runs nothing is
            written, the sums are NaN and new momentum buffers zeros.
        clip_coef: one float64 number on the device of all tensors, read when the kernel runs: the second of what
            `clip_coef` returns. The unscaled gradient is multiplied with it; sums are of the gradient before that.
        lr_multipliers: one finite number of at least 0 for each parameter, which lr is multiplied with. A CUDA tensor
            is read when the kernel runs, and its numbers are not checked.
        state_dtype: the dtype of new momentum buffers; None: that of their parameters.
        rounding: bfloat16 parameters are rounded at random: up with the probability that is the position between the
            two neighbours, by a number that depends on seed, step, the parameter's index and the coordinate's in
            row-major order. NaN and infinities stay, numbers beyond the largest one are rounded to nearest.
        masters: float32 copies of parameters of 16 bits, updated in place: the step updates the copy, and the parameter
            becomes the rounded copy. Entries of a parameter that differ from the rounded copy replace it: the caller
            has written them. None entries are created for parameters of 16 bits, and put into the list.
        norm: "keep" keeps the norm of each parameter, "keep_rows" that of each index of its first dimension, in two
            passes: :math:`w' = R\,N(w - \eta R\,N(u))`, :math:`N(x) = x/|x|`, u the step above without lr and weight
            decay, which is not applied. CPU only; lr is read by the host; not with `held` or `gauge`.
        radii: R of each parameter, float64 on the CPU: one number, or one for each row. None, or None entries: |w|.

    Returns:
        None, or with `stats` a float64 tensor (slots, len(SUMS)) on their device: `SUMS` of every slot, parameter after
        parameter; NaN for a skipped one. With pairs `PAIR_SUMS` follow in the same rows, after unscaling. Nothing is
        synchronised.

    Raises:
        TypeError: an entry is not a plain tensor of these dtypes on a device that the binary has kernels for; dtypes or
            devices differ.
        ValueError: lengths or shapes differ, a tensor overlaps itself or part of another in memory, `lr_multipliers` or
            `clip_coef` are something else, a scale is 0. With `norm`: lr, times a multiplier, is not in [0, 1), a
            parameter or row without a radius is zero, rows of a vector are wanted. Nothing is written.
        RuntimeError: the device refuses the kernel.

    Reference: the update of `torch.optim.SGD`; sums as in Li and Arora, arXiv 1910.07454, section 2; pairs as in Li,
    Malladi and Arora, arXiv 2102.12470, section 4.

    >>> w, g = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    >>> sgd_([w], [g], lr=0.1, weight_decay=0.5, stats="tensor")
    tensor([[25.0000,  5.0000, 11.0000,  0.2225, -2.3500]], dtype=torch.float64)
    >>> w
    tensor([2.7500, 3.6000])
    """
    if is_traced():
        return _traced_sgd_(
            params, grads, momentum_buffers, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, maximize=maximize, grad_scale=grad_scale, stats=stats, held=held, l=l,
            held_scale=held_scale, gauge=gauge, found_inf=found_inf, clip_coef=clip_coef, lr_multipliers=lr_multipliers,
            stored=(state_dtype, rounding, masters, norm),
        )  # fmt: skip
    params, grads = list(params), list(grads)
    for name, x in (("held", held), ("gauge", gauge)):
        if norm is not None and x is not None:
            raise ValueError(f"sgd_: {name} expected None with norm, got {type(x).__name__}")
    buffers: list[Tensor | None] | None = None
    first: list[int] = []
    if (momentum != 0 if gauge is None else gauge.has_buffer) and momentum_buffers is not None:
        buffers = list(momentum_buffers)
        for i, (p, g, v) in enumerate(zip(params, grads, buffers, strict=False)):
            if v is None and g is not None and isinstance(p, Tensor):
                new = torch.empty_like if found_inf is None else torch.zeros_like
                buffers[i] = new(p, dtype=state_dtype or p.dtype, requires_grad=False)
                first.append(i)
    copies = None if masters is None else with_new_masters(params, grads, masters)
    firsts = None if held is None else list(held)
    check_l(l, "sgd_")
    if firsts is not None and stats is None:
        stats = "tensor"
    step = Pass()
    step.begin()
    code = stats_code(stats, "sgd_")
    on_device: OnDevice | None = None
    eta: Any = lr
    decay: Any = weight_decay
    scale: Any = grad_scale
    if norm is not None:
        eta, decay = as_float("sgd_", "lr", lr), 0.0
    if found_inf is not None or any(isinstance(x, Tensor) for x in (eta, decay, grad_scale)):
        of_one = grad_scale if held is None else as_float("sgd_", "grad_scale", grad_scale)
        given = {"lr": eta, "weight_decay": decay, "grad_scale": of_one}
        (eta, decay, scale), (lr_there, decay_there, scale_there) = split_numbers("sgd_", given)
        on_device = (lr_there, decay_there, scale_there, found_inf)
    of_first, of_second = inverses("sgd_", scale, None if firsts is None else held_scale)
    multipliers = None if lr_multipliers is None else read_lr_multipliers(lr_multipliers, len(params), "sgd_")
    check_norm_arguments("sgd_", norm, radii, eta, params, grads, multipliers)
    _, seeded, first_parameter = precision(None, rounding, 0 if rounding is None else rounding.first)
    hyper = Hyper(
        lr=eta, momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov, maximize=maximize,
        inverse_scale=of_first, second_inverse_scale=of_second, l=l, gauge=gauge, on_device=on_device, rounding=seeded,
        keeps_norm=norm is not None, by_row=norm == "keep_rows",
    )  # fmt: skip
    refused = step.add(
        "sgd_", params, grads, None if buffers is None else [buffers], first, hyper, code, held=firsts, masters=copies,
        lr_multipliers=multipliers, first_parameter=first_parameter, radii=None if radii is None else list(radii),
    )  # fmt: skip
    if refused:
        if norm is not None:
            check_on_cpu("sgd_", refused[0], params)
        lists = {"params": params, "grads": grads, "momentum_buffers": buffers, "held": firsts}
        if copies is not None:
            check_masters("sgd_", refused[0], params, copies)
        raise TypeError(why_refused("sgd_", refused[0], lists))
    if clip_coef is not None:
        step.clip([clip_coef])
    table = run_pass(step, measured=stats is not None, may_skip=found_inf is not None)
    if momentum_buffers is not None and buffers is not None:
        for i in first:
            momentum_buffers[i] = buffers[i]
    if masters is not None and copies is not None:
        masters[:] = copies
    return table


def _traced_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None] | None,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float | Tensor,
    grad_scale: float | Tensor,
    stats: Stats,
    held: Sequence[Tensor | None] | None,
    gauge: GaugeStep | None,
    found_inf: Tensor | None,
    clip_coef: Tensor | None,
    lr_multipliers: Sequence[float] | Tensor | None,
    stored: tuple[Any, ...],
    **others: Any,
) -> Tensor | None:
    """Run `sgd_` through ``torch.ops``. `stored`: state_dtype, rounding, masters and norm."""
    for name, given in zip(("gauge", "state_dtype", "rounding", "masters", "norm"), (gauge, *stored), strict=True):
        if given is not None:
            raise NotImplementedError(
                f"sgd_: {name} expected None under torch.compile and dispatch modes, got {describe(given)}"
            )
    if lr_multipliers is not None and not isinstance(lr_multipliers, Tensor):
        lr_multipliers = torch.tensor(list(lr_multipliers), dtype=torch.float64)
    params, grads = list(params), list(grads)
    buffers: list[Tensor] = []
    first: list[int] = []
    if momentum != 0:
        if momentum_buffers is None:
            raise ValueError("sgd_: momentum is not 0, expected momentum_buffers, got None")
        for i, v in enumerate(momentum_buffers):
            if v is None:
                first.append(i)
                v = torch.zeros_like(params[i], requires_grad=False)
                if grads[i] is not None:
                    momentum_buffers[i] = v
            buffers.append(v)
    numbers: Any = {"lr": lr, "weight_decay": weight_decay, "grad_scale": grad_scale}
    tensors = {"found_inf": found_inf, "clip_coef": clip_coef, "lr_multipliers": lr_multipliers}
    op = torch.ops.normkern.sgd_.default
    if any(isinstance(x, Tensor) for x in (*numbers.values(), *tensors.values())):
        op = torch.ops.normkern.sgd_.tensor
        numbers = {k: x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for k, x in numbers.items()}
        numbers |= tensors
    held = None if held is None else list(held)
    table: Tensor = op(
        params, grads, buffers, momentum=momentum, stats=stats, held=held, first=first, **numbers, **others
    )
    return None if stats is None and held is None else table
