"""The result of `GradientNoise`: fields and definitions as in `normkern.moments`, for a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor


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

    def __str__(self) -> str:
        return ", ".join(
            f"{len(getattr(self, kind))} {kind} ({self.parameters[kind]:.1%} of parameters, {self.grad_sq[kind]:.1%} "
            "of |grad|^2)"
            for kind in ("exact", "estimated", "excluded", "unused")
            if getattr(self, kind)
        )


@dataclass(frozen=True, eq=False)
class GradientNoiseResult(NoiseScalars):
    r"""Statistics of the per-sample gradients :math:`g_b` of one context; ``trace_sigma`` … ``gns`` of the whole model.

    Excluded parameters are in none of them, estimated ones in all scalars; `coverage` says which those are.

    Attributes:
        batch_size: B, the samples.
        sq_norms: (B,) :math:`|g_b|^2` over all parameters, float64; None without the tier "norms".
        sq_norms_per_param: the same of each parameter, or None.
        projections: (B,) :math:`\langle g_b, \bar g\rangle`, float64; None without the tier.
        variance: per parameter, elementwise, unbiased, of its shape; None without the tier.
    """

    batch_size: int
    sq_norms: Tensor | None = field(repr=False)
    sq_norms_per_param: dict[str, Tensor] | None = field(repr=False)
    projections: Tensor | None = field(repr=False)
    variance: dict[str, Tensor] | None = field(repr=False)
    _names: list[str] = field(repr=False)
    _traces: Tensor = field(repr=False)  #: of each parameter: trace_sigma,
    _signals: Tensor = field(repr=False)  #: and grad_sq_norm
    _read_mean: Callable[[], dict[str, Tensor]] = field(repr=False)
    _read_coverage: Callable[[], Coverage] = field(repr=False)

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        r"""Per parameter, :math:`\bar g = \frac1B \sum_b g_b`, of its shape.

        Read from ``.grad`` when first asked for: RuntimeError if that has been changed since the backward.
        """
        return self._read_mean()

    @cached_property
    def per_param(self) -> dict[str, NoiseScalars]:
        """`NoiseScalars` of each parameter."""
        columns = vars(scalars(self._traces, self._signals, self.batch_size))
        return {n: NoiseScalars(**{k: c[i] for k, c in columns.items()}) for i, n in enumerate(self._names)}

    @cached_property
    def coverage(self) -> Coverage:
        """How each parameter was measured, a `Coverage`."""
        return self._read_coverage()


def scalars(trace: Tensor, mean_sq: Tensor, batch: int) -> NoiseScalars:
    """Return all scalars from the trace and the squared norm of the mean."""
    unbiased = mean_sq - trace / batch
    nsr = trace / mean_sq
    return NoiseScalars(trace, mean_sq, unbiased, nsr, nsr / batch, trace / unbiased)
