"""Rules for the place of samples in any order after an operation; `@numbers` registers one.

A rule is a function ``rule(op, results, table)``. ``table(t)`` returns the sample of each entry of an operand, in a
table that broadcasts to its shape; None where it has no samples. The rule returns the table of each result, None where
that has no samples; it raises `Apart` where samples meet. An operation without a rule mixes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import propagation
from .numbered import NO_SAMPLE, Numbered, constant_along, described, merged, table_of, without_last
from .operation import Operation, map_tensors, tensors_in
from .sample_layout import Mixed, State

TableOf = Callable[[Any], Tensor | None]
Rule = Callable[[Operation, list[Tensor], TableOf], list[Tensor | None]]

#: The rule of each operation, by its name.
RULES: dict[str, Rule] = {}


class Apart(Exception):
    """Samples meet, or an operation is not known to keep them apart: why."""


def numbers(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operations of these names."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def knows(name: str) -> bool:
    """Return whether an operation has a rule."""
    return name in RULES


def after(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Return the states of the results of an operation, some of whose operands have samples in any order."""
    rule = RULES.get(op.name)
    states = propagation.states_of(op)
    alone = _only_sample(list(states.values()))
    if rule is None:
        rest: State = Mixed(f"{op.name} is not known to treat every sample by itself")
        return [rest if alone is None else _of_one(y, alone) for y in results]

    def table(t: Any) -> Tensor | None:
        return table_of(t.shape, states.get(id(t)), batch) if isinstance(t, Tensor) else None

    try:
        found = rule(op, results, table)
        return [_state(op, t, y, batch) for t, y in zip(found, results, strict=True)]
    except Apart as why:
        return [Mixed(str(why)) if alone is None else _of_one(y, alone) for y in results]


def _only_sample(states: Sequence[State]) -> int | None:
    """Return the one sample that all operands with samples are of: then so is what any operation makes of them."""
    tables = [s.table for s in states if isinstance(s, Numbered)]
    if len(tables) < len(states) or any(t.numel() != 1 for t in tables):
        return None
    found = {int(t) for t in tables} - {NO_SAMPLE}
    return found.pop() if len(found) == 1 else None


def _of_one(result: Tensor, sample: int) -> State:
    return described(torch.full([1] * result.dim(), sample), result.shape, 0)


def _state(op: Operation, table: Tensor | None, result: Tensor, batch: int) -> State:
    if table is None:
        return None
    if table.dim() != result.dim() or any(n not in (1, m) for n, m in zip(table.shape, result.shape, strict=True)):
        return Mixed(f"{op.name} is not known to treat every sample by itself")
    return described(table, result.shape, batch)


def _met(op: Operation, tables: Sequence[Tensor | None]) -> Tensor | None:
    """Return the table of what is computed from entries with these tables."""
    some = [t for t in tables if t is not None]
    try:
        out = merged(some) if some else None
    except RuntimeError:  # shapes that do not broadcast
        raise Apart(f"{op.name} changed the shape") from None
    if out is None and some:
        raise Apart(f"{op.name} of operands whose samples do not lie side by side")
    return out


def _same_along(op: Operation, table: Tensor, dims: Sequence[int]) -> Tensor:
    out = constant_along(table, dims)
    if out is None:
        raise Apart(f"{op.name} goes over the samples")
    return out


def _whole(op: Operation, table: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return a table in full."""
    return torch.full(tuple(shape), NO_SAMPLE) if table is None else table.expand(tuple(shape))


# ---- Element by element ---------------------------------------------------------------------------------------------


_LIKE = frozenset("empty_like zeros_like ones_like full_like rand_like randn_like randint_like".split())


@numbers(*propagation.POINTWISE - _LIKE)
def pointwise(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Keep the samples, with broadcasting."""
    found = _met(op, [table(t) for t in op.tensors()])
    if found is not None and any(y.dim() < found.dim() for y in results):  # a loss, reduced
        return [
            found if y.dim() >= found.dim() else _same_along(op, found, range(found.dim())).reshape([1] * y.dim())
            for y in results
        ]
    return [
        None if found is None else found.reshape([1] * (y.dim() - found.dim()) + list(found.shape)) for y in results
    ]


@numbers(*_LIKE)
def like(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Keep the samples of what a tensor of numbers is made like; one of indices has none yet."""
    return [table(op.argument(0, "input")) if y.is_floating_point() else None for y in results]


@numbers("copy")
def copy(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Take the samples of what is copied."""
    found = table(op.args[1])
    return [
        None if found is None else found.reshape([1] * (y.dim() - found.dim()) + list(found.shape)) for y in results
    ]


# ---- Moves ----------------------------------------------------------------------------------------------------------


@numbers(*propagation.MOVES, "masked_select", "take", "index_select")
def moves(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Apply the operation to the numbers."""
    moved = op.args[0] if op.args else op.kwargs["tensors" if "tensors" in op.kwargs else "input"]
    sources = list(tensors_in((moved,)))
    if all(table(t) is None for t in sources):
        if isinstance(moved, Tensor) and any(table(t) is not None for t in op.tensors()):
            raise Apart(f"{op.name} by indices that have samples")
        return [None] * len(results)
    thin = _rows_alone(op, moved, table)

    def full(t: Tensor) -> Tensor:
        out = _whole(op, table(t), t.shape)
        for d in range(t.dim() if thin is None else thin, t.dim()):
            out = out.narrow(d, 0, 1)
        return propagation.in_memory_of(t, out) if op.name == "as_strided" else out

    args, kwargs = list(op.args), {k: v for k, v in op.kwargs.items() if k != "out"}
    try:
        with torch.no_grad():
            if op.args:
                args[0] = map_tensors(moved, full)
            else:
                kwargs["tensors" if "tensors" in kwargs else "input"] = map_tensors(moved, full)
            out = list(tensors_in((op.func(*args, **kwargs),)))
    except (RuntimeError, TypeError, NotImplementedError):
        raise Apart(f"{op.name} is not known to keep samples apart") from None
    if op.name == "as_strided" and any(bool((y == NO_SAMPLE).any()) for y in out):
        raise Apart("as_strided reads memory outside of its tensor")
    if op.name in ("__getitem__", "index_select", "gather", "take_along_dim") and isinstance(moved, Tensor):
        _check_indices(op, moved, out[0], table)
    return list(out)


def _rows_alone(op: Operation, moved: Any, table: TableOf) -> int | None:
    """Return how many dimensions an index goes over, where the samples do not differ along the others; else None."""
    if op.name == "__getitem__" and isinstance(op.args[1], Tensor):
        index = op.args[1]
        dims = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
    elif op.name == "index_select" and op.argument(1, "dim") == 0:
        dims = 1
    else:
        return None
    known = table(moved)
    assert known is not None
    return dims if all(n == 1 for n in known.shape[dims:]) else None


def _check_indices(op: Operation, moved: Tensor, out: Tensor, table: TableOf) -> None:
    """Refuse indices of one sample that pick entries of another."""
    for t in op.tensors():
        found = None if t is moved else table(t)
        if found is None:
            continue
        if op.name == "index_select" or found.dim() > out.dim():
            continue
        if op.name == "__getitem__":
            if not (isinstance(op.args[1], Tensor) and t.dtype not in (torch.bool, torch.uint8)):
                continue
            found = found.reshape(*found.shape, *(1,) * (out.dim() - found.dim()))
        _met(op, [out, found])


# ---- Reductions and scans -------------------------------------------------------------------------------------------


@numbers(*propagation.REDUCES)
def reduces(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Drop or shrink dimensions along which the samples do not differ."""
    second = op.args[1] if len(op.args) > 1 else op.kwargs.get("other")
    if isinstance(second, Tensor):
        if op.name == "cosine_similarity":
            raise Apart("cosine_similarity of folded samples")
        return pointwise(op, results, table)
    x = op.argument(0, "input")
    found = table(x)
    if found is None:
        return [None] * len(results)
    dims = propagation.reduced_dims(op, x.dim())
    over = range(x.dim()) if dims is None else dims
    found = _same_along(op, found, list(over))
    dropped = found[tuple(0 if d in over else slice(None) for d in range(x.dim()))]
    return [
        found if y.dim() == x.dim() else dropped if y.dim() == dropped.dim() else found.new_zeros(()) for y in results
    ]


@numbers(*propagation.MIXES - {"index_add", "index_copy", "index_fill", "scatter", "scatter_add", "scatter_reduce"})
def mixes(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Keep samples that do not differ along the dimension that is mixed; sorting moves them."""
    x = op.argument(0, "input")
    found = table(x)
    others = [t for t in op.tensors() if t is not x and table(t) is not None]
    if found is None or others:
        raise Apart(f"{op.name} of operands whose samples do not lie side by side")
    dims = [d for d in range(x.dim()) if found.shape[d] != 1 and not propagation.is_not_mixed(op, x, d, results[0])]
    if dims and op.name in ("sort", "topk"):
        moved = found.expand(x.shape).gather(dims[0], results[1].cpu())
        return [moved, moved]
    return [_same_along(op, found, dims)] * len(results)


@numbers("cdist")
def distances(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Return the distances of the rows of two tensors, of which each is of one sample."""
    parts: list[Tensor | None] = []
    for i, t in enumerate((op.argument(0, "x1"), op.argument(1, "x2"))):
        found = table(t)
        parts.append(None if found is None else _same_along(op, found, [t.dim() - 1]))
        if found is not None and i == 1:
            parts[1] = parts[1].mT  # type: ignore[union-attr]
    found = _met(op, parts)
    assert found is not None
    return [found.reshape([1] * (y.dim() - found.dim()) + list(found.shape)) for y in results]


@numbers(*propagation.ON_LAST)
def on_last(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Keep the samples of the dimensions before the last ones."""
    count = propagation.ON_LAST[op.name]
    leads: list[Tensor | None] = []
    for t in op.tensors():
        found = table(t)
        if found is not None:
            found = _same_along(op, found, range(t.dim() - count, t.dim()))
            leads.append(without_last(found, count))
    _check_weights(op, table)
    lead = _met(op, leads)
    assert lead is not None
    return [lead.reshape(*lead.shape, *(1,) * (y.dim() - lead.dim())) for y in results]


@numbers(*propagation.ON_FIRST)
def on_first(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Keep the samples of the first dimension."""
    _check_weights(op, table)
    found = _met(op, [None if table(t) is None else _first(op, table(t)) for t in op.tensors()])
    if found is None or any(len(found) not in (1, y.shape[0]) for y in results):
        raise Apart(f"{op.name} goes over the samples")
    return [found.reshape(-1, *(1,) * (y.dim() - 1)) for y in results]


def _check_weights(op: Operation, table: TableOf) -> None:
    if propagation.has_weights_of_samples(op, [t for t in op.tensors() if table(t) is not None]):
        raise Apart(f"{op.name} by weights that have samples")


def _first(op: Operation, table: Tensor | None) -> Tensor:
    assert table is not None
    return _same_along(op, table, range(1, table.dim())).reshape(-1)


@numbers("pad")
def pad(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Pad with entries of no sample."""
    x, widths, mode = op.bind("input pad mode value", mode="constant")[:3]
    found = table(x)
    if found is None:
        return [None] * len(results)
    if mode != "constant":
        return [_same_along(op, found, [d for d in range(x.dim()) if any(widths[2 * (x.dim() - 1 - d) :][:2])])]
    return [torch.nn.functional.pad(found.expand(x.shape), widths, value=NO_SAMPLE)]


@numbers("pad_sequence")
def pad_sequence(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Pad with entries of no sample."""
    sequences, batch_first, _, side = op.bind("sequences batch_first padding_value padding_side", batch_first=False)
    of = [_whole(op, table(t), t.shape) for t in sequences]
    return [torch.nn.utils.rnn.pad_sequence(of, batch_first, float(NO_SAMPLE), side or "right")]


@numbers("embedding", "one_hot", "view_as_real")
def lookup(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Replace each number by a row."""
    found = table(op.argument(0, "input"))
    if found is None or any(table(t) is not None for t in list(op.tensors())[1:]):
        raise Apart(f"{op.name} in a table of samples")
    return [found.unsqueeze(-1)]


@numbers(*propagation.MAKES, "arange")
def makes(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Make tensors of no sample."""
    return [None] * len(results)


# ---- Products -------------------------------------------------------------------------------------------------------


@numbers(*propagation.PRODUCTS)
def product(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Multiply matrices, which may not sum over different samples."""
    y = results[0]
    added = None
    if op.name in propagation.ADDS:
        added, a, b = (op.argument(at, name) for at, name in enumerate(propagation.ADDS[op.name]))
    else:
        a, b = op.argument(0, "input"), op.argument(1, "other", op.kwargs.get("mat2", op.kwargs.get("vec")))
        if op.name == "__rmatmul__":
            a, b = b, a
    left, right = table(a), table(b)
    parts: list[Tensor | None] = [table(added)]
    if left is not None:
        left = left[None] if a.dim() == 1 else left
        left = _same_along(op, left, [left.dim() - 1])
        parts.append(left.squeeze(-1) if b.dim() == 1 else left)
    if right is not None:
        right = right[:, None] if b.dim() == 1 else right
        right = _same_along(op, right, [right.dim() - 2])
        parts.append(right.squeeze(-1) if b.dim() == 1 else right)
    if a.dim() == 1:
        parts[1:] = [None if t is None else t.squeeze(-2 if b.dim() > 1 else -1) for t in parts[1:]]
    found = _met(op, parts)
    assert found is not None
    return [found.reshape([1] * (y.dim() - found.dim()) + list(found.shape))]


@numbers("einsum")
def einsum(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Contract letters along which the samples do not differ."""
    equation, *operands = op.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    letters = propagation.letters_of(equation, operands) if isinstance(equation, str) else None
    if letters is None:
        raise Apart("einsum of too many dimensions")
    terms, out = letters
    parts: list[Tensor | None] = []
    for term, t in zip(terms, operands, strict=True):
        found = table(t)
        if found is None:
            continue
        if len(set(term)) < len(term):
            raise Apart("einsum of a diagonal")
        gone = [d for d, c in enumerate(term) if c not in out]
        found = _same_along(op, found, gone)[tuple(0 if d in gone else slice(None) for d in range(t.dim()))]
        kept = [c for c in term if c in out]
        order = sorted(range(len(kept)), key=lambda d: out.index(kept[d]))
        sizes = iter(found.permute(order).shape)
        parts.append(found.permute(order).reshape([next(sizes) if c in kept else 1 for c in out]))
    return [_met(op, parts)]


@numbers("grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_product(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Multiply groups of rows with one matrix each."""
    x = op.argument(0, "input", op.kwargs.get("mat_a"))
    found = table(x)
    if found is None or x.dim() != 2 or results[0].shape[0] != len(x) or results[0].dim() != 2:
        raise Apart("grouped_mm of matrices that have samples")
    return [_same_along(op, found, [1])]


# ---- Writes ---------------------------------------------------------------------------------------------------------


@numbers("index_add", "index_copy", "index_reduce")
def writes_rows(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Write rows of one tensor into another, at indices."""
    x, dim, index, source = op.bind("input dim index source")[:4] if len(op.args) < 4 else op.args[:4]
    dim %= max(x.dim(), 1)
    base, own = table(x), table(source)
    thin = [d for d in range(x.dim()) if d != dim and all(t is None or t.shape[d] == 1 for t in (base, own))]
    shape = [1 if d in thin else n for d, n in enumerate(x.shape)]
    places = torch.arange(math.prod(shape)).view(shape).index_select(dim, index.cpu().reshape(-1))
    return [_written(op, base, own, shape, places, op.name == "index_copy")]


@numbers("scatter", "scatter_add", "scatter_reduce")
def scatters(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Write entries of one tensor into another, each at its index along a dimension."""
    x, dim, index, source = (op.argument(at, n) for at, n in enumerate(("input", "dim", "index", "src")))
    dim %= max(x.dim(), 1)
    base, own = table(x), table(source)
    index = index.cpu()
    if own is not None:
        own = own.expand(source.shape)[tuple(slice(0, n) for n in index.shape)]
    thin = [
        d for d in range(x.dim())
        if d != dim and index.shape[d] == x.shape[d] and (index.shape[d] == 1 or index.stride(d) == 0)
        and all(t is None or t.shape[d] == 1 or t.stride(d) == 0 for t in (base, own))
    ]  # fmt: skip
    cut = tuple(slice(0, 1) if d in thin else slice(None) for d in range(x.dim()))
    shape = [1 if d in thin else n for d, n in enumerate(x.shape)]
    every = torch.arange(math.prod(shape)).view(shape)
    index = index[cut]
    places = every[tuple(slice(0, n) if d != dim else slice(None) for d, n in enumerate(index.shape))].gather(
        dim, index
    )
    overwrites = op.name == "scatter" and op.kwargs.get("reduce") is None and len(op.args) < 5
    base = base if base is None else base.expand(x.shape)[cut]
    return [_written(op, base, own if own is None else own[cut], shape, places, overwrites)]


@numbers("index_put", "__setitem__")
def puts(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Write ``x[index] = values``."""
    x, index, values = op.args[:3]
    key = tuple(index) if isinstance(index, list) and op.name == "index_put" else index
    places = torch.arange(x.numel()).view(x.shape)[map_tensors(key, lambda t: t.cpu())]
    adds = op.name == "index_put" and bool(op.argument(3, "accumulate", False))
    return [_written(op, table(x), table(values), x.shape, places, not adds)]


@numbers("masked_scatter")
def masked_scatter(op: Operation, results: list[Tensor], table: TableOf) -> list[Tensor | None]:
    """Write the entries of a tensor, one after the other, where a mask is."""
    x, mask, source = op.bind("input mask source")
    shape = results[0].shape
    places = torch.arange(math.prod(shape)).view(shape)[mask.cpu().expand(shape)]
    own = table(source)
    own = None if own is None else own.expand(source.shape).reshape(-1)[: len(places)]
    base = _whole(op, table(x), shape).reshape(-1)[places]
    if own is not None and bool(((base != own) & (base != NO_SAMPLE) & (own != NO_SAMPLE)).any()):
        raise Apart("masked_scatter writes elements of one sample into another")
    return [_written(op, table(x), own, shape, places, True)]


def _written(
    op: Operation, base: Tensor | None, own: Tensor | None, shape: Sequence[int], places: Tensor, overwrites: bool
) -> Tensor:
    """Return the table of a tensor of samples `base` after writing entries of samples `own` at places."""
    out = _whole(op, base, shape).reshape(-1).clone()
    at = places.reshape(-1)
    new = torch.full(places.shape, NO_SAMPLE) if own is None else own.expand(places.shape)
    new = new.reshape(-1)
    if overwrites:
        out[at] = NO_SAMPLE
    highest = out.scatter_reduce(0, at, new, "amax")
    same = (new == highest[at]) | (new == NO_SAMPLE)
    if not bool(same.all()) or bool(((out != highest) & (out != NO_SAMPLE)).any()):
        raise Apart(f"{op.name} of different samples into one place")
    return highest.view(*shape)
