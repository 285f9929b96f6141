"""`moments`: mean, variance and noise scale of per-sample gradients that lie in memory, in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..tracing import is_traced


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Estimates of :math:`\nabla L` and of the covariance :math:`\Sigma` from B per-sample gradients :math:`g_b`.

    Scalars are float64 tensors of no dimension, on the samples' device. Unbiased estimates can be negative, and
    are not clipped.

    Attributes:
        batch_size: B, the number of samples.
        mean: :math:`\bar g`, elementwise; float64 for float64 samples, else float32. A list for a list.
        variance: elementwise, without bias; like `mean`.
        sq_norms: (B,) float64, :math:`|g_b|^2` over all tensors.
        trace_sigma: estimate of :math:`\mathrm{tr}\,\Sigma`: the sum of all variances.
        grad_sq_norm: :math:`|\bar g|^2`.
        grad_sq_norm_unbiased: estimate of :math:`|\nabla L|^2`: grad_sq_norm - trace_sigma / B.
        nsr: trace_sigma / grad_sq_norm, the noise-to-signal ratio of one sample's gradient.
        nsr_batch: nsr / B, that of the batch gradient.
        gns: trace_sigma / grad_sq_norm_unbiased, the simple gradient noise scale, in samples.
    """

    batch_size: int
    mean: Tensor | list[Tensor] = field(repr=False)
    variance: Tensor | list[Tensor] = field(repr=False)
    sq_norms: Tensor
    trace_sigma: Tensor
    grad_sq_norm: Tensor
    grad_sq_norm_unbiased: Tensor
    nsr: Tensor
    nsr_batch: Tensor
    gns: Tensor


def moments(x: Tensor | Sequence[Tensor]) -> Moments:
    r"""Compute mean, elementwise variance, norms and noise scale of per-sample gradients, in one pass over memory.

    .. math::
        \bar g = \frac1B \sum_b g_b, \qquad \widehat{\mathrm{tr}\,\Sigma} = \frac1{B-1} \sum_b |g_b - \bar g|^2,
        \qquad \widehat{|\nabla L|^2} = |\bar g|^2 - \frac1B \widehat{\mathrm{tr}\,\Sigma}

    Deviations are summed around a shift near the mean: 1000 plus noise of 0.01 comes out as well as float32 holds it.

    Args:
        x: (B, P), a gradient per row, of float64, float32, bfloat16 or float16, rows of any stride; or a list or tuple
            of (B, \*shape), one tensor per parameter as torch.func and Opacus give them, as one problem. At least two
            samples. Read only; a graph that `x` is part of is left alone.

    Returns:
        `Moments`. NaN and infinities flow through: a sample that has one has it in its norm, a column in its mean and
        variance, and the scalars in theirs. Float32 variances below 1e-38 or above 3e38 leave its range; norms and
        scalars, in float64, do not. Nothing is synchronised. Tensors that no kernel takes
        fall back to torch, in several passes.

    Raises:
        TypeError: not a strided, plain tensor of these dtypes, or a list of such; dtypes or devices differ.
        ValueError: `x` is not (B, P), the tensors of a list differ in B, B < 2, or there are no columns.

    Reference: McCandlish et al., arXiv 1812.06162, section 2.2, for the noise scale; rows are joined as in Chan, Golub
    and LeVeque 1983, Am. Stat. 37(3).

    >>> import torch
    >>> result = moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> result.mean, result.variance, result.sq_norms
    (tensor([2., 5.]), tensor([2., 0.]), tensor([26., 34.], dtype=torch.float64))
    >>> result.trace_sigma.item(), result.grad_sq_norm_unbiased.item(), result.gns.item()
    (2.0, 28.0, 0.07142857142857142)
    >>> moments([torch.ones(2, 3, 4), torch.zeros(2)]).mean[0].shape
    torch.Size([3, 4])
    """
    is_list = isinstance(x, (list, tuple))
    tensors = [_samples(entry, f"x[{i}]" if is_list else "x") for i, entry in enumerate(x if is_list else [x])]
    if not is_list and tensors[0].ndim != 2:
        raise ValueError(
            f"moments: x has shape {tuple(tensors[0].shape)}; expected (B, P); a list of tensors takes any (B, *shape)"
        )
    names = [f"x[{i}]" for i in range(len(tensors))] if is_list else ["x"]
    b = ops.check_samples("moments", tensors, names)
    if b < 2:
        raise ValueError(f"moments: {names[0]} has shape {tuple(tensors[0].shape)}; expected at least 2 samples")
    if not any(entry.numel() for entry in tensors):
        raise ValueError(f"moments: {names[0]} has shape {tuple(tensors[0].shape)}; expected at least one column")
    mean, variance, sq_norms, totals = _moments(tensors, b)
    mean_sq, trace = totals[0], totals[1] / (b - 1)
    unbiased = mean_sq - trace / b
    return Moments(
        batch_size=b,
        mean=mean if is_list else mean[0],
        variance=variance if is_list else variance[0],
        sq_norms=sq_norms,
        trace_sigma=trace,
        grad_sq_norm=mean_sq,
        grad_sq_norm_unbiased=unbiased,
        nsr=trace / mean_sq,
        nsr_batch=trace / mean_sq / b,
        gns=trace / unbiased,
    )


def _samples(x: object, name: str) -> Tensor:
    """Check one tensor of `moments`, and return it without its graph."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"moments: {name} is {ops.describe(x)}; expected a tensor (B, P), or a list or tuple of tensors (B, *shape)"
        )
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_meta
    plain = plain or (is_traced() and not x.is_meta and ops.would_take(x))
    if not plain or x.dtype not in ops.DTYPES:
        raise TypeError(
            f"moments: {name} is {ops.describe(x)}; expected a plain, strided torch.Tensor of {ops.one_of()}"
        )
    return x.detach().resolve_neg()


def _moments(tensors: list[Tensor], b: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Return `ops.moments` and its totals, or those of `reference` for tensors that no kernel takes."""
    traced = is_traced()
    is_taken = ops.kernels_take(tensors) if traced else all(map(ops.kernel_takes, tensors))
    if is_taken and traced:
        return torch.ops.normkern.moments.list(tensors, divisor=b - 1)  # type: ignore[no-any-return]
    totals = torch.empty(2, dtype=torch.float64, device=tensors[0].device)
    if is_taken:
        mean, variance, sq_norms = ops.moments(tensors, factor=1 / (b - 1), totals=totals)
    else:
        from .. import reference

        for i, entry in enumerate(tensors):
            ops.check_storage(entry, f"moments: x[{i}]" if len(tensors) > 1 else "moments: x")
        mean, variance, sq_norms = reference.moments(tensors, factor=1 / (b - 1), totals=totals)
    assert variance is not None
    return mean, variance, sq_norms, totals
