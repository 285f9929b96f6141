"""Samples in any order along one dimension: what packing sequences, and picking samples by an index, leave.

`SampleLayout` says with one number where the samples are, if they lie in order. `Numbered` lists the sample of every
entry along a dimension. Operations that do not know it treat such a tensor as one whose samples are mixed. Recurrent
layers, packing and unpacking know it, and layers that treat every row by itself run on the rows of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import sample_layout
from .sample_layout import Mixed, SampleLayout, State


@dataclass(frozen=True, slots=True, eq=False)
class Numbered(Mixed):
    """Of a tensor whose entries along `dim` are of the samples `numbers`."""

    dim: int
    numbers: Tensor  #: (size of dim,), int64, on the CPU


#: The samples along a dimension: how many consecutive entries each has, where they lie in order; else their numbers.
Order = int | Tensor


def order_of(numbers: Tensor, batch: int) -> Order:
    """Return the samples of these numbers in the shorter form, if they have it."""
    inner = sample_layout.block_of(numbers.int(), batch)
    return numbers if inner is None else inner


def ordered(shape: Sequence[int], dim: int, order: Order, batch: int) -> State:
    """Return the state of a tensor whose entries along a dimension are of these samples."""
    if isinstance(order, Tensor):
        order = order_of(order, batch)
    if isinstance(order, Tensor):
        return Numbered("they are in another order, or of different lengths", dim, order)
    return SampleLayout(sample_layout.block_on(shape, dim, order))


def order_along(shape: Sequence[int], state: State, dim: int, batch: int) -> Order | None:
    """Return the samples of a tensor's entries along a dimension; None: the samples are not along it."""
    if isinstance(state, Numbered):
        return state.numbers if state.dim == dim else None
    if not isinstance(state, SampleLayout):
        return None
    found = sample_layout.axis(shape, state.block, batch)
    return found[1] if found is not None and found[0] == dim else None


def is_same(a: Order, b: Order) -> bool:
    """Return whether the samples lie alike."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return isinstance(a, int) and isinstance(b, int) and a == b


def numbers_of(order: Order, size: int, batch: int) -> Tensor:
    """Return the sample of each of `size` entries."""
    return order if isinstance(order, Tensor) else torch.arange(size) // order % batch


def packed_numbers(columns: Tensor, batch_sizes: Sequence[int]) -> Tensor:
    """Return the samples of the rows of a packed sequence, from those of its sequences, the longest first."""
    return torch.cat([columns[:n] for n in batch_sizes])


def state_of_packed(x: PackedSequence, batch: int) -> State:
    """Return the state of a packed sequence's data."""
    order = torch.arange(batch) if x.sorted_indices is None else x.sorted_indices.cpu()
    return ordered(x.data.shape, 0, packed_numbers(order, x.batch_sizes.tolist()), batch)


@dataclass(frozen=True, slots=True)
class Grouping:
    """The way from rows in any order to the rows of each sample, (B, longest), and back."""

    batch: int
    longest: int
    places: Tensor  #: (rows,) where a row goes, counted over all samples
    rows: Tensor  #: (B * longest,) which row comes there; 0 where a sample has no more
    device: torch.device

    @classmethod
    def of(cls, numbers: Tensor, batch: int, device: torch.device) -> Grouping:
        """Return the grouping of rows by their samples."""
        order = numbers.argsort(stable=True)
        counts = numbers.bincount(minlength=batch)
        longest = int(counts.max())
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[numbers[order]]
        places = numbers * longest + rank
        rows = torch.zeros(batch * longest, dtype=torch.int64)
        rows[places] = torch.arange(len(places))
        return cls(batch, longest, places.to(device), rows.to(device), device)

    def group(self, x: Tensor) -> Tensor:
        """Return (B, longest, *) of (rows, *); zeros where a sample has no more rows."""
        out = x.new_zeros(self.batch * self.longest, *x.shape[1:])
        return out.index_copy_(0, self.places, x).unflatten(0, (self.batch, self.longest))


def by_rows(x: Tensor, state: Numbered, batch: int, run: Callable[[Tensor], Any]) -> tuple[Any, State]:
    """Return the result of an operation that treats the entries along `state.dim` by themselves, and its state.

    Args:
        x: its operand that has samples.
        run: the operation on (B, entries of a sample, *), whose result begins with the same two dimensions. Entries
            that a sample lacks are copies of another one; no gradient comes back to them.
    """
    with torch._C.DisableTorchFunction():
        to = Grouping.of(state.numbers, batch, x.device)
        grouped = x.movedim(state.dim, 0).index_select(0, to.rows).unflatten(0, (batch, to.longest))
    out = run(grouped)
    with torch._C.DisableTorchFunction():
        out = out.flatten(0, 1).index_select(0, to.places).movedim(0, state.dim)
    return out, Numbered(state.why, state.dim, state.numbers)
