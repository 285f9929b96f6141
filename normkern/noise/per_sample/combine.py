"""Sums the contributions of several uses of one parameter: those of a sample are added before they are squared."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .contributions import Contribution
from .derived import Through
from .sums import Sums, of_matrix, one_by_one, wide


def combined(contributions: Sequence[Contribution], squares: bool) -> Sums:
    """Return the sums of all contributions to one parameter, in the fastest way that fits them."""
    first, *others = contributions
    if not others:
        return first.sums(squares)
    merged = first.merge(others)
    if merged is not None:
        return merged.sums(squares)
    matrices = [c.matrix() for c in contributions]
    if all(m is not None for m in matrices):
        rows = sum(m.to(wide(m.dtype)) for m in matrices if m is not None)
        assert isinstance(rows, Tensor)
        return of_matrix(rows, squares).reshape(first.shape)
    if _disjoint(contributions):
        every = [c.sums(squares) for c in contributions]
        total, sq_norms = sum(s.total for s in every), sum(s.sq_norms for s in every)
        centred = sum(s.centred for s in every if s.centred is not None) if squares else None
        return Sums(total, centred, sq_norms)  # type: ignore[arg-type]
    return one_by_one(first.batch, lambda b: sum(c.sample(b).reshape(first.shape) for c in contributions), squares)  # type: ignore[arg-type, return-value]


def _disjoint(contributions: Sequence[Contribution]) -> bool:
    """Return whether the contributions are to different entries of one parameter."""
    moved = [c for c in contributions if isinstance(c, Through) and c.only_moves()]
    if len(moved) < len(contributions):
        return False
    counts = sum(c.footprint() for c in moved)
    return bool((counts <= 1).all())  # type: ignore[union-attr]
