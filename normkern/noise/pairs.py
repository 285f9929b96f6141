"""Gradient noise from pairs of independent batch gradients, once or averaged over many steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops


@dataclass(frozen=True)
class Noise:
    r"""Signal and noise of a batch gradient g, with mean :math:`\nabla L` and covariance :math:`\Sigma`.

    float64 tensors of no dimension, or of shape (slots,). Estimates without bias can be negative, and are not clipped.
    A standard error is ``nan`` after one observation.

    Attributes:
        grad_sq_norm_unbiased: estimate of :math:`|\nabla L|^2`.
        trace_sigma: estimate of :math:`\mathrm{tr}\,\Sigma`, the covariance of the batch gradient.
        nsr_batch: trace_sigma / grad_sq_norm_unbiased, the noise-to-signal ratio of the batch gradient.
        grad_sq_norm_unbiased_stderr, trace_sigma_stderr, nsr_batch_stderr: standard errors over the steps, as if those
            were independent; that of the ratio by the delta method.
        names, slots: names of the parameters and where their slots are, as in `StepStats`.
        slot_grad_sq_norm_unbiased, slot_trace_sigma, slot_nsr_batch: the same per slot; NaN where there was no pair.
        count: number of steps, or pairs.
    """

    grad_sq_norm_unbiased: Tensor
    trace_sigma: Tensor
    nsr_batch: Tensor
    grad_sq_norm_unbiased_stderr: Tensor
    trace_sigma_stderr: Tensor
    nsr_batch_stderr: Tensor
    names: list[str]
    slots: dict[str, slice]
    slot_grad_sq_norm_unbiased: Tensor
    slot_trace_sigma: Tensor
    slot_nsr_batch: Tensor
    count: int


class NoiseAverage:
    r"""Exponential averages of :math:`\langle g_1,g_2\rangle` and :math:`|g_1-g_2|^2/2`, per slot and in all.

    Weights are :math:`\beta^{t-i}`, normalised, so that the first steps are not biased towards zero; numerator and
    denominator of the ratio are averaged separately (a mean of ratios would be biased). A slot without a pair keeps its
    average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self._all = _Average(decay)

    def add(self, pair_sums: Tensor, seen: Callable[[], Tensor] | None = None) -> None:
        """Add one step's sums, a column for each of `ops.PAIR_SUMS`; NaN in rows without a pair. Synchronises.

        `seen` returns which rows have a pair, as a pair may hold a NaN; it is called only if there is one. Without it
        rows whose norms are NaN have none.
        """
        if self.count == 0:
            names = [ops.PAIR_SUMS.index(name) for name in ("pair_dot", "pair_difference_sq")]
            self._columns = torch.tensor(names, device=pair_sums.device)
            self._weight = pair_sums.new_zeros(len(pair_sums), 1)
            self._mean = pair_sums.new_zeros(len(pair_sums), len(names))
        self.count += 1
        x = pair_sums.index_select(1, self._columns)
        dot, difference_sq = x.sum(0).tolist()
        if math.isnan(dot) or math.isnan(difference_sq):
            rows = (_has_norms(pair_sums) if seen is None else seen()).view(-1, 1)
            dot, difference_sq = torch.where(rows, x, 0.0).sum(0).tolist()
            self._weight = torch.where(rows, self.decay * self._weight + 1, self._weight)
            self._mean = torch.where(rows, self._mean + (x - self._mean) / self._weight, self._mean)
        else:
            self._weight.mul_(self.decay).add_(1)
            self._mean.add_((x - self._mean).div_(self._weight))
        self._all.add(dot, 0.5 * difference_sq)

    @property
    def slots(self) -> int:
        """The number of slots; 0 before the first step."""
        return 0 if self.count == 0 else len(self._mean)

    def fits(self, slots: int) -> bool:
        """Return whether sums of so many slots can be added."""
        return self.count == 0 or self.slots == slots

    def result(self, names: list[str], slots: dict[str, slice]) -> Noise:
        """Return the averages so far."""
        signal, difference_sq = torch.where(self._weight > 0, self._mean, torch.nan).unbind(1)
        noise = 0.5 * difference_sq
        a, b, c = (self._mean.new_tensor(x) for x in self._all.estimates())
        d, e, f = (self._mean.new_tensor(x) for x in self._all.standard_errors())
        return Noise(a, b, c, d, e, f, names, slots, signal, noise, noise / signal, self.count)


def _has_norms(pair_sums: Tensor) -> Tensor:
    first_sq, second_sq = (ops.column(pair_sums, name, ops.PAIR_SUMS) for name in ("first_sq", "second_sq"))
    return ~(first_sq.isnan() & second_sq.isnan())


class _Average:
    """Weighted mean, variance and covariance of two numbers, signal and noise, by West's update."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weight = 0.0  # of all, with the newest as 1
        self.squares = 0.0  # of the normalised weights
        self.signal = self.noise = 0.0
        self.of_signal = self.of_noise = self.covariance = 0.0  # weighted means of squared deviations

    def add(self, signal: float, noise: float) -> None:
        self.weight = self.decay * self.weight + 1
        share = 1 / self.weight
        a, b, keep = signal - self.signal, noise - self.noise, 1 - share
        self.signal += share * a
        self.noise += share * b
        self.of_signal = keep * (self.of_signal + share * a * a)
        self.of_noise = keep * (self.of_noise + share * b * b)
        self.covariance = keep * (self.covariance + share * a * b)
        self.squares = keep**2 * self.squares + share**2

    def estimates(self) -> tuple[float, float, float]:
        """Return signal, noise and their ratio."""
        return self.signal, self.noise, _ratio(self.noise, self.signal)

    def standard_errors(self) -> tuple[float, float, float]:
        """Return the standard errors of the estimates.

        The variance of a weighted mean is that of one observation times the sum of squares of its weights.
        """
        if self.squares >= 1:  # one observation
            return math.nan, math.nan, math.nan
        spread = self.squares / (1 - self.squares)  # the division makes the variance unbiased
        ratio = _ratio(self.noise, self.signal)
        deviation = self.of_noise - 2 * ratio * self.covariance + ratio**2 * self.of_signal
        of_ratio = _ratio(math.sqrt(max(deviation, 0.0) * spread), abs(self.signal))
        return math.sqrt(self.of_signal * spread), math.sqrt(self.of_noise * spread), of_ratio


def _ratio(a: float, b: float) -> float:
    """Return a / b as floating-point hardware does, also for b = 0."""
    return a / b if b != 0 else math.copysign(math.inf, a) if a else math.nan


def noise_from_pair(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None]) -> Noise:
    r"""Signal and noise from the gradients of two independent batches, in one pass over both.

    .. math::
        \widehat{|\nabla L|^2} = \langle a, b\rangle, \qquad \widehat{\mathrm{tr}\,\Sigma} = \tfrac12 |a - b|^2

    Both are unbiased, but one pair is noisy: average them separately over many (as `SVAG.noise` does), then divide.

    Args:
        grads_a, grads_b: lists of equal shapes, dtypes and devices; an entry may be None if its partner is.
            Tensors that no kernel takes fall back to torch.

    Returns:
        `Noise`; names are the positions in the lists, standard errors NaN.

    Raises:
        ValueError: lengths or shapes differ. TypeError: only one of two is None, or dtypes differ.

    Reference: the estimators for m = 2 of McCandlish et al., arXiv 1812.06162, appendix A.

    >>> noise = noise_from_pair([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 2.0])])
    >>> noise.grad_sq_norm_unbiased.item(), noise.trace_sigma.item()
    (7.0, 2.0)
    """
    a, b = list(grads_a), list(grads_b)
    ops.check_pairs("noise_from_pair", a, b)
    sums = pair_sums_of(a, b)
    average = NoiseAverage(0.0)
    average.add(sums, lambda: torch.tensor([x is not None for x in a], dtype=torch.bool, device=sums.device))
    names = [str(i) for i in range(len(sums))]
    return average.result(names, {name: slice(i, i + 1) for i, name in enumerate(names)})


def pair_sums_of(a: list[Tensor | None], b: list[Tensor | None]) -> Tensor:
    """Return `ops.pair_sums`, or those of `reference` for tensors that no kernel takes."""
    if ops.kernels_take((*a, *b)):
        return ops.pair_sums(a, b)
    from .. import reference

    ops.check_pairs("noise_from_pair", a, b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        ops.check_storage(x, f"noise_from_pair: grads_a[{i}]")
        ops.check_storage(y, f"noise_from_pair: grads_b[{i}]")
    return reference.pair_sums(a, b)
