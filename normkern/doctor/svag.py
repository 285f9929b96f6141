"""`svag_combine_` and `pair_sums`: how they are run at odd places, and what is right."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from .differences import Difference, Written, difference, sums_difference
from .places import Laid, flat, trespass, values
from .sgd import combination_size
from .sgd import pair_sums as exact_pair_sums

RULES: dict[str, dict[str, Any]] = {"l = 1/2": {"l": 0.5}, "l = 1": {"l": 1}, "l = 8": {"l": 8}}
SUMS_RULES: dict[str, dict[str, Any]] = {"pairs": {}}


def run(options: dict[str, Any], dtype: torch.dtype) -> Written:
    """`ops.svag_combine_`."""
    _, b, _, a = values(dtype)
    laid_a, laid_b = Laid(a, first=3), Laid(b, first=4, dense=True)
    ops.svag_combine_(laid_a.tensors, laid_b.tensors, **options)
    tensors = {"a": flat(laid_a.tensors)}
    return Written(tensors, torch.empty(0), trespass({"a": laid_a, "b": laid_b}, {"second gradients": (laid_b, b)}))


def compare(options: dict[str, Any], dtype: torch.dtype, written: Written, allowed: float) -> Difference:
    """With `reference.svag_combine_` in float64."""
    from .. import reference

    if written.trespass:
        return Difference(0.0, written.trespass)
    _, b, _, a = (x.double() for x in values(dtype))
    exact = a.clone()
    reference.svag_combine_([exact], [b], **options)
    return difference("a", written.tensors["a"], exact, combination_size(a, b, options["l"]), allowed)


def run_sums(options: dict[str, Any], dtype: torch.dtype) -> Written:
    """`ops.pair_sums`."""
    _, b, _, a = values(dtype)
    laid_a, laid_b = Laid(a, first=3), Laid(b, first=4, dense=True)
    table = ops.pair_sums(laid_a.tensors, laid_b.tensors, **options)
    read = {"first gradients": (laid_a, a), "second gradients": (laid_b, b)}
    return Written({}, table.contiguous(), trespass({"a": laid_a, "b": laid_b}, read))


def compare_sums(options: dict[str, Any], dtype: torch.dtype, written: Written, allowed: float) -> Difference:
    """With `reference.gradient_sums` in float64."""
    if written.trespass:
        return Difference(0.0, written.trespass)
    _, b, _, a = (x.double() for x in values(dtype))
    return sums_difference(ops.PAIR_SUMS, written.sums, *exact_pair_sums(a, b))
