"""The distance between what an op wrote and the reference, in roundings."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .places import PLACES, SIZES, bits

NO_FMA = ("v2", "portable")  # levels on which every multiply-add rounds twice
SUMS_OFF = 1e-13  # sums in float64 of products that float64 holds, relative to those of the absolute values


@dataclass(frozen=True)
class Written:
    """The output of an op: the tensors, flat and one after the other; its table of sums; any `trespass`."""

    tensors: dict[str, Tensor]
    sums: Tensor
    trespass: str | None

    @property
    def bits(self) -> list[Tensor]:
        """The bits of tensors and sums, for comparison."""
        return [*map(bits, self.tensors.values()), bits(self.sums)]


@dataclass(frozen=True)
class Difference:
    """The largest number of roundings in any coordinate, and a sentence if that is too many."""

    roundings: float
    fault: str | None


def roundings_allowed(isa: str, dtype: torch.dtype) -> float:
    """Return how many roundings an op may have on the way to a stored value; in float64 the reference has some too."""
    return (7.0 if isa in NO_FMA else 4.0) + (7.0 if dtype == torch.float64 else 0.0)


def difference(name: str, got: Tensor, exact: Tensor, size: Tensor, allowed: float) -> Difference:
    """Compare `got` with `exact`; `size`: the largest intermediate result, half a unit of which is one rounding.

    The one rounding to a narrow storage type does not count.
    """
    error = (got.double() - exact).abs()
    if got.dtype not in (torch.float64, torch.float32):
        t = torch.finfo(got.dtype)
        error -= 0.5 * t.eps * (exact.abs() * (1 + 1e-6) + t.smallest_normal)
    real = torch.float64 if got.dtype == torch.float64 else torch.float32
    roundings = (error / (0.5 * torch.finfo(real).eps * size)).nan_to_num(nan=math.inf)
    roundings[same(got.double(), exact)] = 0
    worst = max(0.0, float(roundings.max()))
    if worst <= allowed:
        return Difference(worst, None)
    # A wrong number is a better hint than an infinity that became NaN.
    finite = torch.where(roundings.isfinite(), roundings, 0)
    i = int((finite if finite.max() > allowed else roundings).argmax())
    ends = list(accumulate(SIZES))
    place = bisect_right(ends, i)
    where, shape = i - ends[place] + SIZES[place], PLACES[place][0]
    return Difference(
        worst,
        f"{name}[{where}] of shape {shape} is {float(got[i]):.9g}, expected {float(exact[i]):.9g} "
        f"({int((roundings > allowed).sum())} of {len(got)} are wrong)",
    )


def same(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors are equal; NaN equals NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def sums_difference(names: Sequence[str], got: Tensor, exact: Tensor, allowed: Tensor) -> Difference:
    """Compare a table of sums with the exact one, both (tensors, names); `allowed`: the error that each may have."""
    wrong = ~((got - exact).abs() <= allowed) & ~same(got, exact)
    if not wrong.any():
        return Difference(0.0, None)
    i, k = wrong.nonzero()[0].tolist()
    here, expected = (f"{float(x[i, k]):.15g}" for x in (got, exact))
    return Difference(math.inf, f"{names[k]} of shape {PLACES[i][0]} is {here}, expected {expected}")


def worst(found: Sequence[Difference]) -> Difference:
    """Return the first difference with a fault, or else the largest one."""
    return next((x for x in found if x.fault), max(found, key=lambda x: x.roundings))
