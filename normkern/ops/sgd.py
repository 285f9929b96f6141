"""Ops over coordinates: a step, and what pairs of gradients and running moments are made of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..tracing import is_traced
from ._binary import (
    SUMS,
    GaugeStep,
    Hyper,
    LrMultipliers,
    Pass,
    Stats,
    describe,
    device_index,
    kernel_takes,
    new_scratch,
    new_table,
    stats_code,
    torch_op,
    why_refused,
)

#: lr, weight_decay, grad_scale and found_inf where they lie on a device, else None.
OnDevice: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Rounding(NamedTuple):
    """Of bfloat16 weights at random: Philox4x32-7 with the seed as key; see csrc/formulas.h for its counter."""

    seed: int
    step: int  #: how many there have been
    first: int = 0  #: the first parameter's index in the optimizer


#: How the binary takes it: the buffers' dtype, (seed, step), the index of the first parameter.
Precision: TypeAlias = tuple[int | None, tuple[int, int] | None, int]
_DTYPE_CODE = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def precision(state_dtype: torch.dtype | None, rounding: Rounding | None, first: int) -> Precision:
    """How the binary spells how a group is stored."""
    numbers = None if rounding is None else (rounding.seed, rounding.step % 2**32)
    return None if state_dtype is None else _DTYPE_CODE[state_dtype], numbers, first


def if_on_device(x: object) -> Tensor | None:
    """x, if it is one number in the memory of a CUDA device, which a kernel can read by itself."""
    if not isinstance(x, Tensor) or x.numel() != 1 or x.dtype not in (torch.float32, torch.float64):
        return None
    return x if device_index(x) not in (None, -1) else None


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
) -> Tensor | None:
    r"""One step of SGD on a list of tensors, in one pass over memory; of SVAG, if there are pairs of gradients.

    .. math::
        d = \pm g/\mathrm{grad\_scale} + \lambda w, \quad v' = \mu v + (1-\tau) d, \quad w' = w - \eta v'

    with :math:`v' = d` where there is no buffer yet, and :math:`w' = w - \eta (d + \mu v')` for nesterov. Arithmetic in
    float32 (float64 for float64 tensors), one rounding at the store. Of a pair, :math:`g_1` held and :math:`g_2` in
    `grads`, each divided by its scale, the gradient is (l = 1: :math:`g_1`, to the bit)

    .. math::
        g = \tfrac12 (g_1 + g_2) + \tfrac12 \sqrt{2l-1}\,(g_1 - g_2)

    Args:
        params: tensors of float64, float32, bfloat16 or float16 on a CPU or a CUDA device, any shapes and strides;
            updated in place. With `stats` all are on one device.
        grads: same shapes, dtypes and devices; None skips the parameter. Read only.
        momentum_buffers: one per parameter, updated in place; None entries are created and put into the list.
            Needed if `momentum` is not 0. Of their parameter's dtype or, unless that is float64, float32 or bfloat16.
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
            is read when the kernel runs, and its numbers are not looked at.
        state_dtype: of those momentum buffers that are created; None: of their parameters.
        rounding: bfloat16 parameters are rounded at random: up with the probability that is the position between the
            two neighbours, by a number that depends on seed, step, the parameter's index and the coordinate's in
            row-major order. NaN and infinities stay, what lies beyond the largest number is rounded to nearest.
        masters: float32 copies of parameters of 16 bits, updated in place: the step is theirs, and the parameter what
            they are rounded to. Where a parameter is not what its copy is rounded to, somebody has written it, and
            it takes the copy's place. None entries are created for parameters of 16 bits, and put into the list.

    Returns:
        None, or with `stats` a float64 tensor (slots, 5) on their device: `SUMS` of every slot, parameter after
        parameter; NaN for a skipped one. With pairs (slots, 9): `PAIR_SUMS` too, after unscaling. Nothing is
        synchronised.

    Raises:
        TypeError: an entry is not a plain tensor of these dtypes on a device that the binary has kernels for; dtypes or
            devices differ.
        ValueError: lengths or shapes differ, a tensor overlaps itself or part of another in memory, `lr_multipliers` or
            `clip_coef` are something else, a scale is 0. Nothing is written.
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
        from .schemas import traced_sgd_

        return traced_sgd_(
            params, grads, momentum_buffers, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, maximize=maximize, grad_scale=grad_scale, stats=stats, held=held, l=l,
            held_scale=held_scale, gauge=gauge, found_inf=found_inf, clip_coef=clip_coef, lr_multipliers=lr_multipliers,
            stored=(state_dtype, rounding, masters),
        )  # fmt: skip
    params, grads = list(params), list(grads)
    buffers: list[Tensor | None] | None = None
    first: list[int] = []
    if (momentum != 0 if gauge is None else gauge.has_buffer) and momentum_buffers is not None:
        buffers = list(momentum_buffers)
        for i, (p, g, v) in enumerate(zip(params, grads, buffers, strict=False)):
            if v is None and g is not None and isinstance(p, Tensor):
                new = torch.empty_like if found_inf is None else torch.zeros_like
                buffers[i] = new(p, dtype=state_dtype or p.dtype, requires_grad=False)
                first.append(i)
    copies: list[Tensor | None] | None = None
    if masters is not None:
        copies = list(masters)
        for i, (p, g, m) in enumerate(zip(params, grads, copies, strict=False)):
            if m is None and g is not None and isinstance(p, Tensor) and p.dtype in (torch.bfloat16, torch.float16):
                copies[i] = p.detach().float()
    firsts = None if held is None else list(held)
    check_l(l, "sgd_")
    if firsts is not None and stats is None:
        stats = "tensor"
    step = Pass()
    step.begin()
    code = stats_code(stats, "sgd_")
    on_device: OnDevice | None = None
    given: Any = (lr, weight_decay, grad_scale)
    if found_inf is not None or any(isinstance(x, Tensor) for x in given):
        scale_there = if_on_device(grad_scale) if held is None else None
        on_device = (if_on_device(lr), if_on_device(weight_decay), scale_there, found_inf)
        given = tuple(
            _as_float("sgd_", name, x) if there is None else 1.0
            for name, x, there in zip(("lr", "weight_decay", "grad_scale"), given, on_device[:3], strict=True)
        )
    eta, decay, scale = given
    of_first, of_second = inverses("sgd_", scale, None if firsts is None else held_scale)
    multipliers = None if lr_multipliers is None else read_lr_multipliers(lr_multipliers, len(params), "sgd_")
    _, seeded, first_parameter = precision(None, rounding, 0 if rounding is None else rounding.first)
    hyper = Hyper(
        lr=eta, momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov, maximize=maximize,
        inverse_scale=of_first, second_inverse_scale=of_second, l=l, gauge=gauge, on_device=on_device, rounding=seeded,
    )  # fmt: skip
    refused = step.add(
        "sgd_", params, grads, None if buffers is None else [buffers], first, hyper, code, held=firsts, masters=copies,
        lr_multipliers=multipliers, first_parameter=first_parameter,
    )  # fmt: skip
    if refused:
        lists = {"params": params, "grads": grads, "momentum_buffers": buffers, "held": firsts}
        if copies is not None:
            _check_masters(refused[0], params, copies)
        raise TypeError(why_refused("sgd_", refused[0], lists))
    if clip_coef is not None:
        step.clip([clip_coef])
    table = _run(step, measured=stats is not None, may_skip=found_inf is not None)
    if momentum_buffers is not None and buffers is not None:
        for i in first:
            momentum_buffers[i] = buffers[i]
    if masters is not None and copies is not None:
        masters[:] = copies
    return table


def read_lr_multipliers(given: object, count: int, where: str) -> LrMultipliers:
    """What `sgd_` and param groups take as `lr_multipliers`; `where` begins the sentence for what is none.

    Raises:
        ValueError: it is no sequence or vector of `count` finite numbers of at least 0.
    """
    if isinstance(given, Tensor) and device_index(given) not in (None, -1):
        given = given.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    return LrMultipliers(given, count, where)


def _check_masters(i: int, params: list[Any], masters: list[Any]) -> None:
    """Whether it is a master copy that no kernel takes."""
    p, m = params[i], masters[i]
    if m is None or not isinstance(p, Tensor) or not kernel_takes(p):
        return
    if p.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"sgd_: masters[{i}] expected None beside params[{i}], {describe(p)}, got {describe(m)}")
    if not kernel_takes(m) or m.dtype != torch.float32 or m.device != p.device:
        raise TypeError(f"sgd_: masters[{i}] expected float32 beside params[{i}], {describe(p)}, got {describe(m)}")


def svag_combine_(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], l: float) -> None:
    r"""SVAG's combination of two gradients, in one pass: :math:`a' = \tfrac12 (a+b) + \tfrac12 \sqrt{2l-1}\,(a-b)`.

    Args:
        grads_a: tensors of float64, float32, bfloat16 or float16 on one device, any shapes and strides; updated in
            place.
        grads_b: same shapes and dtypes; read only. An entry may be None if its partner is.
        l: at least 1/2; 1 leaves `grads_a` as they are, to the bit.

    Raises:
        TypeError: an entry is not a plain tensor of these dtypes, dtypes or devices differ, or only one of two is None.
        ValueError: lengths or shapes differ, l < 1/2, memory overlaps. Nothing is written.

    Reference: Li, Malladi and Arora, arXiv 2102.12470, section 4. Nothing is synchronised.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    >>> svag_combine_([a], [b], l=5)
    >>> a
    tensor([-1.,  2.])
    """
    if is_traced():
        return _traced_svag_combine_(list(grads_a), list(grads_b), l)
    check_l(l, "svag_combine_")
    a, b = _both("svag_combine_", grads_a, grads_b)
    step = Pass()
    step.begin()
    refused = step.add("svag_combine_", a, b, None, None, Hyper(l=l))
    if refused:
        raise TypeError(why_refused("svag_combine_", refused[0], {"grads_a": a, "grads_b": b}))
    _run(step, measured=False)


def _traced_svag_combine_(a: list[Any], b: list[Any], l: float) -> None:
    """`torch.ops.normkern.svag_combine_`, which takes no None."""
    check_pairs("svag_combine_", a, b)
    there = [i for i, x in enumerate(a) if x is not None]
    torch_op("svag_combine_", [a[i] for i in there], [b[i] for i in there], l)


def pair_sums(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], stats: Stats = "tensor") -> Tensor:
    r"""What two gradients have in common, in one pass: `PAIR_SUMS` of every slot.

    Args:
        grads_a, grads_b: tensors of float64, float32, bfloat16 or float16 on one device, pairs of equal shape and
            dtype. An entry may be None if its partner is: NaN.
        stats: "tensor" or "row".

    Returns:
        (slots, 4) float64 on their device: :math:`\langle a,b\rangle, |a-b|^2, |a|^2, |b|^2`. Nothing is synchronised.

    Raises:
        TypeError, ValueError: as `svag_combine_`.

    >>> pair_sums([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 2.0])])
    tensor([[ 7.,  4.,  5., 13.]], dtype=torch.float64)
    """
    if is_traced():
        return torch_op("pair_sums", list(grads_a), list(grads_b), stats)
    a, b = _both("pair_sums", grads_a, grads_b)
    step = Pass()
    step.begin()
    refused = step.add("pair_sums", a, b, None, None, Hyper(), stats_code(stats, "pair_sums"))
    if refused:
        raise TypeError(why_refused("pair_sums", refused[0], {"grads_a": a, "grads_b": b}))
    table = _run(step, measured=True)
    assert table is not None
    columns = [SUMS.index(name) for name in ("weight_grad_dot", "update_sq", "weight_sq", "grad_sq")]
    return table[:, columns]


def welford_(
    means: Sequence[Tensor], samples: Sequence[Tensor | None], squares: Sequence[Tensor], *, n: int, stats: Stats = None
) -> Tensor | None:
    r"""Welford's update of running means and sums of squared deviations by the n-th sample, in one pass.

    .. math::
        m' = m + (x - m)/n, \quad s' = s + (x - m)(x - m')

    Args:
        means, squares: tensors of float64, float32, bfloat16 or float16 on one device; updated in place. Zeros before
            n = 1.
        samples: same shapes and dtypes; read only; None skips the entry.
        n: of this sample, from 1.
        stats: None, "tensor" or "row".

    Returns:
        None, or with `stats` float64 (slots, 5) on their device: `SUMS` with m for the weights and x for the gradient.

    Raises:
        TypeError, ValueError: as `sgd_`.

    Reference: Welford 1962, Technometrics 4(3).

    >>> m, s = torch.zeros(2), torch.zeros(2)
    >>> for n, x in enumerate([[1.0, 5.0], [3.0, 5.0]], start=1):
    ...     welford_([m], [torch.tensor(x)], [s], n=n)
    >>> m, s
    (tensor([2., 5.]), tensor([2., 0.]))
    """
    if is_traced():
        table = torch_op("welford_", list(means), list(samples), list(squares), n=n, stats=stats)
        return None if stats is None else table
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"welford_: n expected a whole number from 1, got {n!r}")
    m, x, s = list(means), list(samples), list(squares)
    step = Pass()
    step.begin()
    refused = step.add("welford_", m, x, [s], None, Hyper(share=1 / n), stats_code(stats, "welford_"))
    if refused:
        raise TypeError(why_refused("welford_", refused[0], {"means": m, "samples": x, "squares": s}))
    return _run(step, measured=stats is not None)


def check_l(l: object, where: str) -> float:
    """SVAG's l, a number of at least 1/2."""
    if isinstance(l, bool) or not isinstance(l, (int, float)) or not 0.5 <= l <= sys.float_info.max:
        raise ValueError(f"{where}: l expected a number of at least 1/2, got {l!r}")
    return float(l)


def _as_float(op: str, name: str, x: Any) -> float:
    try:
        return float(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{op}: {name} expected one number, got {x!r}") from None


def inverses(op: str, grad_scale: Any, held_scale: Any) -> tuple[float, float]:
    """What first and second gradients are multiplied with; without `held_scale` there are no second ones."""

    def inverse(name: str, scale: Any) -> float:
        try:
            return 1 / float(scale)
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):
            raise ValueError(f"{op}: {name} expected a number that is not 0, got {scale!r}") from None

    of_grads = inverse("grad_scale", grad_scale)
    return (of_grads, 1.0) if held_scale is None else (inverse("held_scale", held_scale), of_grads)


def _run(step: Pass, measured: bool, may_skip: bool = False) -> Tensor | None:
    written = step.check(None)
    table = new_table(step.slots, step.columns, step.like) if measured else None
    if table is not None and may_skip:
        table.fill_(torch.nan)
    step.run(table, new_scratch(step) if measured else None)
    torch.autograd.graph.increment_version(written)
    return table


def check_pairs(op: str, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
    """Every entry has a partner of its shape and dtype."""
    if len(a) != len(b):
        raise ValueError(f"{op}: grads_b has {len(b)} entries but grads_a has {len(a)}")
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        for name, entry in (("grads_a", x), ("grads_b", y)):
            if entry is not None and not isinstance(entry, Tensor):
                raise TypeError(f"{op}: {name}[{i}] is {describe(entry)}; expected a torch.Tensor or None")
        if (x is None) != (y is None):
            name = "grads_a" if x is None else "grads_b"
            raise TypeError(f"{op}: {name}[{i}] is None but its partner is not; expected both or neither")
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape != y.shape:
                raise ValueError(f"{op}: grads_b[{i}] has shape {tuple(y.shape)} but grads_a[{i}] has {tuple(x.shape)}")
            if x.dtype != y.dtype:
                raise TypeError(
                    f"{op}: grads_b[{i}] is {describe(y)} but grads_a[{i}] is {describe(x)}; expected one dtype"
                )


def _both(op: str, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> tuple[list[Any], list[Any]]:
    a, b = list(a), list(b)
    check_pairs(op, a, b)
    return a, b
