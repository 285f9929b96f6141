"""Mean, variance and noise scale of the gradients of many micro-batches, one pass over each: `RunningMoments`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nan

from .. import ops
from .pairs import pair_sums_of


@dataclass(frozen=True, eq=False)
class RunningMomentsResult:
    r"""Estimates of :math:`\nabla L` and of the covariance :math:`\Sigma_b` from m micro-batch gradients :math:`g_i`.

    Scalars are float64 tensors of no dimension, and ``slot_*`` of shape (parameters,), NaN for a parameter without a
    gradient; what has no bias can be negative, and is not clipped.

    Attributes:
        count: m, the number of micro-batches.
        batch_size: samples per micro-batch, or None.
        population: samples that they were drawn from without replacement, or None.
        mean: per parameter, :math:`\bar g`, of its shape; None for one without a gradient.
        variance: per parameter, elementwise, without bias, of one micro-batch's gradient; real for complex gradients.
        sq_norms: (m,), :math:`|g_i|^2`.
        trace_sigma: estimate of :math:`\mathrm{tr}\,\Sigma_b`, of one micro-batch's gradient: the sum of all variances.
        grad_sq_norm: :math:`|\bar g|^2`.
        grad_sq_norm_unbiased: estimate of :math:`|\nabla L|^2`.
        nsr_batch: trace_sigma / grad_sq_norm_unbiased, the noise-to-signal ratio of one micro-batch's gradient.
        gns: the gradient noise scale :math:`\mathrm{tr}\,\Sigma_1/|\nabla L|^2` in samples; NaN without `batch_size`.
        names, slots: names of the parameters, and where each one is in ``slot_*``.
        slot_trace_sigma, slot_grad_sq_norm, slot_grad_sq_norm_unbiased, slot_nsr_batch: the same per parameter.
    """

    count: int
    batch_size: int | None
    population: int | None
    mean: list[Tensor | None] = field(repr=False)
    variance: list[Tensor | None] = field(repr=False)
    sq_norms: Tensor
    trace_sigma: Tensor
    grad_sq_norm: Tensor
    grad_sq_norm_unbiased: Tensor
    nsr_batch: Tensor
    gns: Tensor
    names: list[str]
    slots: dict[str, slice]
    slot_trace_sigma: Tensor
    slot_grad_sq_norm: Tensor
    slot_grad_sq_norm_unbiased: Tensor
    slot_nsr_batch: Tensor


class RunningMoments:
    r"""Gradient noise from m independent micro-batches of one size, one pass over each one's gradients.

    .. math::
        \bar g = \frac1m \sum_i g_i, \qquad \widehat{\mathrm{tr}\,\Sigma_b} = \frac1{m-1} \sum_i |g_i - \bar g|^2,
        \qquad \widehat{|\nabla L|^2} = |\bar g|^2 - \frac1m \widehat{\mathrm{tr}\,\Sigma_b}

    all but the first norm by Welford's update, so that a large mean does not drown a small variance.

    Args:
        params: tensors, or pairs (name, tensor), of which ``.grad`` is read; any iterable of them. Names are positions
            where none is given.
        batch_size: samples per micro-batch; `gns` and `population` need it.

    Call `update` after each micro-batch's backward, and clear the gradients before the next. Gradients are taken as
    they are: unscale them before. Means and squares are kept in float64 for float64 and complex128 gradients, else in
    float32: bfloat16 and float16 ones are widened before the pass, sparse ones made dense, complex ones read as pairs
    of real numbers; on other devices torch makes the pass. Squares of float32 gradients leave its range below 1e-22 or
    so (they are 0 there) and above 1e19.

    Raises:
        ValueError: no parameters, one of them or a name twice, a `batch_size` below 1. TypeError: an entry is neither a
            tensor nor a pair.

    Reference: Welford 1962, Technometrics 4(3); McCandlish et al., arXiv 1812.06162, appendix A, with the micro-batches
    for its small batches and all of them for its big one.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> moments = RunningMoments([("w", w)], batch_size=7)
    >>> for g in ([1.0, 5.0], [3.0, 5.0]):
    ...     w.grad = torch.tensor(g)  # in a training loop: zero_grad, backward
    ...     moments.update()
    >>> result = moments.result()
    >>> result.mean, result.variance, result.sq_norms
    ([tensor([2., 5.])], [tensor([2., 0.])], tensor([26., 34.], dtype=torch.float64))
    >>> result.trace_sigma.item(), result.grad_sq_norm_unbiased.item(), result.gns.item()
    (2.0, 28.0, 0.5)
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[tuple[str, Tensor]], *, batch_size: int | None = None
    ) -> None:
        self._params, self._names = _named(params)
        self.batch_size = None if batch_size is None else _whole(batch_size, "RunningMoments: batch_size")
        self.reset()

    def reset(self) -> None:
        """Forget all micro-batches."""
        self.count = 0  # m, so far
        self._means: dict[int, Tensor] = {}  # by the parameter's position, real
        self._squares: dict[int, Tensor] = {}  # sums of squared deviations
        self._sq_norms: list[Tensor] = []
        self._complex: set[int] = set()

    def update(self) -> None:
        """Add every parameter's ``.grad``, which is only read. Nothing is synchronised.

        Raises:
            RuntimeError: no parameter has a gradient; one has a gradient in some micro-batches but not in others.
            ValueError: a gradient's shape, precision or device changed.
            TypeError: it is a subclass, such as a DTensor. Nothing is written.
        """
        grads = {i: p.grad for i, p in enumerate(self._params) if p.grad is not None}
        samples = {i: _sample(g, self._names[i]) for i, g in grads.items()}
        self._check(samples)
        means, squares = self._means, self._squares
        if self.count == 0:
            means, squares = ({i: torch.zeros_like(x) for i, x in samples.items()} for _ in range(2))
        sq_norms = _welford(list(means.values()), list(samples.values()), list(squares.values()), self.count + 1)
        self._means, self._squares = means, squares
        self._complex = {i for i, g in grads.items() if g.is_complex()}
        self._sq_norms.append(sq_norms.sum())
        self.count += 1

    def _check(self, samples: dict[int, Tensor]) -> None:
        """Check the gradients against those of the first micro-batch."""
        where = "RunningMoments.update"
        if not samples:
            raise RuntimeError(f"{where}: expected a backward before it, but no parameter has a gradient")
        if self.count == 0:
            return
        for i in sorted(samples.keys() ^ self._means.keys()):
            now, before = ("a", "none") if i in samples else ("no", "one")
            raise RuntimeError(
                f"{where}: {self._names[i]!r} has {now} gradient in micro-batch {self.count} but {before} in those "
                "before; expected one in all or in none"
            )
        for i, x in samples.items():
            mean = self._means[i]
            if (x.shape, x.dtype, x.device) != (mean.shape, mean.dtype, mean.device):
                raise ValueError(
                    f"{where}: the gradient of {self._names[i]!r} is read as {ops.describe(x)}, {tuple(x.shape)}, "
                    f"but was read as {ops.describe(mean)}, {tuple(mean.shape)}, before"
                )

    def result(self, *, population: int | None = None) -> RunningMomentsResult:
        r"""Return the estimates so far; later micro-batches do not change them. Nothing is synchronised.

        Args:
            population: N, if the micro-batches are disjoint parts of one data set of N samples, drawn without
                replacement; :math:`\nabla L` is then the gradient over that set. Such gradients vary less than
                independent ones, and lean away from each other: with :math:`\hat t` the plain
                :math:`\widehat{\mathrm{tr}\,\Sigma_b}`, b the batch size and :math:`f = b/N`,

        .. math::
            \widehat{\mathrm{tr}\,\Sigma_b} = (1 - f)\,\hat t, \qquad
            \widehat{|\nabla L|^2} = |\bar g|^2 - (\tfrac1m - f)\,\hat t, \qquad
            \widehat{\mathrm{tr}\,\Sigma_1} = b\,(1 - \tfrac1N)\,\hat t

        The last is the covariance of one sample (divisor N), from which the noise scale follows.

        Raises:
            RuntimeError: fewer than two micro-batches. ValueError: `population` without `batch_size`, or smaller than
                what was drawn.

        Reference: Cochran, Sampling Techniques, chapter 2: the finite population correction.
        """
        m, b, n = self.count, self.batch_size, population
        if m < 2:
            raise RuntimeError(f"RunningMoments.result: expected at least 2 updates before it, got {m}")
        if n is not None:
            n = _whole(n, "RunningMoments.result: population")
            if b is None:
                raise ValueError("RunningMoments.result: population expected a batch_size at construction, got None")
            if n < m * b:
                raise ValueError(
                    f"RunningMoments.result: population expected at least {m * b}, {m} micro-batches of {b}, got {n}"
                )
        drawn = 0.0 if n is None or b is None else b / n
        mean_sq, plain = self._sums()
        plain = plain / (m - 1)
        trace, unbiased = plain * (1 - drawn), mean_sq - plain * (1 / m - drawn)
        of_sample = plain.sum() * (nan if b is None else b * (1 - (0 if n is None else 1 / n)))
        return RunningMomentsResult(
            count=m,
            batch_size=b,
            population=n,
            mean=self._mean(),
            variance=self._variance((1 - drawn) / (m - 1)),
            sq_norms=torch.stack(self._sq_norms),
            trace_sigma=trace.sum(),
            grad_sq_norm=mean_sq.sum(),
            grad_sq_norm_unbiased=unbiased.sum(),
            nsr_batch=trace.sum() / unbiased.sum(),
            gns=of_sample / unbiased.sum(),
            names=list(self._names),
            slots={name: slice(i, i + 1) for i, name in enumerate(self._names)},
            slot_trace_sigma=self._slots(trace),
            slot_grad_sq_norm=self._slots(mean_sq),
            slot_grad_sq_norm_unbiased=self._slots(unbiased),
            slot_nsr_batch=self._slots(trace / unbiased),
        )

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Return |mean|^2 and the sum of squares of each parameter that has a gradient, in float64."""
        means, squares = list(self._means.values()), list(self._squares.values())
        ones = [x.new_ones(()).expand_as(x) for x in squares]
        of_means, of_squares = pair_sums_of([*means], [*squares]), pair_sums_of([*squares], [*ones])
        return ops.column(of_means, "first_sq", ops.PAIR_SUMS), ops.column(of_squares, "pair_dot", ops.PAIR_SUMS)

    def _mean(self) -> list[Tensor | None]:
        out: list[Tensor | None] = [None] * len(self._params)
        for i, x in self._means.items():
            out[i] = torch.view_as_complex(x.contiguous()).clone() if i in self._complex else x.clone()
        return out

    def _variance(self, factor: float) -> list[Tensor | None]:
        out: list[Tensor | None] = [None] * len(self._params)
        for i, x in self._squares.items():
            out[i] = (x.sum(-1) if i in self._complex else x) * factor
        return out

    def _slots(self, values: Tensor) -> Tensor:
        """Return `values` with a NaN for each parameter without a gradient."""
        out = values.new_full((len(self._params),), nan)
        out[list(self._means)] = values
        return out

    def __repr__(self) -> str:
        return f"RunningMoments({len(self._params)} parameters, {self.count} micro-batches)"


def _named(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> tuple[list[Tensor], list[str]]:
    """Return the parameters and their names."""
    if isinstance(params, Tensor):
        raise TypeError(
            f"RunningMoments: params is {ops.describe(params)}; expected several tensors, or pairs (name, tensor)"
        )
    found: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for i, entry in enumerate(params):
        name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else (str(i), entry)
        if not isinstance(name, str) or not isinstance(p, Tensor):
            raise TypeError(
                f"RunningMoments: params[{i}] is {ops.describe(entry)}; expected a tensor or a pair (name, tensor)"
            )
        if id(p) in seen:
            raise ValueError(f"RunningMoments: params[{i}], {name!r}, is the same tensor as {seen[id(p)]!r}")
        if name in found:
            raise ValueError(f"RunningMoments: params[{i}] has the name {name!r} of another one")
        found[name], seen[id(p)] = p, name
    if not found:
        raise ValueError("RunningMoments: params is empty; expected at least one tensor")
    return list(found.values()), list(found)


def _whole(x: object, what: str) -> int:
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise ValueError(f"{what} expected a whole number from 1, got {x!r}")
    return x


#: The dtypes that gradients are widened to; others are widened to float32.
_REAL = {
    torch.float64: torch.float64,
    torch.complex128: torch.complex128,
    torch.complex64: torch.complex64,
    torch.complex32: torch.complex64,
}


def _sample(grad: Tensor, name: str) -> Tensor:
    """Return a gradient as the pass reads it: dense, real, float64 or float32; no copy where it is so already."""
    if type(grad) not in (Tensor, torch.nn.Parameter):
        raise TypeError(
            f"RunningMoments.update: the gradient of {name!r} is {ops.describe(grad)}; expected a plain torch.Tensor"
        )
    ops.check_storage(grad, f"RunningMoments.update: the gradient of {name!r}")
    x = grad.detach().to(_REAL.get(grad.dtype, torch.float32))
    x = x if x.layout == torch.strided else x.to_dense()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).resolve_neg()


def _welford(means: list[Tensor], samples: list[Tensor], squares: list[Tensor], n: int) -> Tensor:
    """Make one pass, and return |sample|^2 of each parameter in float64."""
    if ops.kernels_take(samples):
        table = ops.welford_(means, samples, squares, n=n, stats="tensor")
        assert table is not None
        return ops.column(table, "grad_sq")
    from .. import reference

    rows = []
    for m, x, s in zip(means, samples, squares, strict=True):
        row = reference.welford_([m], [x], [s], n=n, stats="tensor")
        assert row is not None
        rows.append(ops.column(row, "grad_sq").to(samples[0].device))
    return torch.cat(rows)
