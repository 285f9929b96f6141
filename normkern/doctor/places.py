"""Tensors at odd places in memory, on which the doctor runs every op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .. import ops

#: The tensors, as (shape, elements from one to the next): on both sides of the width of every vector
#: and of a chunk; one with gaps; one transposed (-1). The first holds `_SPECIAL` in its first vector and in its last.
PLACES = (
    *(((n,), 1) for n in (19, 0, 1, 7, 8, 9, 63, 1003, ops.CHUNK - 1, ops.CHUNK + 1, 2 * ops.CHUNK + 5)),
    ((1003,), 2),
    ((37, 113), -1),
)
SIZES = [math.prod(shape) for shape, _ in PLACES]
_SPECIAL = torch.tensor(  # w, g, v, h
    [
        (math.inf, 1, 1, 1), (-math.inf, 1, 1, 1), (1, math.nan, 1, 1), (1, math.inf, 1, math.inf),
        (1, 1, -math.inf, 1), (math.nan, 1, 1, 1), (0, 0, 0, 0), (1, 1, 1, -math.inf), (1, 1, 1, math.nan),
    ],
    dtype=torch.float64,
).t()  # fmt: skip
_FENCE = 17  # NaNs between tensors: odd, so that each has another misalignment


@cache
def values(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weights, gradients, momentum buffers and held gradients for all of `PLACES`, flat, over many octaves."""
    make = torch.Generator().manual_seed(0)
    size = (4, sum(SIZES))
    octaves = torch.randint(-6, 3, size, generator=make)
    numbers = torch.randn(size, generator=make, dtype=torch.float64) * torch.exp2(octaves.double())
    count = _SPECIAL.shape[1]
    numbers[:, :count] = numbers[:, SIZES[0] - count : SIZES[0]] = _SPECIAL
    w, g, v, h = numbers.to(dtype)
    return w, g, v, h


class Laid:
    """`flat` values as tensors at `PLACES` in one stretch of memory with NaN between them."""

    def __init__(self, flat: Tensor, first: int, dense: bool = False) -> None:
        self.block = torch.full((2 * len(flat) + _FENCE * (len(PLACES) + 2),), math.nan, dtype=flat.dtype)
        self.tensors = []
        start = first + _FENCE
        for part, (shape, stride) in zip(torch.split(flat, SIZES), PLACES, strict=True):
            stride = 1 if dense else stride
            end = start + len(part) * abs(stride)
            here = self.block[start : end : abs(stride)]
            here = here.view(shape[::-1]).t() if stride < 0 else here.view(shape)
            self.tensors.append(here.copy_(part.view(shape)))
            start = end + _FENCE

    def is_fenced(self) -> bool:
        """Return whether the memory between the tensors is unchanged. Overwrites the tensors."""
        for x in self.tensors:
            x.fill_(math.nan)
        return bool(self.block.isnan().all())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all coordinates, tensor after tensor."""
    return torch.cat([x.reshape(-1) for x in tensors])


def trespass(written: dict[str, Laid], read: dict[str, tuple[Laid, Tensor]]) -> str | None:
    """Return what an op wrote and must not write: what it only reads (name -> laid, values), or memory between tensors.

    Overwrites the tensors.
    """
    for name, (laid, was) in read.items():
        if not torch.equal(bits(flat(laid.tensors)), bits(was)):
            return f"the {name} were written"
    outside = [name for name, laid in written.items() if not laid.is_fenced()]
    return f"memory beside {' and '.join(outside)} was written" if outside else None


def bits(x: Tensor) -> Tensor:
    """Return the bits as integers that can be compared, with one pattern for every NaN."""
    x = torch.where(x.isnan(), torch.full_like(x, math.nan), x)
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
