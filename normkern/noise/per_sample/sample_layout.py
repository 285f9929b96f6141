"""Which elements of a tensor belong to which sample: one number says it.

The samples' elements lie in blocks: element i, counted in row-major order of the tensor's shape, belongs to sample
``i // block % B``. A batch in front is one round of B blocks; time in front of the batch, or frames folded into it, are
several rounds or blocks of several rows. Reshaping changes nothing of it; what moves elements is applied to the
samples' numbers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the samples are. Not certain: guessed from a leading dimension of B, and yields to what is certain."""

    block: int
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Lost:
    """The samples cannot be told apart any more."""

    why: str


#: Of a tensor: where its samples are, that they are lost, or that it has none (None).
State = Rows | Lost | None


def leading(shape: Sequence[int], batch: int, certain: bool = True) -> Rows:
    """The batch in front."""
    return Rows(math.prod(shape) // batch, certain)


def axis(shape: Sequence[int], block: int, batch: int) -> tuple[int, int] | None:
    """The dimension that holds the samples and how many of its entries in a row are one sample's; None: several do."""
    after = math.prod(shape)
    for d, size in enumerate(shape):
        after //= max(size, 1)
        if size > 1 and block % after == 0 and size % (block // after * batch) == 0:
            return d, block // after
    return None


def block_on(shape: Sequence[int], dim: int, inner: int) -> int:
    """The block of samples on a dimension, `inner` entries each."""
    return inner * math.prod(shape[dim + 1 :])


def numbers(shape: Sequence[int], block: int, batch: int) -> Tensor:
    """The sample's number of every element."""
    return (torch.arange(math.prod(shape), dtype=torch.int32) // block % batch).view(*shape)


def block_of(numbers: Tensor, batch: int) -> int | None:
    """The block that such numbers have; None: none describes them."""
    flat = numbers.reshape(-1)
    after = (flat != 0).nonzero()
    if len(flat) % batch or not len(after):
        return None
    block = int(after[0])
    if not block or len(flat) % (block * batch):
        return None
    wanted = torch.arange(len(flat), dtype=torch.int32) // block % batch
    return block if torch.equal(flat, wanted) else None


def block_where_known(numbers: Tensor, batch: int) -> int | None:
    """The same of numbers that are -1 where nobody knows them; None also if several blocks describe the rest."""
    known = numbers >= 0
    wanted = numbers[known]
    fits = []
    after = numbers.numel()
    for size in numbers.shape:
        after //= max(size, 1)
        for inner in range(1, size // batch + 1):
            if size % (inner * batch) == 0:
                block = inner * after
                if torch.equal(
                    (torch.arange(numbers.numel()).view(numbers.shape) // block % batch)[known].int(), wanted
                ):
                    fits.append(block)
    return fits[0] if len(fits) == 1 else None


def broadcast(shape: Sequence[int], block: int, to: Sequence[int], batch: int) -> int | None:
    """The block of a tensor after broadcasting to a shape; None: that would not be a block."""
    if tuple(shape) == tuple(to):
        return block
    found = axis(shape, block, batch)
    if found is None:
        return None
    dim = found[0] + len(to) - len(shape)
    return block_on(to, dim, found[1]) if to[dim] == shape[found[0]] else None


def by_sample(x: Tensor, block: int, batch: int, width: int) -> Tensor | None:
    """The rows of `width` elements of each sample, (B, T, width): a view where strides can say it.

    None: a sample's elements are not whole rows.
    """
    if block == width and x.dim() == 2 and x.shape[0] == batch:
        return x.unsqueeze(1)
    if block % width or x.numel() % (block * batch):
        return None
    x = x.reshape(-1, batch, block // width, width)  # rounds, samples, rows of one, elements
    if len(x) == 1:
        return x[0]
    x = x.transpose(0, 1)
    return x[:, :, 0] if x.shape[2] == 1 else x.reshape(batch, -1, width)
