"""Whether a result says what the definitions say, within rounding of the size of what was added up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .reference import Expected

TIERS = ("nsr", "norms", "variance", "projections")
SCALARS = ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased", "nsr", "nsr_batch", "gns")
#: Of an error, in units of the squares that were added up to get the number.
BUDGET = {torch.float64: 1e-11, torch.float32: 2e-5}


def close(what: str, got: Any, wanted: Any, size: float, budget: float) -> None:
    got = got.detach().double() if isinstance(got, Tensor) else torch.tensor(float(got), dtype=torch.float64)
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    off = float((got - wanted).abs().max()) if got.numel() else 0.0
    assert off <= budget * size, (
        f"{what}: {off / size if size else off:.2g} off, in units of its terms ({budget:.0g} allowed)"
    )


def assert_says(result: Any, told: Expected, stats: tuple[str, ...], budget: float) -> None:
    """All fields of these tiers, of all parameters."""
    squares = float(told.sq_norms.mean())  # what every sum of squares is made of
    largest = max(float(m.max()) for m in told.second_moment.values() if m.numel())
    assert result.batch_size == told.batch_size
    if "norms" in stats:
        close("sq_norms", result.sq_norms, told.sq_norms, float(told.sq_norms.max()), budget)
        assert result.sq_norms.dtype == torch.float64
        for name, norms in told.sq_norms_per_param.items():
            got = result.sq_norms_per_param.get(name, torch.zeros_like(norms))  # no gradient, no entry
            close(f"sq_norms_per_param[{name}]", got, norms, float(norms.max()) + budget * squares, budget)
    if "projections" in stats:
        size = math.sqrt(float(told.sq_norms.max()) * squares)
        close("projections", result.projections, told.projections, size, budget)
    if "variance" in stats:
        for name, variance in told.variance.items():
            size = float(told.second_moment[name].max()) + budget * largest
            got = result.variance.get(name, torch.zeros_like(variance))
            close(f"variance[{name}]", got, variance, size, budget)
            got = result.mean.get(name, torch.zeros_like(variance))
            close(f"mean[{name}]", got, told.mean[name], gradient_size(told, name), budget)
    _scalars("", result, told.scalars, squares, squares, budget)
    for name, wanted in told.per_param.items():
        if name in result.per_param:
            own = float(told.sq_norms_per_param[name].mean())
            _scalars(f"per_param[{name}].", result.per_param[name], wanted, own, squares, budget)
        else:
            assert wanted["trace_sigma"] == wanted["grad_sq_norm"] == 0, f"per_param lacks {name}"


def gradient_size(told: Expected, name: str) -> float:
    """What a sample's gradient of this parameter is made of; where it is 0 by symmetry, that of others."""
    largest = max(float(m.max()) for m in told.second_moment.values() if m.numel())
    return math.sqrt(float(told.second_moment[name].max()) + 0.01 * largest)


def _scalars(where: str, got: Any, wanted: dict[str, float], own: float, squares: float, budget: float) -> None:
    size = 2 * own + budget * squares
    for field in ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased"):
        close(where + field, getattr(got, field), wanted[field], size, budget)
    # Ratios of numbers that are right: right, too, unless the divisor is rounding and nothing else.
    trace, signal, unbiased = (float(getattr(got, f)) for f in ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased"))
    for field, divisor in (("nsr", signal), ("nsr_batch", signal), ("gns", unbiased)):
        value = float(getattr(got, field))
        if abs(divisor) > 1e-3 * size:
            close(where + field, value, wanted[field], 4 * (1 + abs(wanted[field])) * size / abs(divisor), budget)
        if divisor != 0 and field != "nsr_batch":
            assert math.isclose(value, trace / divisor, rel_tol=1e-9), f"{where}{field} is not {trace} / {divisor}"
