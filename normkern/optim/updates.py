"""`apply_updates_`: the tail of any optimizer's step, on tensors whose norms stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..tracing import in_dispatch_mode

_WHO = "apply_updates_"


def apply_updates_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor | None],
    lr: float,
    *,
    norm: ops.Norm = "keep",
    radius: float | Tensor | Sequence[float | Tensor | None] | None = None,
    stats: ops.Stats = None,
) -> Tensor | None:
    r"""Subtract updates, and keep the norm of every tensor or row: the tail of a Muon, SOAP or Lion on a sphere.

    .. math::
        w' = R\,N(w - \eta R\,N(u)), \qquad N(x) = x/|x|

    Only the direction of an update counts, and :math:`\eta` is the step relative to the weights' norm R. CPU tensors
    take two passes over each tensor or row, which is read from memory once where it fits into a cache; sums in float64,
    arithmetic in float32 (float64 for float64), one rounding at the store. Tensors on other devices take torch's
    operations. An update of zeros leaves the direction of w; a NaN or an infinity makes the whole tensor or row NaN.
    norm=None is :math:`w' = w - \eta u`.

    Args:
        params: tensors of float64, float32, bfloat16 or float16, any shapes and strides; updated in place.
        updates: u of each, of its shape and dtype; None skips the parameter. Read only.
        lr: at least 0 and below 1; any number without `norm`.
        norm: "keep": of each tensor; "keep_rows": of each index of the first dimension (ndim >= 2); None: no norm.
        radius: R, positive: a number or tensor for all, or a sequence of one for each parameter, which are one number
            or one for each row. None, or None entries: the norm that w has. Rounding moves that by a few units of the
            last digit a step; a radius that you keep does not let it drift.
        stats: "tensor" or "row": returns the sums of the step, as `ops.sgd_` does, u in the place of the gradient.

    Returns:
        None, or with `stats` a float64 tensor (slots, len(ops.SUMS)). On other devices than the CPU the check for zeros
        synchronises.

    Raises:
        TypeError: an entry is no plain tensor of these dtypes, such as a DTensor; dtypes or devices differ.
        ValueError: lengths or shapes differ, lr is out of range, a tensor or row without a radius is zero, a radius is
            not positive or of another shape, rows of a vector are wanted. Nothing is written.

    Reference: Hyperball, arXiv 2606.16899.

    >>> w, u = torch.tensor([3.0, 4.0]), torch.tensor([-8.0, 6.0])
    >>> apply_updates_([w], [u], lr=0.75)
    >>> w, w.norm()
    (tensor([4.8000, 1.4000]), tensor(5.))
    """
    params, updates = list(params), list(updates)
    if norm is None or in_dispatch_mode() or not _lies_elsewhere(params, updates):
        return ops.apply_updates_(params, updates, lr=lr, norm=norm, radius=radius, stats=stats)
    return _by_reference(params, updates, lr, norm, radius, stats)


def _lies_elsewhere(params: list[Any], updates: list[Any]) -> bool:
    """Return whether plain tensors lie on devices whose kernels keep no norms."""
    given = [x for p, u in zip(params, updates, strict=False) if u is not None for x in (p, u)]
    return bool(given) and all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type not in ("cpu", "meta") and x.dtype in ops.DTYPES
        for x in given
    )


def _by_reference(
    params: list[Any], updates: list[Any], lr: float, norm: ops.Norm, radius: Any, stats: ops.Stats
) -> Tensor | None:
    from ..reference import norms, sgd_

    ops.check_norm_arguments(_WHO, norm, None, lr, params, updates)
    radii = ops.radii_of(radius, params, norm)
    if len(updates) != len(params):
        raise ValueError(f"{_WHO}: updates has {len(updates)} entries but params has {len(params)}")
    for i, (p, u) in enumerate(zip(params, updates, strict=True)):
        if u is None:
            continue
        if u.shape != p.shape:
            raise ValueError(
                f"{_WHO}: updates[{i}] has shape {tuple(u.shape)} but params[{i}] has shape {tuple(p.shape)}"
            )
        if (radii is None or radii[i] is None) and p.numel() and bool((norms(p, norm) == 0).any()):
            raise ValueError(
                f"{_WHO}: params[{i}] or a row of it is zero, which has no norm to keep; expected weights that are not "
                "all zero, or norm=None"
            )
    there = None if radii is None else [r if r is None else r.to(p.device) for r, p in zip(radii, params, strict=True)]
    return sgd_(params, updates, lr=lr, stats=stats, norm=norm, radii=there)
