"""Tensors made of parameters alone, before any sample meets them: slices of a fused weight, 1 + w, a table's rows.

A sample's contribution to such a tensor goes back to the parameters through the same operations, which are kept as a
small graph of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contributions import Contribution
from .operation import Operation, tensors_in
from .sums import Sums, of_matrix

#: Every entry of the result is one entry of one operand, and none appears twice.
SELECTS = frozenset(
    """view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose swapaxes swapdims t T
    mT H mH permute movedim moveaxis select narrow flip roll chunk split split_with_sizes tensor_split unbind
    cat concat concatenate stack hstack vstack contiguous clone to float double half bfloat16 type __iter__""".split()
)
#: Draw random numbers, which a second call would draw anew: contributions cannot go back through them.
RANDOM = frozenset("""dropout alpha_dropout feature_alpha_dropout bernoulli multinomial gumbel_softmax rrelu""".split())
_TRANSPOSES = frozenset("t T mT transpose swapaxes swapdims permute".split())


@dataclass(eq=False)
class Derived:
    """A tensor made of parameters.

    `value` is a copy of it, on a graph that starts at `leaves`, stand-ins for the parameters by their id.
    """

    value: Tensor
    leaves: dict[int, Tensor]
    selects: bool  #: each entry is one of a parameter, and each of those appears at most once
    transposed: int | None = None  #: the id of the parameter whose transpose, two-dimensional, this is
    coarsest: torch.dtype = torch.float64  #: of all tensors on the way

    def back(self, root: int, grad: Tensor) -> Tensor:
        """Return the gradient of one of the parameters from a gradient of this tensor."""
        leaf = self.leaves[root]
        (out,) = torch.autograd.grad(
            self.value, leaf, grad.reshape(self.value.shape).to(self.value.dtype), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(leaf) if out is None else out

    def back_rows(self, root: int, rows: Tensor) -> Tensor:
        """Return the same for every row of a matrix."""
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


def derive(
    op: Operation,
    result: Tensor,
    find: Callable[[Tensor], Derived | None],
    leaf: Callable[[Tensor], Tensor],
    before: Tensor | None = None,
) -> list[Derived]:
    """Run an operation on parameters once more, on its own graph.

    Args:
        op: the operation; `op.parameters` are parameters and tensors derived from them.
        result: the first tensor that it returned.
        find: returns what a tensor was derived from; None for a parameter itself.
        leaf: returns the stand-in of a parameter.
        before: a copy of the tensor that the operation wrote into, if that was not made of parameters before.
    """
    stands: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    transposed: int | None = None
    are_selected = True
    coarsest = result.dtype.to_real()
    writes = op.written() is result
    for t in op.parameters:
        d = find(t)
        if d is None:
            stands[id(t)] = leaves[id(t)] = leaf(t)
            if op.name in _TRANSPOSES:
                is_transpose = t.dim() == 2 and result.shape == t.shape[::-1] and result.stride() != t.stride()
                transposed = id(t) if is_transpose else None
        else:
            stands[id(t)] = d.value
            leaves.update(d.leaves)
            coarsest = coarser(coarsest, d.coarsest)
            are_selected = are_selected and d.selects
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        if writes:
            written = stands[id(result)] = stands[id(result)].clone() if before is None else before
        twin = op.run_with(lambda t: stands.get(id(t), t))
        if writes and op.name == "__setitem__":
            twin = written
    picks = _selects(op) and not writes
    return [Derived(value, leaves, are_selected and picks, transposed, coarsest) for value in tensors_in((twin,))]


@functools.cache
def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the dtype with the larger rounding error."""
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def _selects(op: Operation) -> bool:
    """Return whether an operation only picks entries, each at most once."""
    if op.name == "__getitem__":
        index = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
        return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) or _is_number(i) for i in index)
    return op.name in SELECTS


def _is_number(index: object) -> bool:
    return isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32)


@dataclass
class Through(Contribution):
    """Contributions to a parameter, through a tensor derived from it."""

    contribution: Contribution
    derived: Derived
    root: int

    def __post_init__(self) -> None:
        self.batch = self.contribution.batch
        self.shape = self.derived.leaves[self.root].shape

    def only_moves(self) -> bool:
        """Return whether squares may be taken before going back; then norms are of one parameter alone, too."""
        return self.derived.selects and len(self.derived.leaves) == 1

    def footprint(self) -> Tensor:
        """Return how often every entry of the parameter appears."""
        return self.derived.back(self.root, torch.ones_like(self.derived.value))

    def sums(self, squares: bool) -> Sums:
        rows = self.matrix()
        if rows is not None:
            return of_matrix(rows, squares).reshape(self.shape)
        if not self.only_moves():
            return super().sums(squares)
        of = self.contribution.sums(squares)
        centred = None if of.centred is None else self._back(of.centred)
        return Sums(self._back(of.total), centred, of.sq_norms)

    def _back(self, x: Tensor) -> Tensor:
        out = self.derived.back(self.root, x)
        out = out if x.is_complex() or not out.is_complex() else out.real
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def sample(self, b: int) -> Tensor:
        return self.derived.back(self.root, self.contribution.sample(b))

    def size(self) -> float:
        """Return the norm of the terms whose sums are the contributions: many may cancel on the way back."""
        return self.contribution.size() * max(1.0, self.derived.value.numel() / self.derived.leaves[self.root].numel())

    def merge(self, others: Sequence[Contribution]) -> Through | None:
        """Add contributions to the same tensor before they go back, as those of layers that share a table of places."""
        same = [c.contribution for c in others if type(c) is Through and c.derived is self.derived]
        merged = self.contribution.merge(same) if len(same) == len(others) else None
        return None if merged is None else Through(merged, self.derived, self.root)

    def matrix(self) -> Tensor | None:
        rows = self.contribution.matrix()
        return None if rows is None else self.derived.back_rows(self.root, rows)
