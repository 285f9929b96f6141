r"""Multiplicative symmetries of a loss: the null space of inner products, and its simplest integer basis.

If the loss is the same for :math:`w_i \to c^{v_i} w_i`, whatever c, then :math:`\sum_i v_i \langle w_i, g_i\rangle = 0`
at every point and for every batch. Over random points and batches r, :math:`M_{ri} = \langle w_i, g_i\rangle`, the null
space of M has nothing else in it. Its vectors of zeros and ones are sets with a common scale that does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = tuple[float, ...]

_DENOMINATORS = 16
_MOST_NULL = 1e-3
_ROUNDING = 1e-3  # of the entries of a reduced basis


class NullSpace(NamedTuple):
    """The null space of M with columns divided by `scale`: orthonormal rows (dimension, columns), and their error."""

    rows: Tensor
    scale: Tensor
    error: float


def null_space(m: Tensor, tolerance: float) -> NullSpace:
    """Return the vectors that `m` (draws, tensors), float64, maps to nearly zero.

    Those to singular values, in units of the largest, below the widest gap between `tolerance` and a thousandth. Rows
    are as large as the gradients happened to be, and columns as what they are of: neither counts.
    """
    rows = m.norm(dim=1, keepdim=True)
    m = m / torch.where(rows > 0, rows, 1.0)
    scale = m.norm(dim=0)
    scale = torch.where(scale > 0, scale, 1.0)
    _, values, right = torch.linalg.svd(m / scale, full_matrices=True)
    values = torch.cat([values, values.new_zeros(m.shape[1] - len(values))])
    units = values / values.max().clamp(min=torch.finfo(m.dtype).tiny)
    steps = [1.0, *units.clamp(tolerance / 100, 1.0).tolist(), tolerance / 100]
    cuts = [i for i, (above, below) in enumerate(pairwise(steps)) if above > tolerance and below < _MOST_NULL]
    is_null = torch.arange(len(values)) >= max(cuts, key=lambda i: steps[i] / steps[i + 1])
    smallest = values[~is_null].min() if not is_null.all() else values.new_ones(())
    largest = values[is_null].max() if is_null.any() else values.new_zeros(())
    return NullSpace(right[is_null], scale, float(largest / smallest) + 1e-13)


def simplest_basis(space: NullSpace) -> list[Vector]:
    """Return a basis of integers with few entries, preferably all equal; the first of each is positive.

    A vector without simple proportions, which no network of products and homogeneous functions has, stays as it is.
    """
    if not len(space.rows):
        return []
    return _simplify([_integers(row) for row in _reduced(space).tolist()], prefer_joint=True)


def is_joint(v: Sequence[float]) -> bool:
    """Return whether a vector scales its support as one."""
    return all(x in (0.0, 1.0) for x in v)


def separate(vectors: list[Vector]) -> tuple[list[Vector], list[Vector]]:
    """Return joint sets that share no tensor, the smallest first; and what else spans the space, of few entries."""
    joint: list[Vector] = []
    others = [v for v in vectors if not is_joint(v)]
    for v in sorted(filter(is_joint, vectors), key=lambda v: _cost(v, prefer_joint=True)):
        overlapping = [u for u in joint if _overlap(u, v)]
        for u in overlapping:
            v = tuple(b - a for a, b in zip(u, v, strict=True))
        if overlapping:
            others.append(_signed(v))
        else:
            joint.append(v)
    simple = _simplify([*joint, *others], prefer_joint=False, start=len(joint))
    return sorted(joint, reverse=True), sorted(simple[len(joint) :], reverse=True)


def _reduced(space: NullSpace) -> Tensor:
    """Return the basis that is an identity in the first independent columns, in the scale of M's own columns."""
    chosen: list[int] = []
    found = space.rows.new_zeros(0, len(space.rows))  # orthonormal
    for i, column in enumerate(space.rows.T):
        rest = column
        for _ in range(2):
            rest = rest - found.T @ (found @ rest)
        if rest.norm() > max(1e-3 * float(column.norm()), 30 * space.error):
            chosen.append(i)
            found = torch.cat([found, (rest / rest.norm())[None]])
        if len(chosen) == len(space.rows):
            break
    if len(chosen) < len(space.rows):
        return space.rows / space.scale
    reduced: Tensor = torch.linalg.solve(space.rows[:, chosen], space.rows)
    return reduced * space.scale[chosen, None] / space.scale


def _integers(row: list[float]) -> Vector:
    """Return small integers in the same proportions; the row itself where it has none."""
    fractions = [Fraction(x).limit_denominator(_DENOMINATORS) for x in row]
    if any(abs(f - x) > _ROUNDING * max(1.0, abs(x)) for f, x in zip(fractions, row, strict=True)):
        return _signed(tuple(0.0 if abs(x) < _ROUNDING else x for x in row))
    common = math.lcm(*(f.denominator for f in fractions))
    return _coprime([int(f * common) for f in fractions])


def _coprime(entries: list[int]) -> Vector:
    divisor = math.gcd(*entries) or 1
    return _signed(tuple(float(x // divisor) for x in entries))


def _signed(v: Vector) -> Vector:
    first = next((x for x in v if x), 1.0)
    return tuple(-x if x else 0.0 for x in v) if first < 0 else v


def _overlap(a: Vector, b: Vector) -> bool:
    return any(x and y for x, y in zip(a, b, strict=True))


def _cost(v: Vector, prefer_joint: bool) -> tuple[float, ...]:
    """Sort key: few entries first; then, for joint sets, late ones, which end a branch."""
    support = [i for i, x in enumerate(v) if x]
    joint = is_joint(v)
    span = support[-1] - support[0] if support else 0
    return len(support), joint != prefer_joint, sum(map(abs, v)), -sum(support) if joint else span


def _simplify(vectors: list[Vector], prefer_joint: bool, start: int = 0) -> list[Vector]:
    """Add or subtract vectors as long as that makes one simpler; those before `start` stay."""
    vectors = list(vectors)
    costs = [_cost(v, prefer_joint) for v in vectors]
    changed = True
    while changed:
        changed = False
        for i in range(start, len(vectors)):
            for j, other in enumerate(vectors):
                if i == j:
                    continue
                for sign in (-1, 1) if _overlap(vectors[i], other) else ():
                    new = tuple(a + sign * b for a, b in zip(vectors[i], other, strict=True))
                    new = _coprime([int(x) for x in new]) if all(x.is_integer() for x in new) else _signed(new)
                    cost = _cost(new, prefer_joint)
                    if cost < costs[i]:
                        vectors[i], costs[i], changed = new, cost, True
    return vectors
