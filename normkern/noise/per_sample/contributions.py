"""What one use of a tensor contributes to its gradient, sample by sample: a class for each kind of layer.

A part can say its sums over the samples (fast, by the layer's own kernel), one sample's contribution (small memory, any
combination), and the inner products of all contributions with one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .sums import Sums, of_matrix, one_by_one, real


class Part:
    """Contributions c_b to one tensor's gradient, b = 0 … batch-1, each of the tensor's shape."""

    batch: int
    shape: torch.Size

    def sums(self, squares: bool) -> Sums:
        """Total, centred squares and norms."""
        return one_by_one(self.batch, self.sample, squares)

    def total(self) -> Tensor:
        """sum_b c_b."""
        return self.sums(False).total

    def sample(self, b: int) -> Tensor:
        """c_b."""
        raise NotImplementedError

    def matrix(self) -> Tensor | None:
        """All c_b as rows, where they are there already."""
        return None

    def project(self, on: Tensor) -> Tensor:
        """(B,) <c_b, on>, float64."""
        on = on.double()
        return torch.stack([(self.sample(b).double() * on).sum() for b in range(self.batch)])


@dataclass
class Matrix(Part):
    """Contributions that lie in memory, as rows: of biases, norms, whatever is broadcast."""

    rows: Tensor
    shape: torch.Size
    norms: Callable[[], Tensor] | None = None  #: the rows' squared norms, where somebody else needs them, too

    def __post_init__(self) -> None:
        self.batch = len(self.rows)

    def sums(self, squares: bool) -> Sums:
        if self.norms is not None and not squares:
            return Sums(self.total(), None, self.norms())
        return of_matrix(self.rows, squares).reshape(self.shape)

    def total(self) -> Tensor:
        return self.rows.sum(0, dtype=real(self.rows.dtype)).reshape(self.shape)

    def sample(self, b: int) -> Tensor:
        return self.rows[b].reshape(self.shape)

    def matrix(self) -> Tensor:
        return self.rows

    def project(self, on: Tensor) -> Tensor:
        return self.rows.double() @ on.double().reshape(-1)


@dataclass
class Outer(Part):
    r"""Linear layers: :math:`c_b = \sum_t g_{bt} a_{bt}^\top`; a (B, T, I), g (B, T, O)."""

    a: Tensor
    g: Tensor
    shape: torch.Size  #: (O, I), or one of as many entries
    g_norms: Callable[[], Tensor] | None = None  #: of T = 1: the squared norms of g, where somebody else needs them

    def __post_init__(self) -> None:
        self.batch = len(self.a)

    def sums(self, squares: bool) -> Sums:
        return Sums(*kernels.outer(self.a, self.g, squares, self.g_norms)).reshape(self.shape)

    def total(self) -> Tensor:
        kind = real(self.a.dtype)
        a, g = self.a.to(kind).reshape(-1, self.a.shape[2]), self.g.to(kind).reshape(-1, self.g.shape[2])
        return (g.t() @ a).reshape(self.shape)

    def sample(self, b: int) -> Tensor:
        kind = real(self.a.dtype)
        return (self.g[b].to(kind).t() @ self.a[b].to(kind)).reshape(self.shape)

    def project(self, on: Tensor) -> Tensor:
        kind = real(self.a.dtype)
        on = on.to(kind).reshape(self.g.shape[2], self.a.shape[2])
        return ((self.a.to(kind) @ on.t()).double() * self.g.double()).sum((1, 2))

    def beside(self, others: list[Outer]) -> Outer:
        """All of them as one: more time steps."""
        every = [self, *others]
        return Outer(torch.cat([p.a for p in every], 1), torch.cat([p.g for p in every], 1), self.shape)


@dataclass
class Conv(Part):
    """Convolutions: x (B, C, ...), g (B, O, ...), the left padding of each dimension; transposed ones with x and g
    swapped."""

    x: Tensor
    g: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    shape: torch.Size

    def __post_init__(self) -> None:
        self.batch = len(self.x)

    def _of(self, x: Tensor, g: Tensor, squares: bool) -> Sums:
        x, g = kernels.one_dtype(x, g)
        sums = kernels.of(x, g).conv_moments(
            x, g, self.kernel_size, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, squares=squares,
        )  # fmt: skip
        return Sums(*sums).reshape(self.shape)

    def sums(self, squares: bool) -> Sums:
        return self._of(self.x, self.g, squares)

    def sample(self, b: int) -> Tensor:
        return self._of(self.x[b : b + 1], self.g[b : b + 1], False).total


@dataclass
class Lookup(Part):
    """Embeddings: ids (B, T), g (B, T, D)."""

    ids: Tensor
    g: Tensor
    padding_idx: int | None
    shape: torch.Size  #: (V, D)

    def __post_init__(self) -> None:
        self.batch = len(self.ids)

    def sums(self, squares: bool) -> Sums:
        sums = kernels.of(self.g).embedding_moments(
            self.ids, self.g, self.shape[0], padding_idx=self.padding_idx, squares=squares
        )
        return Sums(*sums)

    def _kept(self) -> Tensor:
        g = self.g.to(real(self.g.dtype))
        if self.padding_idx is None:
            return g
        return g.masked_fill((self.ids == self.padding_idx % self.shape[0])[..., None], 0)

    def sample(self, b: int) -> Tensor:
        g = self._kept()[b]
        return g.new_zeros(self.shape).index_add_(0, self.ids[b], g)

    def project(self, on: Tensor) -> Tensor:
        return (on[self.ids].double() * self._kept().double()).sum((1, 2))


@dataclass
class Loop(Part):
    """Anything that can be done for one sample alone."""

    batch: int
    shape: torch.Size
    one: Callable[[int], Tensor]

    def sample(self, b: int) -> Tensor:
        return self.one(b)


def conv_as_samples(x: Tensor, g: Tensor, batch: int, inner: int) -> tuple[Tensor, Tensor]:
    """Images folded into the batch, as one more dimension of space: (N, C, ...) to (B, C, N/B, ...)."""

    def unfold(t: Tensor) -> Tensor:
        outer = len(t) // (batch * inner)
        t = t.reshape(outer, batch, inner, *t.shape[1:]).transpose(0, 1)  # B, outer, inner, C, ...
        return t.reshape(batch, outer * inner, *t.shape[3:]).transpose(1, 2)

    return unfold(x), unfold(g)
