"""What `GradientNoise` answers for an entry of the zoo: right, refused, wrong or crashed."""

from __future__ import annotations

import copy
import gc
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import normkern

from . import graph_models, other_models, timm_models, transformers_models
from .entry import SAMPLES, Entry, Problem, Zoo

#: Models have layers that compute in float32 whatever the dtype is.
TOLERANCE = 1e-4
SINGLE = 2e-3


def entries() -> Zoo:
    """Return all models whose library is installed."""
    zoo = Zoo()
    for models in (graph_models, transformers_models, other_models, timm_models):
        models.add(zoo)
    return zoo


def answer(entry: Entry) -> dict[str, Any]:
    """Return one line of the table: the answer, and why."""
    started = time.perf_counter()
    line: dict[str, Any] = {"library": entry.library, "model": entry.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        line.update(_answer(entry))
    gc.collect()
    return {**line, "seconds": round(time.perf_counter() - started, 1)}


def _answer(entry: Entry) -> dict[str, Any]:
    try:
        problem = entry.problem()
        loss = problem.loss(problem.model, range(SAMPLES))
        loss.backward()
    except Exception as error:  # of the library, on this configuration
        return {"answer": "not made", "why": f"{type(error).__name__}: {error}"[:300]}
    try:
        noise = _measured(problem)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        refused = "normkern" in where and isinstance(error, (RuntimeError, NotImplementedError, ValueError, TypeError))
        kind = "refused" if refused else "crashed"
        return {"answer": kind, "why": f"{type(error).__name__}: {error}"[:600]}
    if problem.instead is not None:
        problem = replace(problem, model=copy.deepcopy(problem.model).double())
        problem.instead(problem.model)
    worst = max(_errors(problem, noise))
    right = worst < (SINGLE if problem.single else TOLERANCE)
    return {"answer": "right" if right else "wrong", "error": float(f"{worst:.1e}")}


def _measured(problem: Problem) -> Any:
    problem.model.zero_grad()
    noise = normkern.GradientNoise(problem.model, stats=("nsr", "norms", "variance"), **problem.options)
    with noise:
        problem.loss(problem.model, range(SAMPLES)).backward()
    return noise.result()


def _errors(problem: Problem, result: Any) -> Iterator[float]:
    """Yield the relative errors of norms, variances and means.

    The loop takes each sample twice: torch's gradient of a batch of one is wrong on the CPU for some models.
    """
    named = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(SAMPLES):
        loss = problem.loss(problem.model, (i, i))
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if d is None else d for p, d in zip(named.values(), found, strict=True)])
    contributed = {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(named)}
    norms = sum(c.flatten(1).abs().square().sum(1) for c in contributed.values())
    assert isinstance(norms, Tensor)
    yield _apart(result.sq_norms, norms)
    size = max(float(c.abs().max()) for c in contributed.values())
    for name, c in contributed.items():
        yield _apart(result.mean[name], c.mean(0), size)
        yield _apart(result.variance[name], c.var(0), size**2)


def _apart(a: Tensor, b: Tensor, size: float = 0.0) -> float:
    """Return the distance relative to the larger of the tensors, or to a thousandth of all tensors' size."""
    scale = max(float(b.abs().max()), 1e-3 * size, 1e-30) if b.numel() else 1.0
    return float((a - b).abs().max()) / scale if b.numel() else 0.0
