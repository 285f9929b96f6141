"""Contributions of one use of a tensor to its gradient, sample by sample.

A `Contribution` computes its sums over the samples (fast, by the layer's own kernel), one sample's contribution (little
memory, any combination), and the inner products of all contributions with one tensor. The classes here serve several
layer kinds; each other one stands in its layer kind's file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sums import Sums, of_matrix, one_by_one, parts, wide


class Contribution:
    """Contributions c_b to one tensor's gradient, b = 0 … batch-1, each of the tensor's shape.

    A subclass sets `batch` and `shape` and defines `sample`; it overrides the others where it has a faster way.
    """

    batch: int
    shape: torch.Size

    def sums(self, squares: bool) -> Sums:
        """Return the total, the centred squares (if asked for) and the norms."""
        return one_by_one(self.batch, self.sample, squares)

    def total(self) -> Tensor:
        """Return sum_b c_b."""
        return self.sums(False).total

    def sample(self, b: int) -> Tensor:
        """Return c_b."""
        raise NotImplementedError

    def matrix(self) -> Tensor | None:
        """Return all c_b as rows, where they lie in memory already."""
        return None

    def project(self, on: Tensor) -> Tensor:
        """Return (B,) <c_b, on>, float64; the real part, where they are complex."""
        on = parts(on).double()
        return torch.stack([(parts(self.sample(b)).double() * on).sum() for b in range(self.batch)])

    def size(self) -> float:
        """Return the norm of all contributions, for the rounding of their sum."""
        return self.sums(False).sq_norms.sum().sqrt().item()

    def merge(self, others: Sequence[Contribution]) -> Contribution | None:
        """Return one contribution that is the sum of this and others to the same tensor; None: it has no such form."""
        return None


@dataclass
class Matrix(Contribution):
    """Contributions that lie in memory, as rows: those to biases, norms and parameters that are broadcast."""

    rows: Tensor
    shape: torch.Size
    norms: Callable[[], Tensor] | None = None  #: the rows' squared norms, where another contribution needs them too

    def __post_init__(self) -> None:
        self.batch = self.rows.shape[0]

    def sums(self, squares: bool) -> Sums:
        if self.norms is not None and not squares:
            return Sums(self.total(), None, self.norms())
        return of_matrix(self.rows, squares).reshape(self.shape)

    def total(self) -> Tensor:
        return self.rows.sum(0, dtype=wide(self.rows.dtype)).reshape(self.shape)

    def sample(self, b: int) -> Tensor:
        return self.rows[b].reshape(self.shape)

    def matrix(self) -> Tensor:
        return self.rows

    def project(self, on: Tensor) -> Tensor:
        return parts(self.rows).double().flatten(1) @ parts(on).double().reshape(-1)

    def merge(self, others: Sequence[Contribution]) -> Matrix | None:
        """Add the rows."""
        every = [c.matrix() for c in (self, *others)]
        if any(rows is None for rows in every):
            return None
        return Matrix(sum(rows.to(wide(rows.dtype)) for rows in every if rows is not None), self.shape)  # type: ignore[arg-type]


@dataclass
class Loop(Contribution):
    """Contributions that a function computes for one sample at a time."""

    batch: int
    shape: torch.Size
    one: Callable[[int], Tensor]

    def sample(self, b: int) -> Tensor:
        return self.one(b)
