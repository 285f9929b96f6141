"""The result of `GradientNoise`: fields and definitions as in `normkern.moments`, for a whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import errors
from .metric import Metric
from .sums import plain_sum, real, sq_norm, wide

_T = TypeVar("_T")
#: The quantities of `GradientNoiseResult.scalars`.
QUANTITIES = ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased", "nsr", "nsr_batch", "gns")
_KINDS = ("exact", "estimated", "excluded", "unused")
_PRECEDENCE = ("excluded", "estimated", "exact", "unused")  #: of a parameter's kinds in several results


@dataclass(frozen=True, eq=False)
class NoiseScalars:
    r"""Signal and noise of one parameter or of all, as float64 tensors of no dimension.

    Attributes:
        trace_sigma: :math:`\mathrm{tr}\,\Sigma`, of the per-sample gradients' covariance.
        grad_sq_norm: :math:`|\bar g|^2`.
        grad_sq_norm_unbiased: :math:`|\bar g|^2 - \mathrm{tr}\,\Sigma/B`, an estimate of :math:`|\nabla L|^2`.
        nsr: trace_sigma / grad_sq_norm.
        nsr_batch: nsr / B, the noise-to-signal ratio of the batch gradient.
        gns: trace_sigma / grad_sq_norm_unbiased, the simple gradient noise scale, in samples.
    """

    trace_sigma: Tensor
    grad_sq_norm: Tensor
    grad_sq_norm_unbiased: Tensor
    nsr: Tensor
    nsr_batch: Tensor
    gns: Tensor


@dataclass(frozen=True, eq=False)
class NoiseInMetric(NoiseScalars):
    """Signal and noise in the metric of an optimizer, of the whole model; see `GradientNoiseResult.in_metric`.

    Attributes:
        batch_size: B, the samples.
        per_param: `NoiseScalars` of each parameter.
    """

    batch_size: int
    per_param: dict[str, NoiseScalars]


@dataclass(frozen=True)
class Coverage:
    """How the trainable parameters were measured.

    Attributes:
        exact, estimated, excluded, unused: names. Unused ones got no gradient, and their contributions are exactly 0.
        parameters: share of all coordinates, by these four words.
        grad_sq: share of the squared norm of the whole gradient.
    """

    exact: tuple[str, ...]
    estimated: tuple[str, ...]
    excluded: tuple[str, ...]
    unused: tuple[str, ...]
    parameters: dict[str, float]
    grad_sq: dict[str, float]
    _sizes: dict[str, int] = field(repr=False, compare=False)
    _squares: dict[str, float] = field(repr=False, compare=False)

    @classmethod
    def of(cls, kinds: dict[str, str], sizes: dict[str, int], squares: dict[str, float]) -> Coverage:
        """Return the coverage from each parameter's kind, number of coordinates and squared gradient norm."""
        names = {kind: tuple(n for n, k in kinds.items() if k == kind) for kind in _KINDS}
        count, whole = sum(sizes.values()), math.fsum(squares.values())
        return cls(
            **names,
            parameters={kind: sum(sizes[n] for n in names[kind]) / count for kind in _KINDS},
            grad_sq={kind: math.fsum(squares[n] for n in names[kind]) / whole if whole else 0.0 for kind in _KINDS},
            _sizes=sizes,
            _squares=squares,
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{len(getattr(self, kind))} {kind} ({self.parameters[kind]:.1%} of parameters, {self.grad_sq[kind]:.1%} "
            "of |grad|^2)"
            for kind in _KINDS
            if getattr(self, kind)
        )


@dataclass(frozen=True, eq=False)
class GradientNoiseResult(NoiseScalars):
    r"""Statistics of the per-sample gradients :math:`g_b` of one context; ``trace_sigma`` … ``gns`` of the whole model.

    Excluded parameters are in none of them, estimated ones in all scalars; `coverage` says which those are. A result
    can be pickled, copied and saved; a copy has `mean` if it was read before.

    Attributes:
        batch_size: B, the samples.
        batchnorm: "eval" if the model has BatchNorm layers: they were measured with their running statistics.
        sq_norms: (B,) :math:`|g_b|^2` over all parameters, float64. Needs "norms" in `stats`.
        sq_norms_per_param: the same of each parameter.
        projections: (B,) :math:`\langle g_b, \bar g\rangle`, float64. Needs "projections" in `stats`.
        variance: per parameter, elementwise, unbiased, of its shape. Needs "variance" in `stats`.

    Raises:
        AttributeError: an attribute was not measured, because `stats` did not name it.
    """

    batch_size: int
    batchnorm: str | None
    _sq_norms: Tensor | None = field(repr=False)
    _sq_norms_per_param: dict[str, Tensor] | None = field(repr=False)
    _projections: Tensor | None = field(repr=False)
    _variance: dict[str, Tensor] | None = field(repr=False)
    _names: list[str] = field(repr=False)
    _traces: Tensor = field(repr=False)  #: of each parameter: trace_sigma,
    _signals: Tensor = field(repr=False)  #: and grad_sq_norm
    _read_mean: Callable[[], dict[str, Tensor]] | None = field(repr=False)
    _read_coverage: Callable[[], Coverage] | None = field(repr=False)

    @property
    def sq_norms(self) -> Tensor:
        """(B,) squared norms of the per-sample gradients."""
        return _measured(self._sq_norms, "sq_norms", "norms")

    @property
    def sq_norms_per_param(self) -> dict[str, Tensor]:
        """The same of each parameter."""
        return _measured(self._sq_norms_per_param, "sq_norms_per_param", "norms")

    @property
    def projections(self) -> Tensor:
        """(B,) inner products of the per-sample gradients with their mean."""
        return _measured(self._projections, "projections", "projections")

    @property
    def variance(self) -> dict[str, Tensor]:
        """Elementwise variance of the per-sample gradients of each parameter."""
        return _measured(self._variance, "variance", "variance")

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        r"""Per parameter, :math:`\bar g = \frac1B \sum_b g_b`, of its shape.

        Read from ``.grad`` when first asked for: RuntimeError if that has been changed since the backward.
        """
        if self._read_mean is None:
            raise errors.mean_not_copied()
        return self._read_mean()

    @cached_property
    def per_param(self) -> dict[str, NoiseScalars]:
        """`NoiseScalars` of each parameter."""
        return _per_param(self._names, self._traces, self._signals, self.batch_size)

    @cached_property
    def coverage(self) -> Coverage:
        """How each parameter was measured, a `Coverage`."""
        assert self._read_coverage is not None
        return self._read_coverage()

    def in_metric(self, optimizer: Any, model: nn.Module | None = None) -> NoiseInMetric:
        r"""Return signal and noise as Adam or RMSprop sees them: each coordinate divided by what its step divides by.

        .. math::
            \mathrm{tr}(D^{-1} \Sigma D^{-1}) = \sum_i \frac{\Sigma_{ii}}{d_i^2}, \qquad
            |D^{-1} \bar g|^2 = \sum_i \frac{\bar g_i^2}{d_i^2}, \qquad
            d = \sqrt{v/(1-\beta_2^t)} + \epsilon

        with the second moment v, the step count t and eps that `optimizer` has now; for RMSprop d = sqrt(v) + eps,
        centred if it is. With amsgrad v is the largest so far. The ratios are of these sums: "gns" is the batch size at
        which noise and signal of the preconditioned gradient are equal. Call it before the optimizer's step, which
        clips or clears the gradients that the mean is read from, and from the second step on.

        Args:
            optimizer: Adam, AdamW, RMSprop of torch or normkern, or one with the same state: ``exp_avg_sq`` and
                ``step``, or ``square_avg``. A wrapper with `param_groups` and `state` will do.
            model: names the optimizer's parameters; not needed if it was built from ``model.named_parameters()``.

        Returns:
            `NoiseInMetric`: float64 tensors on the device of the gradients, and the same of each parameter. Reads the
            step counts, which synchronizes where they are on a GPU. With DTensor state every process must call it.

        Raises:
            AttributeError: the variance was not measured: ``stats=("nsr", "variance")``.
            TypeError: `optimizer` has no param groups; `model` is no module.
            ValueError: a measured parameter is not in the optimizer, or has another shape or is complex there; the
                optimizer has no names and no model was given; it has no second moment, or none yet; its second moment
                is of SVAG's gradients, whose noise is larger.
            RuntimeError: ``.grad`` has changed since, so that the mean is not known; see `mean`.

        Reference: Malladi, Lyu, Panigrahi, Arora 2022, arXiv 2205.10287, where the noise of Adam enters in this metric.

        >>> import torch, normkern
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
        >>> opt = normkern.AdamW(model.named_parameters(), eps=0.0)
        >>> model(batch).mean().backward()
        >>> opt.step()  # v / (1 - beta2) = mean^2 = (4, 1)
        >>> noise = normkern.GradientNoise.measure(
        ...     model, lambda model, x: model(x).mean(), batch, stats=("nsr", "variance")
        ... )
        >>> round(noise.in_metric(opt).trace_sigma.item(), 4)  # 2/4 + 2/1
        2.5
        """
        variance, mean = self.variance, self.mean
        metric = Metric(optimizer, model, self._names, self.coverage.unused)
        traces, signals = torch.zeros_like(self._traces), torch.zeros_like(self._signals)
        for i, name in enumerate(self._names):
            d = metric.denominator(name, variance[name])
            if d is not None:  # else there was never a gradient
                traces[i] = plain_sum(variance[name].to(d) / d / d)
                signals[i] = sq_norm(mean[name].to(d) / d)
        per_param = _per_param(self._names, traces, signals, self.batch_size)
        whole = scalars(traces.sum(), signals.sum(), self.batch_size)
        return NoiseInMetric(**vars(whole), batch_size=self.batch_size, per_param=per_param)

    def scalars(
        self,
        quantities: Iterable[str] | str = ("gns", "nsr_batch", "trace_sigma", "grad_sq_norm_unbiased"),
        prefix: str = "noise/",
    ) -> dict[str, float]:
        r"""Return plain numbers for a logger: flat, finite, and in JSON as they are. Synchronizes.

        The keys are ``{prefix}{quantity}/{name}`` for each parameter and ``{prefix}{quantity}/all``. A number that is
        not known is absent: a ratio of 0 / 0, and "gns" where the noise hides the signal (where the unbiased estimate
        of :math:`|\nabla L|^2` is not positive). There is also ``{prefix}batch_size``, and ``{prefix}batchnorm_eval``
        = 1 if BatchNorm layers were measured with their running statistics.

        Args:
            quantities: of "trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased", "nsr", "nsr_batch", "gns".

        >>> import torch, normkern
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
        >>> result = normkern.GradientNoise.measure(model, lambda model, x: model(x).mean(), batch)
        >>> result.scalars("nsr_batch")
        {'noise/nsr_batch/weight': 0.4, 'noise/nsr_batch/all': 0.4, 'noise/batch_size': 2.0}
        """
        wanted = (quantities,) if isinstance(quantities, str) else tuple(quantities)
        if not all(isinstance(q, str) and q in QUANTITIES for q in wanted):
            raise errors.unknown_quantities(quantities, QUANTITIES)
        each = vars(scalars(self._traces, self._signals, self.batch_size))
        names = [*self._names, "all"]
        values: dict[str, float] = {}
        if wanted:
            of_all = ("grad_sq_norm_unbiased", *wanted)
            table = torch.stack([torch.cat([each[q], getattr(self, q).view(1)]) for q in of_all]).tolist()
            signals, columns = table[0], table[1:]
            for q, column in zip(wanted, columns, strict=True):
                for name, value, signal in zip(names, column, signals, strict=True):
                    if math.isfinite(value) and not (q == "gns" and signal <= 0):
                        values[f"{prefix}{q}/{name}"] = value
        values[f"{prefix}batch_size"] = float(self.batch_size)
        if self.batchnorm == "eval":
            values[f"{prefix}batchnorm_eval"] = 1.0
        return values

    @staticmethod
    def join(results: Iterable[GradientNoiseResult]) -> GradientNoiseResult:
        r"""Return the result of the concatenated batch, from results of its micro-batches.

        With :math:`B_i` samples, means :math:`\bar g_i` and centred sums :math:`S_i = (B_i - 1) \mathrm{tr}\,\Sigma_i`,

        .. math::
            B = \sum_i B_i, \qquad \bar g = \frac1B \sum_i B_i \bar g_i, \qquad
            S = \sum_i \bigl(S_i + B_i |\bar g_i - \bar g|^2\bigr).

        The mean of each result is read: join results of `GradientNoise.measure`, which have theirs; with a context of
        your own, `GradientNoise.open(join=True)` does the same without further memory. A parameter that one result
        excludes is excluded in all. Losses are those of each micro-batch by itself; if you divide each by their number
        m, ratios and "gns" stay, and squared quantities are divided by m².

        Raises:
            TypeError, ValueError: no results, or results with projections, of different models or statistics.
        """
        parts = list(results) if isinstance(results, Iterable) else [results]
        bad = next((type(p).__name__ for p in parts if not isinstance(p, GradientNoiseResult)), None)
        if bad is not None or not parts:
            raise errors.not_results(bad or "none")
        return parts[0] if len(parts) == 1 else _joined(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Return plain data: the coverage as it is, and no way back to the model."""
        state = {**self.__dict__, "coverage": self.coverage}
        state["_read_mean"] = state["_read_coverage"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _measured(value: _T | None, attribute: str, tier: str) -> _T:
    if value is None:
        raise errors.not_asked_for(attribute, tier)
    return value


def scalars(trace: Tensor, mean_sq: Tensor, batch: int) -> NoiseScalars:
    """Return all scalars from the trace and the squared norm of the mean."""
    unbiased = mean_sq - trace / batch
    nsr = trace / mean_sq
    return NoiseScalars(trace, mean_sq, unbiased, nsr, nsr / batch, trace / unbiased)


def _per_param(names: Sequence[str], traces: Tensor, signals: Tensor, batch: int) -> dict[str, NoiseScalars]:
    columns = vars(scalars(traces, signals, batch))
    return {n: NoiseScalars(**{k: c[i] for k, c in columns.items()}) for i, n in enumerate(names)}


def _joined(parts: Sequence[GradientNoiseResult]) -> GradientNoiseResult:
    every = [set(p._names) | set(p.coverage.excluded) for p in parts]
    if any(names != every[0] for names in every):
        raise errors.different_results("parameters")
    if any(p._projections is not None for p in parts):
        raise errors.joined_projections()
    for tier in ("_variance", "_sq_norms"):
        if len({getattr(p, tier) is None for p in parts}) > 1:
            raise errors.different_results("statistics")
    excluded = {name for p in parts for name in p.coverage.excluded}
    names = [n for n in parts[0]._names if n not in excluded]
    if not names:
        raise errors.all_excluded()
    batch = sum(p.batch_size for p in parts)
    means: dict[str, Tensor] = {}
    sums, signals = [], []
    variance: dict[str, Tensor] | None = None if parts[0]._variance is None else {}
    for name in names:
        of = [p.mean[name] for p in parts]
        kind = wide(of[0].dtype)
        mean = torch.stack([m.to(kind) * (p.batch_size / batch) for m, p in zip(of, parts, strict=True)]).sum(0)
        shifts = [m.to(kind) - mean for m in of]
        within = torch.stack([p._traces[p._names.index(name)] * (p.batch_size - 1) for p in parts]).sum()
        between = torch.stack([sq_norm(s) * p.batch_size for s, p in zip(shifts, parts, strict=True)]).sum()
        sums.append(within + between.to(within.device))
        signals.append(sq_norm(mean).to(within.device))
        means[name] = mean
        if variance is not None:
            centred = torch.zeros_like(mean, dtype=real(kind))
            for s, p in zip(shifts, parts, strict=True):
                size = s.abs() if s.is_complex() else s
                centred.addcmul_(size, size, value=p.batch_size)
                centred.add_(p.variance[name].to(centred.dtype), alpha=p.batch_size - 1)
            variance[name] = centred / (batch - 1)
    norms = None
    if parts[0]._sq_norms is not None:
        norms = {n: torch.cat([p.sq_norms_per_param[n] for p in parts]) for n in names}
    traces, squares = torch.stack(sums) / (batch - 1), torch.stack(signals)
    coverage = _joined_coverage(parts, dict(zip(names, squares.tolist(), strict=True)))
    return GradientNoiseResult(
        **vars(scalars(traces.sum(), squares.sum(), batch)),
        batch_size=batch,
        batchnorm=parts[0].batchnorm,
        _sq_norms=None if norms is None else torch.stack([n.to(traces.device) for n in norms.values()]).sum(0),
        _sq_norms_per_param=norms,
        _projections=None,
        _variance=variance,
        _names=names,
        _traces=traces,
        _signals=squares,
        _read_mean=lambda: means,
        _read_coverage=lambda: coverage,
    )


def _joined_coverage(parts: Sequence[GradientNoiseResult], squares: dict[str, float]) -> Coverage:
    """Return the coverage of all, where a parameter that one result excludes is excluded.

    `squares` are of the measured parameters' joint gradients; of the excluded ones the results' average is taken.
    """
    kinds: dict[str, str] = {}
    for p in parts:
        for kind in reversed(_KINDS):
            for name in getattr(p.coverage, kind):
                kinds[name] = min(kind, kinds.get(name, kind), key=_PRECEDENCE.index)
    mean_squares = {n: math.fsum(p.coverage._squares[n] for p in parts) / len(parts) for n in kinds}
    return Coverage.of(kinds, parts[0].coverage._sizes, {**mean_squares, **squares})
