"""Reads noise measurements of every kind as one series of signal and of noise per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noise.ddp import DDPNoiseResult
from ..noise.moments import Moments
from ..noise.pairs import Noise
from ..noise.per_sample import GradientNoiseResult
from ..noise.running_moments import RunningMomentsResult

_KEYS = ("trace_sigma", "grad_sq_norm_unbiased")
_SOURCES = "normkern.Noise, DDPNoiseResult, RunningMomentsResult, GradientNoiseResult, Moments"


class Series(NamedTuple):
    """Measurements in the order of time, float64 tensors (n,) on the CPU.

    Attributes:
        noise: estimates of the trace of the covariance of one sample's gradient.
        signal: unbiased estimates of the squared norm of the mean gradient.
        source: the type of the measurements.
        in_eval_mode: whether BatchNorm layers were measured with their running statistics.
        is_of_population: whether they are corrected for batches drawn without replacement.
    """

    noise: Tensor
    signal: Tensor
    source: str
    in_eval_mode: bool
    is_of_population: bool

    def without_replacement(self, population: int) -> Series:
        """Return it for batches that are disjoint parts of one data set.

        With the covariance S of the data set's samples (divisor N - 1), disjoint batch means have the covariance -S/N.
        """
        signal, noise = self.signal + self.noise / population, self.noise * (1 - 1 / population)
        return self._replace(signal=signal, noise=noise, is_of_population=True)


def read(
    measurements: Any,
    batch_size: int,
    gradient_samples: int | None,
    parameters: Iterable[str] | None,
    population: int | None,
) -> Series:
    """Return the series; the arguments are those of `normkern.advise`.

    Raises:
        TypeError, ValueError: what `normkern.advise` says.
    """
    names = None if parameters is None else _names(parameters)
    if isinstance(measurements, Mapping):
        series = _of_numbers(measurements, gradient_samples, names)
    else:
        series = _of_results(measurements, batch_size, gradient_samples, names)
    if population is None:
        return series
    if series.is_of_population:
        raise ValueError(
            "advise: population expected None, as the RunningMomentsResult are corrected for theirs already, got "
            f"{population}"
        )
    return series.without_replacement(population)


def _of_results(
    measurements: Any, batch_size: int, gradient_samples: int | None, names: frozenset[str] | None
) -> Series:
    results = list(measurements) if isinstance(measurements, Iterable) else [measurements]
    kinds = {type(r) for r in results}
    if len(kinds) > 1:
        raise TypeError(
            "advise: measurements expected results of one type, got "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))}; call advise for each type"
        )
    if len(results) < 2:
        raise ValueError(
            f"advise: measurements expected at least 2 results, got {len(results)}: one measurement has no interval; "
            "collect the result of every measured step in a list"
        )
    reader = next((read for kind, read in _READERS.items() if kinds == {kind}), None)
    if reader is None:
        raise TypeError(
            f"advise: measurements expected a list of one of {_SOURCES}, or a dict of arrays with the keys "
            f"{' and '.join(map(repr, _KEYS))}, got {type(results[0]).__name__}"
        )
    columns = [reader(r, batch_size, gradient_samples, names) for r in results]
    noise = torch.stack([noise for noise, _ in columns])
    signal = torch.stack([signal for _, signal in columns])
    eval_mode = any(isinstance(r, GradientNoiseResult) and r.batchnorm == "eval" for r in results)
    corrected = [isinstance(r, RunningMomentsResult) and r.population is not None for r in results]
    if any(corrected) and not all(corrected):
        raise ValueError("advise: measurements expected a population in all RunningMomentsResult or in none, got both")
    return Series(*_checked(noise, signal), type(results[0]).__name__, eval_mode, all(corrected))


def _names(parameters: Any) -> frozenset[str]:
    names = None if isinstance(parameters, str) or not isinstance(parameters, Iterable) else list(parameters)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"advise: parameters expected names of parameters, at least one, or None, got {parameters!r}")
    return frozenset(names)


def _of_numbers(table: Mapping[str, Any], gradient_samples: int | None, names: frozenset[str] | None) -> Series:
    if names is not None:
        raise ValueError(
            "advise: parameters expected None with a dict of arrays, whose sums are those of the parameters that you "
            "added up"
        )
    missing = [key for key in _KEYS if key not in table]
    if missing:
        raise ValueError(
            f"advise: measurements expected the keys {' and '.join(map(repr, _KEYS))}, got {sorted(map(str, table))}"
        )
    if gradient_samples is None:
        raise ValueError(
            "advise: gradient_samples expected the number of samples in each gradient whose covariance 'trace_sigma' "
            "is, got None; it is 1 for numbers of GradientNoise, and the batch size for pairs of batches"
        )
    noise, signal = (_column(key, table[key]) for key in _KEYS)
    if len(noise) != len(signal) or len(noise) < 2:
        raise ValueError(
            f"advise: measurements expected two arrays of one length of at least 2, got {len(noise)} and {len(signal)}"
        )
    return Series(*_checked(noise * gradient_samples, signal), "logged numbers", False, False)


def _column(key: str, values: Any) -> Tensor:
    try:
        if isinstance(values, Tensor):
            column = values.detach().double().cpu()
        else:
            column = torch.tensor([float(x) for x in values], dtype=torch.float64)
    except (TypeError, ValueError):
        column = torch.zeros(())
    if column.ndim != 1:
        raise TypeError(f"advise: measurements[{key!r}] expected an array of numbers, (n,), got {values!r}")
    return column


def _checked(noise: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    noise, signal = noise.double().cpu(), signal.double().cpu()
    bad = (~(noise.isfinite() & signal.isfinite())).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"advise: measurements expected finite numbers, got trace {noise[bad[0]]:g} and signal "
            f"{signal[bad[0]]:g} in measurement {bad[0]} ({len(bad)} in all); leave such steps out"
        )
    negative = (noise < 0).nonzero().flatten().tolist()
    if negative:
        raise ValueError(
            f"advise: measurements expected trace_sigma >= 0, got {noise[negative[0]]:g} in measurement {negative[0]}"
        )
    return noise, signal


def _slots(result: Any, names: frozenset[str] | None) -> tuple[Tensor, Tensor]:
    """Return trace and signal of a result with slots, of all parameters or of the named ones."""
    if names is None:
        return result.trace_sigma, result.grad_sq_norm_unbiased
    _check_names(names, result.slots)
    parts = [result.slots[name] for name in sorted(names)]

    def total(column: Tensor) -> Tensor:
        return torch.stack([column[part].sum() for part in parts]).sum()

    return total(result.slot_trace_sigma), total(result.slot_grad_sq_norm_unbiased)


def _check_names(names: frozenset[str], known: Iterable[str]) -> None:
    known = list(known)
    unknown = sorted(names.difference(known))
    if unknown:
        raise ValueError(
            f"advise: parameters expected names that the measurements have, got {unknown[0]!r}; they have "
            f"{', '.join(map(repr, known[:5]))}{', ...' if len(known) > 5 else ''}"
        )


def _size(own: int | None, given: int | None, kind: str) -> int:
    """Return the samples of a gradient: what the result knows, or what the user has given."""
    if own is not None and given is not None and own != given:
        raise ValueError(f"advise: gradient_samples expected {own}, which the {kind} has, or None, got {given}")
    size = own if own is not None else given
    if size is None:
        raise ValueError(
            f"advise: gradient_samples expected the samples of each measured gradient, as the {kind} has no "
            "batch_size, got None"
        )
    return size


def _of_pair(result: Noise, batch_size: int, given: int | None, names: frozenset[str] | None) -> tuple[Tensor, Tensor]:
    if math.isfinite(float(result.trace_sigma_stderr)):
        raise ValueError(
            "advise: measurements expected normkern.Noise of one pair each, got an average over steps, whose errors "
            "are unknown; construct the optimizer with SVAG(..., noise_decay=0) and collect opt.noise() after each step"
        )
    trace, signal = _slots(result, names)
    return trace * (batch_size if given is None else given), signal


def _of_ranks(
    result: DDPNoiseResult, batch_size: int, given: int | None, names: frozenset[str] | None
) -> tuple[Tensor, Tensor]:
    trace, signal = _slots(result, names)
    return trace * _size(result.batch_size, given, "DDPNoiseResult"), signal


def _of_micro_batches(
    result: RunningMomentsResult, batch_size: int, given: int | None, names: frozenset[str] | None
) -> tuple[Tensor, Tensor]:
    b, population = _size(result.batch_size, given, "RunningMomentsResult"), result.population
    trace, signal = _slots(result, names)
    of_sample = trace * b
    if population is not None:  # of one sample, from the plain variance: see `RunningMoments.result`
        of_sample = of_sample * (1 - 1 / population) / (1 - b / population)
    return of_sample, signal


def _of_samples(
    result: GradientNoiseResult | Moments, batch_size: int, given: int | None, names: frozenset[str] | None
) -> tuple[Tensor, Tensor]:
    _size(1, given, type(result).__name__)
    if names is None:
        return result.trace_sigma, result.grad_sq_norm_unbiased
    if isinstance(result, Moments):
        raise ValueError("advise: parameters expected None with Moments, which have no names of parameters")
    _check_names(names, result.per_param)
    parts = [result.per_param[name] for name in sorted(names)]
    return (
        torch.stack([p.trace_sigma for p in parts]).sum(),
        torch.stack([p.grad_sq_norm_unbiased for p in parts]).sum(),
    )


_READERS: dict[type, Callable[..., tuple[Tensor, Tensor]]] = {
    Noise: _of_pair,
    DDPNoiseResult: _of_ranks,
    RunningMomentsResult: _of_micro_batches,
    GradientNoiseResult: _of_samples,
    Moments: _of_samples,
}
