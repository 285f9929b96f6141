"""`welford_`: runs it at odd places and compares it with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import machine
from .differences import SUMS_OFF, Difference, Written, difference, sums_difference, worst
from .places import Laid, flat, trespass, values
from .sgd import step_sums

RULES: dict[str, dict[str, Any]] = {"first sample": {"n": 1}, "seventh sample": {"n": 7}}


def run(options: dict[str, Any], dtype: torch.dtype, threads: int) -> Written:
    """Run `ops.welford_` with sums, on means and squares at odd places and samples at others."""
    m, x, s, _ = values(dtype)
    laid = {"m": Laid(m, first=1), "x": Laid(x, first=4, dense=True), "s": Laid(s, first=2)}
    samples: list[Tensor | None] = list(laid["x"].tensors)
    with machine.threads(threads):
        table = ops.welford_(laid["m"].tensors, samples, laid["s"].tensors, stats="tensor", **options)
    assert table is not None
    tensors = {name: flat(laid[name].tensors) for name in ("m", "s")}
    return Written(tensors, table, trespass(laid, {"samples": (laid["x"], x)}))


@dataclass(frozen=True)
class Expected:
    """The exact mean and squares, the largest intermediate results on the way to them, and what the sums are of."""

    m: Tensor
    size_m: Tensor
    s: Tensor
    size_s: Tensor
    before: Tensor
    sample: Tensor
    sums_off: Tensor


def expected(options: dict[str, Any], dtype: torch.dtype) -> Expected:
    """Return what `reference.welford_` computes in float64."""
    from .. import reference

    m, x, s, _ = (y.double() for y in values(dtype))
    exact_m, exact_s = m.clone(), s.clone()
    reference.welford_([exact_m], [x], [exact_s], **options)
    deviation = x.abs() + m.abs()
    size_m = m.abs() + deviation / options["n"]
    size_s = s.abs() + deviation * (x.abs() + size_m)
    off = SUMS_OFF * step_sums(m.abs(), x.abs(), m.abs() + size_m).abs() + 1e-300
    return Expected(exact_m, size_m, exact_s, size_s, m, x, off)


def compare(exact: Expected, written: Written, allowed: float) -> Difference:
    """Compare with the exact results, and the sums with those of the means that were stored."""
    if written.trespass:
        return Difference(0.0, written.trespass)
    sums = step_sums(exact.before, exact.sample, written.tensors["m"].double())
    found = [
        difference("m", written.tensors["m"], exact.m, exact.size_m, allowed),
        difference("s", written.tensors["s"], exact.s, exact.size_s, allowed),
        sums_difference(ops.SUMS, written.sums, sums, exact.sums_off),
    ]
    return worst(found)
