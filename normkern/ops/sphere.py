"""Updates of any optimizer on tensors whose norm stays: `apply_updates_`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_traced
from ._binary import Hyper, Pass, describe
from .checks import as_float, why_refused
from .launch import run_pass, torch_op
from .step_arguments import check_norm_arguments, check_on_cpu
from .types import Norm, Stats, stats_code

_WHO = "apply_updates_"


def apply_updates_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor | None],
    *,
    lr: float,
    norm: Norm = "keep",
    radius: float | Tensor | Sequence[float | Tensor | None] | None = None,
    stats: Stats = None,
) -> Tensor | None:
    r"""Subtract updates, and keep the norm of every tensor or row: `normkern.apply_updates_` on the kernels.

    .. math::
        w' = R\,N(w - \eta R\,N(u)), \qquad N(x) = x/|x|

    Only the direction of an update counts, and :math:`\eta` is the step relative to the weights' norm R. In two passes
    over each tensor or row, which is read from memory once where it fits into a cache; sums in float64, arithmetic in
    float32 (float64 for float64), one rounding at the store. An update of zeros leaves the direction of w; NaN or an
    infinity in one makes the whole tensor or row NaN. norm=None is :math:`w' = w - \eta u`.

    Args:
        params: tensors of float64, float32, bfloat16 or float16 on a CPU, without `norm` also on a CUDA device, any
            shapes and strides; updated in place.
        updates: u of each, of its shape and dtype; None skips the parameter. Read only.
        lr: at least 0 and, with `norm`, below 1.
        norm: "keep": of each tensor; "keep_rows": of each index of the first dimension (ndim >= 2); None: no norm.
        radius: R, positive: a number or tensor for all, or a sequence of one for each parameter, which are one number
            or one for each row. None, or None entries: the norm that w has. Rounding moves that by a few units of the
            last digit a step; a radius that you keep does not let it drift.
        stats: "tensor" or "row": returns the sums of the step, as `sgd_` does, u in the place of the gradient.

    Returns:
        None, or with `stats` a float64 tensor (slots, len(SUMS)). On a CPU nothing is synchronised; elsewhere the
        check for zeros is.

    Raises:
        TypeError: no kernel takes an entry; dtypes or devices differ.
        ValueError: lengths or shapes differ, lr is out of range, a tensor or row without a radius is zero, a radius is
            not positive or of another shape, rows of a vector are wanted. Nothing is written.

    Reference: Hyperball, arXiv 2606.16899.

    >>> w, u = torch.tensor([3.0, 4.0]), torch.tensor([-8.0, 6.0])
    >>> apply_updates_([w], [u], lr=0.75)
    >>> w, w.norm()
    (tensor([4.8000, 1.4000]), tensor(5.))
    """
    params, updates = list(params), list(updates)
    if is_traced():
        radii = radii_of(radius, params, norm)
        table: Tensor = torch_op(_WHO, params, updates, lr=lr, norm=norm, radius=radii, stats=stats)
        return None if stats is None else table
    eta = as_float(_WHO, "lr", lr)
    check_norm_arguments(_WHO, norm, None, eta, params, updates)
    radii = radii_of(radius, params, norm)
    step = Pass()
    step.begin()
    hyper = Hyper(lr=eta, keeps_norm=norm is not None, by_row=norm == "keep_rows")
    refused = step.add(_WHO, params, updates, None, None, hyper, stats_code(stats, _WHO), radii=radii)
    if refused:
        if norm is not None:
            check_on_cpu(_WHO, refused[0], params)
        raise TypeError(why_refused(_WHO, refused[0], {"params": params, "updates": updates}))
    return run_pass(step, measured=stats is not None)


def radii_of(radius: Any, params: Sequence[Any], norm: Norm) -> list[Tensor | None] | None:
    """Return the radius of each parameter as `sgd_` takes it.

    Raises:
        ValueError: one is not positive, or of another shape than the norms to keep; there is no norm to keep.
    """
    if radius is None:
        return None
    if norm is None:
        raise ValueError(f"{_WHO}: radius expected None without norm, got {type(radius).__name__}")
    each = list(radius) if isinstance(radius, (list, tuple)) else [radius] * len(params)
    if len(each) != len(params):
        raise ValueError(f"{_WHO}: radius has {len(each)} entries but params has {len(params)}")
    return [None if r is None else _radius_of(r, p, i, norm) for i, (r, p) in enumerate(zip(each, params, strict=True))]


def _radius_of(radius: Any, p: Any, i: int, norm: Norm) -> Tensor:
    shape = () if norm == "keep" else (p.shape[0],)
    if not isinstance(radius, Tensor):
        radius = torch.tensor(as_float(_WHO, f"radius[{i}]", radius), dtype=torch.float64)
    if radius.numel() == 1:
        radius = radius.reshape(()).expand(shape)
    if tuple(radius.shape) != shape:
        raise ValueError(
            f"{_WHO}: radius[{i}] expected one number{' or one for each row' if shape else ''}, {shape}, got a tensor "
            f"of shape {tuple(radius.shape)}"
        )
    there = radius.detach().to(device="cpu", dtype=torch.float64).contiguous()
    if not is_traced() and not all(0 < r < math.inf for r in there.flatten().tolist()):
        raise ValueError(f"{_WHO}: radius[{i}] expected positive numbers, got {describe(radius)} with others")
    return there
