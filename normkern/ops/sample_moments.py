"""Moments over the samples of gradients that lie in memory: means, squared deviations, sums of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..tracing import is_traced
from ._binary import binary, describe, device_index, kernel_takes
from .checks import Takes, not_taken
from .launch import scratch_beside, torch_op, with_dense_rows
from .types import COMPUTE_DTYPES, compute_dtype


@overload
def moments(
    x: Tensor, *, squares: bool = True, factor: float = 1.0, totals: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]: ...


@overload
def moments(
    x: Sequence[Tensor], *, squares: bool = True, factor: float = 1.0, totals: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor] | None, Tensor]: ...


def moments(
    x: Tensor | Sequence[Tensor], *, squares: bool = True, factor: float = 1.0, totals: Tensor | None = None
) -> tuple[Any, Any, Tensor]:
    r"""Compute means and squared deviations down the first dimension, and the samples' norms, in one pass.

    .. math::
        m = \frac1B \sum_b x_b, \qquad c = \sum_b (x_b - m)^2, \qquad n_b = |x_b|^2

    elementwise but for the norms. Deviations are from a shift near the mean and in float32 (float64 for float64) for
    128 rows at a time, and joined in float64: a large mean costs no digits beyond those of its own rounding.

    Args:
        x: (B, P) of a dtype in `DTYPES`, any strides; or several of (B, \*shape), of one dtype and device, as one
            problem. Read only.
        squares: without, c is None.
        factor: what c is multiplied with before it is rounded; 1/(B-1) makes it the variance.
        totals: float64 (2,) on x's device, contiguous; becomes :math:`|m|^2` and the sum of all c, before `factor`
            and rounding (NaN without `squares`).

    Returns:
        m, c and (B,) float64 norms on x's device; m and c of shape (P,), or lists of \*shape; float64 for float64, else
        float32. NaN and infinities flow through. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes them; more than one dtype or device; `totals` is of another dtype or device.
            ValueError: no tensors or no samples; tensors that differ in B; `totals` is of another shape or layout.

    Reference: groups of rows are joined as in Chan, Golub and LeVeque 1983, Am. Stat. 37(3).

    >>> moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    (tensor([2., 5.]), tensor([2., 0.]), tensor([26., 34.], dtype=torch.float64))
    """
    if is_traced():
        return _traced_moments(x, squares, factor, totals)
    tensors: list[Any] = list(x) if isinstance(x, (list, tuple)) else [x]
    names = [f"x[{i}]" for i in range(len(tensors))] if isinstance(x, (list, tuple)) else ["x"]
    means, centred, row_sq = new_moments(tensors, names, squares)
    like = tensors[0]
    if totals is None:
        totals = _new_totals(like)
    elif not kernel_takes(totals) or totals.dtype != torch.float64 or totals.device != like.device:
        raise TypeError(f"moments: totals is {describe(totals)}; expected a torch.Tensor of float64 on {like.device}")
    elif totals.shape != (2,) or not totals.is_contiguous():
        raise ValueError(
            f"moments: totals has shape {tuple(totals.shape)} and strides {totals.stride()}; expected (2,), contiguous"
        )
    binary.moments(tensors, means, centred, factor, row_sq, totals, scratch_beside(like))
    if isinstance(x, (list, tuple)):
        return means, centred, row_sq
    return means[0], None if centred is None else centred[0], row_sq


def new_moments(
    tensors: list[Any], names: list[str], squares: bool, takes: Takes | None = None
) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
    """Check the arguments of `moments`, and return its unwritten results."""
    takes = takes or kernel_takes
    rows = check_samples("moments", tensors, names)
    for name, entry in zip(names, tensors, strict=True):
        if not takes(entry):
            raise TypeError(not_taken("moments", name, entry))
    real = compute_dtype(tensors[0].dtype)
    with torch.no_grad():
        means = [torch.empty_like(entry[0], dtype=real) for entry in tensors]
        centred = [torch.empty_like(mean) for mean in means] if squares else None
    return means, centred, torch.empty(rows, dtype=torch.float64, device=tensors[0].device)


def _traced_moments(x: Any, squares: bool, factor: float, totals: Tensor | None) -> tuple[Any, Any, Tensor]:
    """Run `moments` through ``torch.ops``, whose op returns the totals."""
    overload = "moments.list" if isinstance(x, (list, tuple)) else "moments"
    means, centred, row_sq, new_totals = torch_op(overload, x, squares=squares, factor=factor)
    if totals is not None:
        totals.copy_(new_totals)
    return means, centred, row_sq


def row_sq_norms(x: Tensor) -> Tensor:
    """Compute |x_b|^2 of every row of a matrix, in double precision.

    Args:
        x: (B, P) of a dtype in `DTYPES`, its rows of any stride. Read only. Where a row's numbers do not lie side by
            side, a copy is read.

    Returns:
        (B,) float64 on x's device. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes it. ValueError: it is no matrix.

    >>> row_sq_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([25.,  4.], dtype=torch.float64)
    """
    if is_traced():
        return torch_op("row_sq_norms", x)
    return _row_sums("row_sq_norms", x, squares=True)


def row_sums(x: Tensor) -> Tensor:
    """Compute the sum of every row of a matrix in double precision, without the float64 copy of ``x.sum(1, dtype=)``.

    Args:
        x: (B, P), as `row_sq_norms` takes it. Read only.

    Returns:
        (B,) float64 on x's device. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes it. ValueError: it is no matrix.

    >>> row_sums(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    tensor([ 7., -2.], dtype=torch.float64)
    """
    if is_traced():
        return torch_op("row_sums", x)
    return _row_sums("row_sums", x, squares=False)


def new_row_sums(op: str, x: Tensor, takes: Takes | None = None) -> Tensor:
    """Check the argument of `row_sums` or `row_sq_norms`, and return its unwritten result."""
    takes = takes or kernel_takes
    if not takes(x):
        raise TypeError(not_taken(op, "x", x))
    if x.ndim != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (B, P)")
    return torch.empty(x.shape[0], dtype=torch.float64, device=x.device)


def _row_sums(op: str, x: Tensor, *, squares: bool) -> Tensor:
    out = new_row_sums(op, x)
    binary.row_sums(with_dense_rows(x), squares, out, scratch_beside(x))
    return out


def recentre_(raw: Tensor, total: Tensor, count: int, least: float) -> bool:
    r"""Turn raw second moments into central ones, in place: :math:`\sum_b c_b^2 - (\sum_b c_b)^2 / B`, at least 0.

    Args:
        raw, total: :math:`\sum_b c_b^2` and :math:`\sum_b c_b`, dense tensors of one shape and layout, both float64 or
            both float32. raw is written. On a CUDA device torch's operations do it in several passes, and the answer
            synchronises.
        count: B, the number of samples.
        least: the share of raw below which digits are lost.

    Returns:
        Whether at least this share was left everywhere.

    Raises:
        TypeError: no kernel takes them. ValueError: shapes or layouts do not fit, or count is not positive.

    >>> raw = torch.tensor([5.0, 8.0])
    >>> recentre_(raw, torch.tensor([3.0, 4.0]), 2, 0.01), raw
    (False, tensor([0.5000, 0.0000]))
    """
    if is_traced():
        return bool(torch_op("recentre_", raw, total, count, least))
    check_recentre(raw, total, count)
    if device_index(raw) != -1:
        return _recentre_with_torch(raw, total, count, least)
    return binary.recentre(raw, total, 1 / count, least)


def _recentre_with_torch(raw: Tensor, total: Tensor, count: int, least: float) -> bool:
    before = raw.clone()
    raw -= total.square() / count
    is_kept = not bool((raw < least * before).any())
    raw.clamp_(min=0)
    return is_kept


def check_recentre(raw: Tensor, total: Tensor, count: int, takes: Takes | None = None) -> None:
    """Check the arguments of `recentre_`."""
    takes = takes or kernel_takes
    for name, entry in {"raw": raw, "total": total}.items():
        if not takes(entry) or entry.dtype not in COMPUTE_DTYPES:
            raise TypeError(not_taken("recentre_", name, entry, COMPUTE_DTYPES))
    if raw.dtype != total.dtype or raw.device != total.device:
        what = "dtype" if raw.dtype != total.dtype else "device"
        raise TypeError(f"recentre_: raw is {describe(raw)} but total is {describe(total)}; expected one {what}")
    if raw.shape != total.shape or raw.stride() != total.stride() or not _is_dense(raw):
        raise ValueError(
            f"recentre_: raw has shape {tuple(raw.shape)} and strides {raw.stride()}, total {tuple(total.shape)} and "
            f"{total.stride()}; expected one dense layout"
        )
    if count < 1:
        raise ValueError(f"recentre_: count expected at least 1, got {count}")


def _is_dense(x: Tensor) -> bool:
    """Return whether the numbers of `x` fill one stretch of memory, in any order of dimensions."""
    return x.is_contiguous() or x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def _new_totals(like: Tensor) -> Tensor:
    """Return unwritten `totals` for `moments`."""
    return torch.empty(2, dtype=torch.float64, device=like.device)


def check_samples(op: str, tensors: Sequence[Tensor], names: Sequence[str]) -> int:
    """Check that `tensors` have one dtype, device and number of samples B > 0, and return B."""
    if not tensors:
        raise ValueError(f"{op}: x is an empty list; expected at least one tensor")
    first, of_first = tensors[0], names[0]
    for name, entry in zip(names, tensors, strict=True):
        if not isinstance(entry, Tensor):
            raise TypeError(f"{op}: {name} is {describe(entry)}; expected a torch.Tensor (B, *shape)")
        if entry.ndim == 0 or entry.shape[0] == 0:
            raise ValueError(f"{op}: {name} has shape {tuple(entry.shape)}; expected (B, *shape) with B > 0")
        if entry.dtype != first.dtype or entry.device != first.device:
            raise TypeError(
                f"{op}: {name} is {describe(entry)} but {of_first} is {describe(first)}; "
                "expected one dtype and one device"
            )
        if entry.shape[0] != first.shape[0]:
            raise ValueError(f"{op}: {name} has {entry.shape[0]} samples but {of_first} has {first.shape[0]}")
    return first.shape[0]
