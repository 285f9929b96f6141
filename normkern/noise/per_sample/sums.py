"""Sums over samples: total, centred squares and norms of the contributions to one tensor's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels


@dataclass(slots=True)
class Sums:
    """Sums of the contributions c_b of a batch to one tensor's gradient."""

    total: Tensor  #: sum_b c_b, of the tensor's shape
    centred: Tensor | None  #: sum_b |c_b - mean|^2, elementwise; None: not asked for
    sq_norms: Tensor  #: (B,) |c_b|^2, float64

    def reshape(self, shape: torch.Size) -> Sums:
        """Return the same sums for a tensor of another shape."""
        if self.total.shape == shape:
            return self
        return Sums(
            self.total.reshape(shape), None if self.centred is None else self.centred.reshape(shape), self.sq_norms
        )


def real(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of squares of contributions of a dtype, and of sums of those that are real."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which contributions of a dtype are summed."""
    return real(dtype).to_complex() if dtype.is_complex else real(dtype)


def parts(x: Tensor) -> Tensor:
    """Return the real and imaginary parts of a complex tensor, along a last dimension; a real tensor as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def sq_norm(x: Tensor) -> Tensor:
    """Return |x|^2 in float64, of no dimension."""
    rows = _rows(parts(x))
    norms: Tensor = kernels.of(rows).row_sq_norms(rows)
    return norms.view(()) if norms.numel() == 1 else norms.sum()


def plain_sum(x: Tensor) -> Tensor:
    """Return the sum of all entries in float64, of no dimension."""
    rows = _rows(x)
    return kernels.of(rows).row_sums(rows).sum()


def _rows(x: Tensor) -> Tensor:
    """Return x as a matrix, a view if strides allow it."""
    if x.requires_grad:
        x = x.detach()
    return x.view(1, -1) if x.is_contiguous() else x.reshape(1, -1) if x.dim() < 2 else x.flatten(1)


def of_matrix(rows: Tensor, squares: bool) -> Sums:
    """Return the sums of contributions that are the rows of a (B, P) matrix."""
    if rows.is_complex():
        of = of_matrix(parts(rows).flatten(1), squares)
        centred = None if of.centred is None else of.centred.view(-1, 2).sum(1)
        return Sums(torch.view_as_complex(of.total.view(-1, 2)), centred, of.sq_norms)
    rows = rows.to(real(rows.dtype))
    mean, centred, sq_norms = kernels.of(rows).moments(rows, squares=squares)
    return Sums(mean.mul_(rows.shape[0]), centred, sq_norms)


def one_by_one(batch: int, sample: Callable[[int], Tensor], squares: bool) -> Sums:
    """Return the sums of contributions that are computed one after the other, each of the tensor's shape.

    sum_b |c_b - mean|^2 by Youngs and Cramer's update, as in formulas.h.
    """
    is_complex = False
    total: Tensor | None = None
    centred: Tensor | None = None
    norms = []
    for b in range(batch):
        c = sample(b).detach()
        is_complex = c.is_complex()
        c = parts(c.to(wide(c.dtype)))
        norms.append(sq_norm(c))
        if total is None:
            total, centred = c.clone(), torch.zeros_like(c) if squares else None
            continue
        total += c
        if centred is not None:
            deviation = c.mul(b + 1).sub_(total)
            centred.addcmul_(deviation, deviation, value=1 / (b * (b + 1)))
    assert total is not None
    if is_complex:
        total, centred = torch.view_as_complex(total), None if centred is None else centred.sum(-1)
    return Sums(total, centred, torch.stack(norms).to(torch.float64))
