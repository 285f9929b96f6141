"""`halves`: one loader batch as the two independent batches of an SVAG step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from enum import Enum
from numbers import Number
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Batch = TypeVar("Batch")

#: What belongs to the batch as a whole and goes to both halves.
_COMMON = (str, bytes, Number, Enum, type(None))


def halves(batch: Batch) -> tuple[Batch, Batch]:
    r"""Split a batch of 2B samples into two of B: the first half and the second.

    What a loader hands over (a tensor; tuples, lists, named tuples and dicts of such, nested) comes back twice, in the
    same containers:

    * a tensor or array is cut along its first dimension. The halves are **views**: nothing is copied, and what is
      written into one is written into the batch.
    * a sequence (list, tuple, range, ...) that holds no tensor and has length 2B is one entry per sample, such as names
      or labels, and is cut as well. Any other list or tuple, and every named tuple and dict, is a container: its
      entries are split one by one. A pair of options beside a batch of two would be taken for one entry per sample: put
      it in a dict.
    * text, numbers, None, enumeration members, and tensors without dimensions belong to the whole batch and go to both.

    **Batch normalisation.** Give each half its own forward: its statistics are then those of its B samples, as in a run
    with batches of B, and the two gradients are independent. Running statistics see both halves (two updates per step).
    One forward over all 2B samples would couple them, and the gradients would be no sample of SGD's. The paper's code
    does the same: a loader with batches of 2B, two forwards.

    Args:
        batch: samples come first in every tensor, 2B of them, B >= 1.

    Returns:
        (first, second), each of the type of `batch`, on its device.

    Raises:
        ValueError: the number of samples is odd or zero; tensors differ in it; there is no tensor with a first
            dimension; an entry is of a type that cannot be looked into. The sentence names the entry.

    Reference: Li, Malladi, Arora 2021, arXiv 2102.12470, and its code.

    >>> import torch
    >>> first, second = halves({"x": torch.arange(4), "name": ["a", "b", "c", "d"], "fold": 7})
    >>> first
    {'x': tensor([0, 1]), 'name': ['a', 'b'], 'fold': 7}
    >>> second
    {'x': tensor([2, 3]), 'name': ['c', 'd'], 'fold': 7}
    """
    where, samples = next(((name, x) for name, x in _arrays(batch, "batch") if len(x.shape)), ("batch", None))
    if samples is None:
        raise ValueError(f"halves: batch expected a tensor with a first dimension in it, got {type(batch).__name__}")
    length = len(samples)
    if length % 2 or length == 0:
        raise ValueError(f"halves: {where} expected an even number of samples > 0, got {length}")
    return (
        _part(batch, "batch", where, length, slice(0, length // 2)),
        _part(batch, "batch", where, length, slice(length // 2, length)),
    )


def _part(x: Any, name: str, first: str, length: int, part: slice) -> Any:
    """Return one half of `x`, which stands at `name` in the batch; `first` is where the batch's length was found."""
    if _is_array(x):
        if len(x.shape) == 0:
            return x
        if x.shape[0] != length:
            raise ValueError(f"halves: {name} has shape {tuple(x.shape)} but {first} has {length} samples")
        return x[part]
    if isinstance(x, _COMMON):
        return x
    if isinstance(x, PackedSequence):
        raise ValueError(f"halves: {name} expected samples in the first dimension, got a PackedSequence")

    def inner(y: Any, key: object) -> Any:
        return _part(y, f"{name}{key}", first, length, part)

    if isinstance(x, Mapping):
        return _rebuilt_mapping(x, inner)
    if isinstance(x, Sequence):
        if hasattr(x, "_fields"):
            return type(x)(*(inner(y, f".{field}") for field, y in zip(x._fields, x, strict=True)))
        if len(x) == length and not any(_arrays(x, name)):
            return x[part]
        if isinstance(x, (list, tuple)):
            return type(x)(inner(y, f"[{i}]") for i, y in enumerate(x))
    raise ValueError(f"halves: {name} expected tensors, containers, text or numbers, got {type(x).__name__}")


def _rebuilt_mapping(x: Mapping[Any, Any], inner: Callable[[Any, object], Any]) -> Mapping[Any, Any]:
    entries = {key: inner(y, f"[{key!r}]") for key, y in x.items()}
    if type(x) is dict:
        return entries
    if isinstance(x, MutableMapping):  # a defaultdict, a tokenizer's: constructors differ, copies keep what they hold
        rebuilt = copy(x)
        for key, y in entries.items():
            rebuilt[key] = y
        return rebuilt
    return type(x)(entries)  # type: ignore[call-arg]


def _is_array(x: Any) -> bool:
    """Return whether x is a tensor, or behaves like one: a NumPy array or scalar."""
    return isinstance(x, Tensor) or (hasattr(x, "shape") and hasattr(x, "dtype"))


def _arrays(x: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every tensor in `x` and where it stands."""
    if _is_array(x):
        yield name, x
    elif isinstance(x, Mapping):
        for key, y in x.items():
            yield from _arrays(y, f"{name}[{key!r}]")
    elif isinstance(x, Sequence) and not isinstance(x, (str, bytes, range)):
        fields = getattr(x, "_fields", None)
        for i, y in enumerate(x):
            yield from _arrays(y, f"{name}.{fields[i]}" if fields else f"{name}[{i}]")
