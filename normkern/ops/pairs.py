"""Pairs of gradients, and running moments of many: SVAG's combination, inner products, Welford's update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_traced
from ._binary import Pass
from .checks import check_l, check_pairs, why_refused
from .launch import run_pass, torch_op
from .types import PAIR_SUMS, Stats, column, stats_code

#: The columns that the kernel of `pair_sums` writes, in its order.
_DIFFERENCE_SUMS = ("first_sq", "second_sq", "pair_dot", "pair_difference_sq")


def svag_combine_(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], l: float) -> None:
    r"""Combine two gradients as SVAG does, in place and in one pass.

    .. math::
        a' = \tfrac12 (a+b) + \tfrac12 \sqrt{2l-1}\,(a-b)

    Args:
        grads_a: tensors of a dtype in `DTYPES` on one device, any shapes and strides; updated in place.
        grads_b: same shapes and dtypes; read only. An entry may be None if its partner is.
        l: at least 1/2; 1 leaves `grads_a` as they are, to the bit.

    Raises:
        TypeError: an entry is not a plain tensor of these dtypes, dtypes or devices differ, or only one of two is None.
        ValueError: lengths or shapes differ, l < 1/2, memory overlaps. Nothing is written.

    Reference: Li, Malladi and Arora, arXiv 2102.12470, section 4. Nothing is synchronised.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    >>> svag_combine_([a], [b], l=5)
    >>> a
    tensor([-1.,  2.])
    """
    if is_traced():
        return _traced_svag_combine_(list(grads_a), list(grads_b), l)
    check_l(l, "svag_combine_")
    a, b = _both("svag_combine_", grads_a, grads_b)
    step = Pass()
    step.begin()
    refused = step.add_svag_combine(a, b, l)
    if refused:
        raise TypeError(why_refused("svag_combine_", refused[0], {"grads_a": a, "grads_b": b}))
    run_pass(step, measured=False)


def _traced_svag_combine_(a: list[Any], b: list[Any], l: float) -> None:
    """Run `svag_combine_` through ``torch.ops``, whose op takes no None."""
    check_pairs("svag_combine_", a, b)
    there = [i for i, x in enumerate(a) if x is not None]
    torch_op("svag_combine_", [a[i] for i in there], [b[i] for i in there], l)


def pair_sums(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], stats: Stats = "tensor") -> Tensor:
    r"""Compute inner products and norms of pairs of gradients, in one pass: `PAIR_SUMS` of every slot.

    Args:
        grads_a, grads_b: tensors of a dtype in `DTYPES` on one device, pairs of equal shape and dtype. An entry
            may be None if its partner is: NaN.
        stats: "tensor" or "row".

    Returns:
        (slots, len(PAIR_SUMS)) float64 on their device: :math:`\langle a,b\rangle, |a-b|^2, |a|^2, |b|^2`. Nothing is
        synchronised.

    Raises:
        TypeError, ValueError: as `svag_combine_`.

    >>> pair_sums([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 2.0])])
    tensor([[ 7.,  4.,  5., 13.]], dtype=torch.float64)
    """
    if is_traced():
        return torch_op("pair_sums", list(grads_a), list(grads_b), stats)
    a, b = _both("pair_sums", grads_a, grads_b)
    step = Pass()
    step.begin()
    refused = step.add_difference(a, b, stats_code(stats, "pair_sums"))
    if refused:
        raise TypeError(why_refused("pair_sums", refused[0], {"grads_a": a, "grads_b": b}))
    table = run_pass(step, measured=True)
    assert table is not None
    return torch.stack([column(table, name, _DIFFERENCE_SUMS) for name in PAIR_SUMS], dim=1)


def welford_(
    means: Sequence[Tensor], samples: Sequence[Tensor | None], squares: Sequence[Tensor], *, n: int, stats: Stats = None
) -> Tensor | None:
    r"""Update running means and sums of squared deviations by the n-th sample (Welford), in one pass.

    .. math::
        m' = m + (x - m)/n, \quad s' = s + (x - m)(x - m')

    Args:
        means, squares: tensors of a dtype in `DTYPES` on one device; updated in place. Zeros before n = 1.
        samples: same shapes and dtypes; read only; None skips the entry.
        n: of this sample, from 1.
        stats: None, "tensor" or "row".

    Returns:
        None, or with `stats` float64 (slots, len(SUMS)) on their device: `SUMS` with m for the weights and x for the
        gradient.

    Raises:
        TypeError, ValueError: as `sgd_`.

    Reference: Welford 1962, Technometrics 4(3).

    >>> m, s = torch.zeros(2), torch.zeros(2)
    >>> for n, x in enumerate([[1.0, 5.0], [3.0, 5.0]], start=1):
    ...     welford_([m], [torch.tensor(x)], [s], n=n)
    >>> m, s
    (tensor([2., 5.]), tensor([2., 0.]))
    """
    if is_traced():
        table = torch_op("welford_", list(means), list(samples), list(squares), n=n, stats=stats)
        return None if stats is None else table
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"welford_: n expected a whole number from 1, got {n!r}")
    m, x, s = list(means), list(samples), list(squares)
    step = Pass()
    step.begin()
    refused = step.add_welford(m, x, s, 1 / n, stats_code(stats, "welford_"))
    if refused:
        raise TypeError(why_refused("welford_", refused[0], {"means": m, "samples": x, "squares": s}))
    return run_pass(step, measured=stats is not None)


def _both(op: str, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> tuple[list[Any], list[Any]]:
    """Return both lists of gradients, checked."""
    a, b = list(a), list(b)
    check_pairs(op, a, b)
    return a, b
