"""The definitions, by a loop over samples in float64: contributions, and every field that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Problem


@dataclass(frozen=True)
class Expected:
    """What GradientNoise must say. One entry per parameter that requires a gradient, by its name."""

    batch_size: int
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    sq_norms: Tensor
    sq_norms_per_param: dict[str, Tensor]
    projections: Tensor
    scalars: dict[str, float]
    per_param: dict[str, dict[str, float]]


def contributions(problem: Problem) -> dict[str, Tensor]:
    """Name -> (B, *shape): c_b, the gradient of what sample b alone puts into the loss."""
    problem = problem.to(torch.float64)
    named = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(term, list(named.values()), allow_unused=True) for term in problem.terms()]
    return {
        name: torch.stack([torch.zeros_like(p) if row[i] is None else row[i].to_dense() for row in rows])
        for i, (name, p) in enumerate(named.items())
    }


def gradient(problem: Problem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Name -> `.grad` of the user's own backward; without those that have none."""
    problem = problem.to(dtype)
    problem.value().backward()
    return {name: p.grad.to_dense() for name, p in problem.model.named_parameters() if p.grad is not None}


def expected(contributed: dict[str, Tensor], reduction: str = "mean") -> Expected:
    batch_size = len(next(iter(contributed.values())))
    unit = batch_size if reduction == "mean" else 1
    g = {name: unit * c for name, c in contributed.items()}
    mean = {name: x.mean(0) for name, x in g.items()}
    squared = {name: x.reshape(batch_size, -1).square().sum(1) for name, x in g.items()}
    along = {name: x.reshape(batch_size, -1) @ mean[name].flatten() for name, x in g.items()}
    sq_norms, projections = sum(squared.values()), sum(along.values())
    variance = {name: x.var(0) for name, x in g.items()}
    traces = {name: float(v.sum()) for name, v in variance.items()}
    signals = {name: float(m.square().sum()) for name, m in mean.items()}
    return Expected(
        batch_size,
        mean,
        variance,
        {name: x.square().sum(0) / (batch_size - 1) for name, x in g.items()},
        sq_norms,
        squared,
        projections,
        scalars(sum(traces.values()), sum(signals.values()), batch_size),
        {name: scalars(traces[name], signals[name], batch_size) for name in g},
    )


def scalars(trace_sigma: float, grad_sq_norm: float, batch_size: int) -> dict[str, float]:
    unbiased = grad_sq_norm - trace_sigma / batch_size
    nsr = trace_sigma / grad_sq_norm if grad_sq_norm else torch.nan
    return {
        "trace_sigma": trace_sigma,
        "grad_sq_norm": grad_sq_norm,
        "grad_sq_norm_unbiased": unbiased,
        "nsr": nsr,
        "nsr_batch": nsr / batch_size,
        "gns": trace_sigma / unbiased if unbiased else torch.nan,
    }
