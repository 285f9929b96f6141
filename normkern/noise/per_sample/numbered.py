"""Samples in any order: what picking by an index, sorting, packing sequences and loops over samples leave.

`SampleLayout` says with one number where the samples are, if they lie in order. `Numbered` lists the sample of each
entry, in a table that broadcasts to the tensor's shape: (rows, 1) for rows of features. The rules in `row_rules` say
what operations make of such tables; an operation without one leaves samples that cannot be told apart. Layers that
treat every row by itself run on the rows of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import sample_layout
from .sample_layout import Mixed, SampleLayout, State

NO_SAMPLE = -1  #: in the place of a sample: an entry that no sample made, as a row of zeros
_WHY = "they are in another order, or of different lengths"


@dataclass(frozen=True, slots=True, eq=False)
class Numbered(Mixed):
    """The state of a tensor whose entries belong to the samples in `table`. Other operations see mixed samples."""

    table: Tensor  #: int64, on the CPU; of the tensor's dimensions, of size 1 where the sample is the same along one

    def rows(self, shape: Sequence[int], dims: int) -> Tensor:
        """Return the samples of all rows, which are the first so many dimensions, as a vector."""
        return without_last(self.table, len(shape) - dims).expand(tuple(shape[:dims])).reshape(-1)

    def last(self) -> int:
        """Return how many dimensions there are up to the last one along which samples differ."""
        return max((d + 1 for d, size in enumerate(self.table.shape) if size != 1), default=0)


# ---- Tables ---------------------------------------------------------------------------------------------------------


def table_of(shape: Sequence[int], state: State, batch: int) -> Tensor | None:
    """Return the table of a tensor's samples; None: it has none, or they are mixed."""
    if isinstance(state, Numbered):
        return state.table
    if not isinstance(state, SampleLayout):
        return None
    found = sample_layout.axis(shape, state.block, batch)
    if found is None:
        return sample_layout.numbers(shape, state.block, batch).long()
    dim, inner = found
    numbers = torch.arange(shape[dim]) // inner % batch
    return numbers.view([-1 if d == dim else 1 for d in range(len(shape))])


def described(table: Tensor, shape: Sequence[int], batch: int) -> State:
    """Return the state of a tensor of this shape whose entries are of the samples in a table that broadcasts to it."""
    if not table.numel():
        return None
    table = table.long()
    for d, size in enumerate(table.shape):
        if size > 1 and bool((table == table.narrow(d, 0, 1)).all()):
            table = table.narrow(d, 0, 1)
    if table.numel() == 1 and int(table) == NO_SAMPLE:
        return None
    state = Numbered(_WHY, table.clone())
    dims = state.last()
    block = sample_layout.block_of(state.rows(shape, dims).int(), batch) if dims else None
    return state if block is None else SampleLayout(sample_layout.block_on(shape, dims - 1, block))


def without_last(table: Tensor, count: int) -> Tensor:
    """Return a table without its last dimensions, along which the samples do not differ."""
    for _ in range(count):
        table = table.select(-1, 0)
    return table


def merged(tables: Sequence[Tensor]) -> Tensor | None:
    """Return the table of what is computed from entries with these tables; None: different samples meet."""
    out, *others = tables
    for table in others:
        if out is table or (out.shape == table.shape and torch.equal(out, table)):
            continue
        if bool(((out != table) & (out != NO_SAMPLE) & (table != NO_SAMPLE)).any()):
            return None
        out = torch.maximum(out, table)
    return out


def constant_along(table: Tensor, dims: Sequence[int]) -> Tensor | None:
    """Return the table with size 1 along dimensions; None: samples differ along them."""
    for d in dims:
        if table.shape[d] != 1:
            most = table.amax(d, keepdim=True)
            if bool(((table != most) & (table != NO_SAMPLE)).any()):
                return None
            table = most
    return table


def filled(state: State, shape: Sequence[int], declared: Tensor | None, batch: int) -> State:
    """Return a state in which rows of no sample, of a tensor with as many rows as were declared, are as declared."""
    if declared is None or not isinstance(state, Numbered) or not bool((state.table == NO_SAMPLE).any()):
        return state
    if shape[0] != len(declared) or len(state.table) != len(declared) or state.last() != 1:
        return state
    table = merged([state.table, declared.view(-1, *(1,) * (len(shape) - 1))])
    return state if table is None else described(table, shape, batch)


# ---- Along one dimension --------------------------------------------------------------------------------------------

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
        return described(order.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]), shape, batch)
    return SampleLayout(sample_layout.block_on(shape, dim, order))


def order_along(shape: Sequence[int], state: State, dim: int, batch: int) -> Order | None:
    """Return the samples of a tensor's entries along a dimension; None: the samples are not along it."""
    if isinstance(state, Numbered):
        others = [d for d in range(len(shape)) if d != dim]
        is_along = all(state.table.shape[d] == 1 for d in others) and bool((state.table != NO_SAMPLE).all())
        return state.table.expand([n if d == dim else 1 for d, n in enumerate(shape)]).reshape(-1) if is_along else None
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


def by_rows(
    x: Tensor, state: Numbered, dims: int, batch: int, run: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the result of an operation that treats the first dimensions of x as rows, and the rows' samples.

    Args:
        x: its operand that has samples.
        dims: how many dimensions are rows.
        run: the operation on (B * rows of a sample, *), whose result begins with the same dimension. Rows that a
            sample lacks are copies of another one; no gradient comes back to them.
    """
    numbers = state.rows(x.shape, dims)
    with torch._C.DisableTorchFunction():
        to = Grouping.of(numbers.clamp(min=0), batch, x.device)
        grouped = x.flatten(0, dims - 1) if dims > 1 else x if dims else x[None]
        grouped = grouped.index_select(0, to.rows)
    out = run(grouped)
    with torch._C.DisableTorchFunction():
        out = out.index_select(0, to.places)
        return out.reshape(*x.shape[:dims], *out.shape[1:]), numbers.view(*x.shape[:dims], *(1,) * (out.dim() - 1))
