"""Tensors made of parameters alone, before any sample meets them: slices of a fused weight, 1 + w, a table's rows.

What a sample contributes to such a tensor goes back to the parameters through the same operations, kept as a small
graph of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contributions import Matrix, Part
from .sums import Sums, of_matrix
from .words import words

#: Every entry of the result is one entry of one operand, and none appears twice.
SELECTS = words(
    """view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose swapaxes swapdims t T mT H
    mH permute movedim moveaxis select narrow flip roll chunk split split_with_sizes tensor_split unbind cat concat
    concatenate stack hstack vstack contiguous clone to float double half bfloat16 type __iter__"""
)
#: Every entry of the result depends on one entry of the parameter.
ELEMENTWISE = words(
    """add sub mul div true_divide __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ rsub neg
    __neg__ negative positive exp expm1 log log1p sqrt rsqrt square abs absolute sigmoid tanh relu softplus silu
    gelu elu leaky_relu clamp clip clamp_min clamp_max pow __pow__ float_power reciprocal erf sin cos sign where
    masked_fill hardtanh logit"""
)


def selects(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation only picks entries, each at most once."""
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index)
    return name in SELECTS


@dataclass(eq=False)
class Derived:
    """A tensor made of parameters.

    `value` is it, on a graph that starts at `leaves`, stand-ins for the parameters by their id.
    """

    value: Tensor
    leaves: dict[int, Tensor]
    selects: bool  #: entries of parameters, each at most once
    elementwise: bool  #: or functions of one entry each
    transposed: int | None = None  #: the id of the parameter whose transpose, two-dimensional, this is

    def back(self, root: int, grad: Tensor) -> Tensor:
        """What a gradient of this tensor is of one of its parameters."""
        leaf = self.leaves[root]
        (out,) = torch.autograd.grad(
            self.value, leaf, grad.reshape(self.value.shape).to(self.value.dtype), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(leaf) if out is None else out

    def back_rows(self, root: int, rows: Tensor) -> Tensor:
        """The same of every row of a matrix."""
        grads = rows.reshape(len(rows), *self.value.shape).to(self.value.dtype)
        leaf = self.leaves[root]
        if self.value.numel() == leaf.numel() == 1 or len(rows) < 4:
            return torch.stack([self.back(root, g).reshape(-1) for g in grads])
        try:
            (out,) = torch.autograd.grad(
                self.value, leaf, grads, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # an operation that vmap does not know
            return torch.stack([self.back(root, g).reshape(-1) for g in grads])
        return rows.new_zeros(len(rows), leaf.numel()) if out is None else out.reshape(len(rows), -1)


@dataclass
class Through(Part):
    """Contributions to a parameter, through what was made of it."""

    part: Part
    derived: Derived
    root: int

    def __post_init__(self) -> None:
        self.batch = self.part.batch
        self.shape = self.derived.leaves[self.root].shape

    def only_moves(self) -> bool:
        """Whether squares may be taken before going back: then norms are of one parameter alone, too."""
        return self.derived.selects and len(self.derived.leaves) == 1

    def footprint(self) -> Tensor:
        """How often every entry of the parameter appears."""
        return self.derived.back(self.root, torch.ones_like(self.derived.value))

    def sums(self, squares: bool) -> Sums:
        rows = self.matrix()
        if rows is not None:
            return of_matrix(rows, squares).reshape(self.shape)
        if not self.only_moves():
            return super().sums(squares)
        of = self.part.sums(squares)
        centred = None if of.centred is None else self._back(of.centred)
        return Sums(self._back(of.total), centred, of.sq_norms)

    def _back(self, x: Tensor) -> Tensor:
        out = self.derived.back(self.root, x)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def sample(self, b: int) -> Tensor:
        return self.derived.back(self.root, self.part.sample(b))

    def matrix(self) -> Tensor | None:
        rows = self.part.matrix()
        return None if rows is None else self.derived.back_rows(self.root, rows)


def disjoint(parts: list[Part]) -> bool:
    """Whether they contribute to different entries of one parameter."""
    if not all(isinstance(p, Through) and p.only_moves() for p in parts):
        return False
    counts = sum(p.footprint() for p in parts if isinstance(p, Through))
    return bool((counts <= 1).all())  # type: ignore[union-attr]


def as_matrix(part: Part) -> Matrix | None:
    """A part whose contributions lie in memory."""
    rows = part.matrix()
    return None if rows is None else Matrix(rows, part.shape)
