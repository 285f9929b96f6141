"""Which kernel sums a layer's contributions: the fastest that is right for its shape, or the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops

if TYPE_CHECKING:
    from types import ModuleType

#: sum_ts <a_s,a_t><g_s,g_t> costs 2 T^2 (I+O) flops a sample, the tile kernel's epilogue about as much as 16 more
#: time steps. Measured: equal at T = 16 for 512 x 2048 and wider; below, the Gram matrices win there.
GRAM_STEPS, GRAM_WIDTH = 12, 512

#: Below this share of sum_b c_b^2, sum_b c_b^2 - total^2/B has lost too many digits in float32.
CANCELLED = 1e-3

Triple = tuple[Tensor, Tensor | None, Tensor]


def _kernels(*tensors: Tensor) -> ModuleType | Any:
    if all(ops.cpu_takes(x) for x in tensors):
        return ops
    from .. import reference

    return reference


def moments(rows: Tensor, squares: bool) -> Triple:
    """`ops.moments` of a (B, P) matrix."""
    mean, centred, sq_norms = _kernels(rows).moments(rows, squares=squares)
    return mean, centred, sq_norms


def outer(a: Tensor, g: Tensor, squares: bool, g_norms: Callable[[], Tensor] | None = None) -> Triple:
    """Total, centred squares and norms of c_b = g_b^T a_b; a (B, T, I), g (B, T, O)."""
    steps = a.shape[1]
    if a.dtype != g.dtype:
        a, g = a.to(torch.promote_types(a.dtype, g.dtype)), g.to(torch.promote_types(a.dtype, g.dtype))
    if steps == 1:
        return _one_step(a[:, 0], g[:, 0], squares, g_norms)
    if not squares and steps <= GRAM_STEPS and min(a.shape[2], g.shape[2]) >= GRAM_WIDTH and a.dtype == torch.float32:
        return _gram(a, g)
    total, centred, sq_norms = _kernels(a, g).outer_moments(a, g, squares=squares)
    return total, centred, sq_norms


def _one_step(a: Tensor, g: Tensor, squares: bool, g_norms: Callable[[], Tensor] | None) -> Triple:
    """T = 1: |c_b|^2 = |a_b|^2 |g_b|^2 and sum_b c_b^2 = (g^2)^T a^2, two products of a BLAS."""
    kind = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, g = a.to(kind), g.to(kind)
    total = g.t() @ a
    sq_norms = row_sq_norms(a) * (row_sq_norms(g) if g_norms is None else g_norms())
    if not squares:
        return total, None, sq_norms
    raw = g.square().t() @ a.square()
    centred = torch.addcmul(raw, total, total, value=-1 / len(a))
    if bool((centred < CANCELLED * raw).any()) and kind == torch.float32:
        return _kernels(a, g).outer_moments(a[:, None], g[:, None], squares=True)
    return total, centred.clamp_(min=0), sq_norms


def _gram(a: Tensor, g: Tensor) -> Triple:
    """|c_b|^2 = sum_ts <a_s,a_t><g_s,g_t>, in double where signs may cancel: the products are few."""
    of_a, of_g = torch.bmm(a, a.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))
    sq_norms = (of_a.double() * of_g.double()).sum((1, 2)).clamp_(min=0)
    total = g.reshape(-1, g.shape[2]).t() @ a.reshape(-1, a.shape[2])
    return total, None, sq_norms


def row_sq_norms(x: Tensor) -> Tensor:
    """|x_b|^2 of every row of a matrix, in float64."""
    if ops.cpu_takes(x):
        return ops.row_sq_norms(x)
    from .. import reference

    return reference.row_sq_norms(x)


def conv(
    x: Tensor,
    g: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    squares: bool,
) -> Triple:
    """Total, centred squares and norms of a convolution's weight gradient; x (B, C, ...), g (B, O, ...)."""
    if x.dtype != g.dtype:
        x, g = x.to(torch.promote_types(x.dtype, g.dtype)), g.to(torch.promote_types(x.dtype, g.dtype))
    total, centred, sq_norms = _kernels(x, g).conv_moments(
        x, g, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups, squares=squares
    )
    return total, centred, sq_norms


def embedding(ids: Tensor, g: Tensor, count: int, padding_idx: int | None, squares: bool) -> Triple:
    """Total, centred squares and norms of an embedding's gradient; ids (B, T), g (B, T, D)."""
    total, centred, sq_norms = _kernels(g).embedding_moments(ids, g, count, padding_idx=padding_idx, squares=squares)
    return total, centred, sq_norms


def norm_sums(g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, channels: str) -> tuple[Tensor, Tensor]:
    """Per sample, the gradients of a normalisation's weight and bias."""
    of_weight, of_bias = _kernels(g, x, rstd).norm_sums(g, x, mean, rstd, channels=channels)
    return of_weight, of_bias
