"""`SampleLayout`: which elements of a tensor belong to which sample, as one number, the block.

The samples' elements lie in blocks: element i, counted in row-major order of the tensor's shape, belongs to sample
``i // block % B``. A batch in the first dimension is one round of B blocks. Time in front of the batch gives several
rounds; frames folded into the batch give blocks of several rows. Reshaping does not change the block. An operation that
moves elements is applied to the sample numbers themselves (`numbers`), and `block_of` reads the new block off them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """The place of the samples in a tensor.

    A layout that is not `certain` was guessed from a first dimension of size B, and yields to one that is certain.
    """

    block: int
    certain: bool = True


Kind = Literal["summed", "moved", "unknown", "coupled"]


@dataclass(frozen=True, slots=True)
class Mixed:
    """The samples of a tensor can no longer be told apart; `kind` says how they were mixed (`coupling`)."""

    why: str
    kind: Kind = field(default="coupled", kw_only=True)
    is_sum: bool = field(default=False, kw_only=True)  #: a sum over samples, not divided by their number
    are_losses: bool = field(default=False, kw_only=True)  #: each entry was a sum over samples by itself


#: Of a tensor: where its samples are, or that they are mixed, or None where it has no samples.
State = SampleLayout | Mixed | None


def leading(shape: Sequence[int], batch: int, certain: bool = True) -> SampleLayout:
    """Return the layout of a batch in the first dimension."""
    return SampleLayout(math.prod(shape) // batch, certain)


def axis(shape: Sequence[int], block: int, batch: int) -> tuple[int, int] | None:
    """Return the dimension of the samples and how many consecutive entries of it one sample has.

    None: the samples lie along several dimensions, or there are no entries.
    """
    after = math.prod(shape)
    if not after:
        return None
    for d, size in enumerate(shape):
        after //= max(size, 1)
        if size > 1 and block % after == 0 and size % (block // after * batch) == 0:
            return d, block // after
    return None


def block_on(shape: Sequence[int], dim: int, inner: int) -> int:
    """Return the block of samples along a dimension, `inner` consecutive entries each."""
    return inner * math.prod(shape[dim + 1 :])


def numbers(shape: Sequence[int], block: int, batch: int) -> Tensor:
    """Return the sample number of every element."""
    return (torch.arange(math.prod(shape), dtype=torch.int32) // block % batch).view(*shape)


def block_of(numbers: Tensor, batch: int) -> int | None:
    """Return the block that describes these sample numbers; None: there is none."""
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
    """Return the block that describes sample numbers of which some are unknown (-1); None: no block or several do."""
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
    """Return the block of a tensor after broadcasting to a shape; None: no block describes the result."""
    if tuple(shape) == tuple(to):
        return block
    found = axis(shape, block, batch)
    if found is None:
        return None
    dim = found[0] + len(to) - len(shape)
    return block_on(to, dim, found[1]) if to[dim] == shape[found[0]] else None


def by_sample(x: Tensor, block: int, batch: int, width: int) -> Tensor | None:
    """Return the rows of `width` elements of each sample, (B, T, width): a view where strides allow it.

    None: the elements of a sample are not whole rows.
    """
    if block == width and x.dim() == 2 and x.shape[0] == batch:
        return x.unsqueeze(1)
    if block % width or x.numel() % (block * batch):
        return None
    if x.numel() == block * batch:
        return x.reshape(batch, block // width, width)
    x = x.reshape(-1, batch, block // width, width)  # rounds, samples, rows of one, elements
    x = x.transpose(0, 1)
    return x[:, :, 0] if x.shape[2] == 1 else x.reshape(batch, -1, width)


def without_guesses(samples: list[tuple[Tensor, SampleLayout]]) -> list[tuple[Tensor, SampleLayout]]:
    """Drop guessed layouts of tensors that no gradient reaches, where another layout is certain."""
    if not any(layout.certain for _, layout in samples):
        return samples
    return [(t, layout) for t, layout in samples if layout.certain or t.requires_grad]
