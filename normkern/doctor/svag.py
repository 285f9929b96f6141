"""`svag_combine_` and `pair_sums`: runs them at odd places and compares them with the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import machine
from .differences import Difference, Written, difference, sums_difference
from .places import Laid, flat, trespass, values
from .sgd import combination_size
from .sgd import pair_sums as exact_pair_sums

RULES: dict[str, dict[str, Any]] = {"l = 1/2": {"l": 0.5}, "l = 1": {"l": 1}, "l = 8": {"l": 8}}
SUMS_RULES: dict[str, dict[str, Any]] = {"pairs": {}}


def run(options: dict[str, Any], dtype: torch.dtype, threads: int) -> Written:
    """Run `ops.svag_combine_`."""
    _, b, _, a = values(dtype)
    laid_a, laid_b = Laid(a, first=3), Laid(b, first=4, dense=True)
    with machine.threads(threads):
        ops.svag_combine_(laid_a.tensors, laid_b.tensors, **options)
    tensors = {"a": flat(laid_a.tensors)}
    return Written(tensors, torch.empty(0), trespass({"a": laid_a, "b": laid_b}, {"second gradients": (laid_b, b)}))


def expected(options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what `reference.svag_combine_` computes in float64, and the largest intermediate results."""
    from .. import reference

    _, b, _, a = (x.double() for x in values(dtype))
    exact = a.clone()
    reference.svag_combine_([exact], [b], **options)
    return exact, combination_size(a, b, options["l"])


def compare(exact: tuple[Tensor, Tensor], written: Written, allowed: float) -> Difference:
    """Compare with the exact combination."""
    if written.trespass:
        return Difference(0.0, written.trespass)
    return difference("a", written.tensors["a"], *exact, allowed)


def run_sums(options: dict[str, Any], dtype: torch.dtype, threads: int) -> Written:
    """Run `ops.pair_sums`."""
    _, b, _, a = values(dtype)
    laid_a, laid_b = Laid(a, first=3), Laid(b, first=4, dense=True)
    with machine.threads(threads):
        table = ops.pair_sums(laid_a.tensors, laid_b.tensors, **options)
    read = {"first gradients": (laid_a, a), "second gradients": (laid_b, b)}
    return Written({}, table.contiguous(), trespass({"a": laid_a, "b": laid_b}, read))


def expected_sums(options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what `reference.gradient_sums` computes in float64, and the error that each sum may have."""
    _, b, _, a = (x.double() for x in values(dtype))
    return exact_pair_sums(a, b)


def compare_sums(exact: tuple[Tensor, Tensor], written: Written, allowed: float) -> Difference:
    """Compare with the exact sums."""
    if written.trespass:
        return Difference(0.0, written.trespass)
    return sums_difference(ops.PAIR_SUMS, written.sums, *exact)
