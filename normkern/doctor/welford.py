"""`welford_`: how it is run at odd places, and what is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .differences import Difference, Written, difference, sums_difference, worst
from .places import Laid, flat, trespass, values
from .sgd import step_sums

RULES: dict[str, dict[str, Any]] = {"first sample": {"n": 1}, "seventh sample": {"n": 7}}


def run(options: dict[str, Any], dtype: torch.dtype) -> Written:
    """`ops.welford_` with sums, on means and squares at odd places and samples at others."""
    m, x, s, _ = values(dtype)
    laid = {"m": Laid(m, first=1), "x": Laid(x, first=4, dense=True), "s": Laid(s, first=2)}
    samples: list[Tensor | None] = list(laid["x"].tensors)
    table = ops.welford_(laid["m"].tensors, samples, laid["s"].tensors, stats="tensor", **options)
    assert table is not None
    tensors = {name: flat(laid[name].tensors) for name in ("m", "s")}
    return Written(tensors, table, trespass(laid, {"samples": (laid["x"], x)}))


def compare(options: dict[str, Any], dtype: torch.dtype, written: Written, allowed: float) -> Difference:
    """With `reference.welford_` in float64; the sums with those of the means that were stored."""
    from .. import reference

    if written.trespass:
        return Difference(0.0, written.trespass)
    m, x, s, _ = (y.double() for y in values(dtype))
    exact_m, exact_s = m.clone(), s.clone()
    reference.welford_([exact_m], [x], [exact_s], **options)
    deviation = x.abs() + m.abs()
    size_m = m.abs() + deviation / options["n"]
    size_s = s.abs() + deviation * (x.abs() + size_m)
    found = [
        difference("m", written.tensors["m"], exact_m, size_m, allowed),
        difference("s", written.tensors["s"], exact_s, size_s, allowed),
    ]
    exact, off = step_sums(m, x, written.tensors["m"].double(), x.abs(), m.abs() + size_m)
    found.append(sums_difference(ops.SUMS, written.sums, exact, off))
    return worst(found)
