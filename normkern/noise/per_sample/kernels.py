"""Chooses the kernel that sums a layer's contributions: the fastest for its shape, or the reference."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import ops

#: sum_ts <a_s,a_t><g_s,g_t> costs 2 T^2 (I+O) flops a sample, the tile kernel's epilogue about as much as 16 more
#: time steps. Measured: equal at T = 16 for 512 x 2048 and wider; below, the Gram matrices win there.
GRAM_STEPS, GRAM_WIDTH = 12, 512

#: Below this share of sum_b c_b^2, sum_b c_b^2 - total^2/B has lost too many digits in float32.
CANCELLED = 1e-3

Triple = tuple[Tensor, Tensor | None, Tensor]


def of(*tensors: Tensor) -> ModuleType | Any:
    """Return `ops`, or `reference` for tensors that no kernel takes together."""
    device = ops.device_index(tensors[0])
    for x in tensors:
        if device is None or ops.device_index(x) != device:
            from ... import reference

            return reference
    return ops


def one_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider of their dtypes, which differ under autocast."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def outer(a: Tensor, g: Tensor, squares: bool, g_norms: Callable[[], Tensor] | None = None) -> Triple:
    """Return total, centred squares and norms of c_b = g_b^T a_b; a (B, T, I), g (B, T, O)."""
    steps = a.shape[1]
    a, g = one_dtype(a, g)
    if steps == 1 and not (squares and a.is_cuda and of(a, g) is ops):  # recentre_ would wait for the device
        return _one_step(a[:, 0], g[:, 0], squares, g_norms)
    if not squares and steps <= GRAM_STEPS and min(a.shape[2], g.shape[2]) >= GRAM_WIDTH and a.dtype == torch.float32:
        return _gram(a, g)
    return of(a, g).outer_moments(a, g, squares=squares)


def _one_step(a: Tensor, g: Tensor, squares: bool, g_norms: Callable[[], Tensor] | None) -> Triple:
    """T = 1: |c_b|^2 = |a_b|^2 |g_b|^2 and sum_b c_b^2 = (g^2)^T a^2, two products of a BLAS."""
    kind = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, g = a.to(kind), g.to(kind)
    total = g.t() @ a
    sq_norms = of(a).row_sq_norms(a) * (of(g).row_sq_norms(g) if g_norms is None else g_norms())
    if not squares:
        return total, None, sq_norms
    raw = g.square().t() @ a.square()
    is_kept = of(raw, total).recentre_(raw, total, len(a), CANCELLED)
    if kind == torch.float32 and not is_kept:
        return of(a, g).outer_moments(a[:, None], g[:, None], squares=True)
    return total, raw, sq_norms


def _gram(a: Tensor, g: Tensor) -> Triple:
    """|c_b|^2 = sum_ts <a_s,a_t><g_s,g_t>, in double where signs may cancel: the products are few."""
    of_a, of_g = torch.bmm(a, a.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))
    sq_norms = (of_a.double() * of_g.double()).sum((1, 2)).clamp_(min=0)
    total = g.reshape(-1, g.shape[2]).t() @ a.reshape(-1, a.shape[2])
    return total, None, sq_norms
