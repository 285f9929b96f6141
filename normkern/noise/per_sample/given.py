"""`Given`: the samples of a model's arguments: along their first dimension, row by row, or one each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from . import errors, sample_layout
from .numbered import described, state_of_packed
from .sample_layout import State

Argument = Tensor | PackedSequence


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of a call.

    Attributes:
        tensors: every tensor, and every packed sequence as one.
        rows: the sample of each row of those that have as many rows; None: not told.
        each: of a list of samples: the sample of each tensor in it, by its id.
        count: how many samples that list has.
    """

    tensors: list[Argument]
    rows: Tensor | None
    each: dict[int, int]
    count: int

    @classmethod
    def of(cls, module: nn.Module, args: Any, kwargs: Any, samples: str | None, batch_size: int | None) -> Given:
        """Return what a model was given.

        Args:
            samples: the argument that has the sample of each row, or an attribute of one.
            batch_size: B, if it was told.
        """
        found: list[Argument] = []
        for x in tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence)):
            if samples is not None and hasattr(x, "to_dict"):  # a graph of torch_geometric
                found += [t for t in tree_leaves(x.to_dict()) if isinstance(t, Tensor) and t.dim()]
            elif isinstance(x, PackedSequence) or (isinstance(x, Tensor) and x.dim()):
                found.append(x)
        if any(isinstance(x, Tensor) and x.is_nested for x in found):
            raise errors.nested_tensor()
        rows = None if samples is None else _rows(module, args, kwargs, samples)
        values = list(_values((*args, *kwargs.values())))
        first = values[0] if values else None
        if samples is not None or not isinstance(first, (list, tuple)) or not _one_each(first, batch_size):
            return cls(found, rows, {}, 0)
        numbers = {id(t): i for x in values for t, i in _elements(x, len(first))}
        return cls(found, rows, numbers, len(first))

    @property
    def batch(self) -> int | None:
        """The number of samples, where it is not the size of a dimension."""
        if self.rows is not None:
            return int(self.rows.max()) + 1
        return self.count or None

    def state(self, x: Argument, batch: int, certain: bool) -> State:
        """Return where the samples of an argument are; None: it has none."""
        if isinstance(x, PackedSequence):
            return state_of_packed(x, batch) if samples_in(x) == batch else None
        if id(x) in self.each:
            return described(torch.full([1] * x.dim(), self.each[id(x)]), x.shape, batch)
        if self.rows is not None and len(x) == len(self.rows):
            return described(self.rows.view(-1, *(1,) * (x.dim() - 1)), x.shape, batch)
        if self.rows is not None or self.each:
            certain = False
        return sample_layout.leading(x.shape, batch, certain) if len(x) == batch and x.numel() else None


def samples_in(x: Argument) -> int:
    """Return the number of samples of an argument whose first dimension they are."""
    return int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else x.shape[0]


def _rows(module: nn.Module, args: Any, kwargs: Any, name: str) -> Tensor:
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:
        bound = dict(kwargs)
    rows = bound.get(name, kwargs.get(name))
    if rows is None:
        rows = next((getattr(x, name) for x in (*args, *kwargs.values()) if hasattr(x, name)), None)
    is_index = isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int64, torch.int32)
    if not is_index or not len(rows) or int(rows.min()) < 0:
        raise errors.no_numbers(name, rows, type(module).__name__)
    return rows.detach().cpu().long()


def _values(arguments: Iterable[Any]) -> Iterator[Any]:
    """Yield the arguments; of a dict, its values."""
    for x in arguments:
        if isinstance(x, Mapping):
            yield from _values(x.values())
        else:
            yield x


def _one_each(given: Sequence[Any], batch_size: int | None) -> bool:
    """Return whether each element of a list is a sample; of a tuple, if it cannot be several inputs."""
    if len(given) < 2 or not all(isinstance(x, Tensor) and x.dim() for x in given):
        return False
    if isinstance(given, tuple):
        return batch_size == len(given) and len(given[0]) != batch_size
    sizes = {len(x) for x in given}
    if batch_size is not None and (len(given) != batch_size or sizes != {batch_size}):
        return len(given) == batch_size
    if batch_size is None and len(sizes) > 1:
        return True
    raise errors.list_of_tensors(len(given), sizes.pop())


def _elements(x: Any, count: int) -> Iterator[tuple[Tensor, int]]:
    if isinstance(x, (list, tuple)) and len(x) == count:
        for i, element in enumerate(x):
            for t in tree_leaves(element):
                if isinstance(t, Tensor) and t.dim():
                    yield t, i
