"""The first pass of a step that clips: gradient norms, and the factor that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_traced
from ._binary import Pass, binary, kernel_takes
from .checks import check_l, inverses, not_taken, why_refused
from .launch import scratch_beside, torch_op


def grad_sq_norms(
    grads: Sequence[Tensor | None],
    *,
    grad_scale: float = 1.0,
    held: Sequence[Tensor | None] | None = None,
    l: float = 1.0,
    held_scale: float = 1.0,
) -> Tensor:
    r"""Compute :math:`|g|^2` of every gradient in double precision, the first pass of a step that clips.

    Args:
        grads: tensors of a dtype in `DTYPES` on one device, any shapes and strides; None counts as zero. Read only.
        grad_scale, held, l, held_scale: as in `sgd_`; the norm of a pair is that of its combination.

    Returns:
        (len(grads),) float64 on their device, the same bits for any number of threads. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes an entry; dtypes of a pair or devices differ. ValueError: lengths or shapes differ,
            a scale is 0.

    >>> grad_sq_norms([torch.tensor([3.0, 4.0]), None])
    tensor([25.,  0.], dtype=torch.float64)
    """
    given, firsts = list(grads), None if held is None else list(held)
    if is_traced():
        return torch_op("grad_sq_norms", given, grad_scale=grad_scale, held=firsts, l=l, held_scale=held_scale)
    check_l(l, "grad_sq_norms")
    step = Pass()
    step.begin()
    of_first, of_second = inverses("grad_sq_norms", grad_scale, None if firsts is None else held_scale)
    refused = step.add_gradients(given, firsts, of_first, of_second, l)
    if refused:
        raise TypeError(why_refused("grad_sq_norms", refused[0], {"grads": given, "held": firsts}))
    tables = sq_norm_tables(step)
    if len(tables) > 1:
        raise TypeError(f"grad_sq_norms: grads are on {len(tables)} devices; expected one")
    return tables[0] if tables else torch.zeros(len(given), dtype=torch.float64, device="cpu")


def sq_norm_tables(step: Pass) -> list[Tensor]:
    """Return |g|^2 of a pass's parameters: a (parameters,) float64 tensor on each device, 0 for those elsewhere."""
    tables = []
    for like in step.places:
        tables.append(torch.zeros(step.parameters, dtype=torch.float64, device=like.device))
        step.sq_norms(tables[-1], scratch_beside(like))
    return tables


def clip_coef(sq_norms: Tensor, max_norm: float, *, found_inf: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Compute the global norm and the factor by which clipping multiplies every gradient.

    .. math::
        n = \sqrt{\sum_i s_i}, \qquad c = \min\Bigl(1, \frac{\mathrm{max\_norm}}{n + 10^{-6}}\Bigr)

    NaN stays NaN, and an infinite norm makes 0.

    Args:
        sq_norms: (parameters,) float64, contiguous: squares of the norms of all of them, as `grad_sq_norms` returns.
        max_norm: a number of at least 0.
        found_inf: of a GradScaler, a CUDA tensor of one float32 number: if it is not 0 the norm is NaN.

    Returns:
        n and c, float64 of no dimension on their device. Nothing is synchronised.

    Raises:
        TypeError: `max_norm` is no number, `sq_norms` no tensor that a kernel takes. ValueError: `max_norm` is
            negative; a tensor is something else.

    Reference: `torch.nn.utils.clip_grad_norm_` with norm_type=2 and error_if_nonfinite=False.

    >>> clip_coef(torch.tensor([9.0, 16.0], dtype=torch.float64), 2.5)
    (tensor(5., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    if is_traced():
        return torch_op("clip_coef", sq_norms, max_norm, found_inf=found_inf)
    limit = check_max_norm(max_norm, "clip_coef")
    if not kernel_takes(sq_norms):
        raise TypeError(not_taken("clip_coef", "sq_norms", sq_norms))
    norm, coef = (torch.empty((), dtype=torch.float64, device=sq_norms.device) for _ in range(2))
    binary.clip_coef(sq_norms, limit, norm, coef, found_inf)
    return norm, coef


def check_max_norm(max_norm: Any, where: str) -> float:
    """Return max_norm, a number of at least 0 or infinity, as a float. Reading a tensor of one number synchronises.

    Raises:
        TypeError: it is no number. ValueError: it is negative or NaN.
    """
    try:
        limit = None if isinstance(max_norm, (bool, str)) else float(max_norm)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        limit = None
    if limit is None:
        raise TypeError(f"{where}: max_norm expected a number of at least 0, got {max_norm!r}")
    if not limit >= 0:
        raise ValueError(f"{where}: max_norm expected a number of at least 0, got {max_norm!r}")
    return limit
