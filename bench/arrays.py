"""What a maker receives and what it returns: the arrays of an optimizer step or a matrix, and a step over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cases import Shape

#: A learning rate so small that a minute of steps leaves the weights where they are.
HYPER = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 5e-4}
#: l of the SVAG steps, which are taken with the learning rate `lr` / l.
SVAG_L = 4.0
#: Limit of the clipped steps, far below the norm of the gradients. A peer that clips in place clips once.
MAX_NORM = 100.0


@dataclass(frozen=True)
class Arrays:
    """Weights with their gradients, and momentum buffers: the same memory for every peer, so that none is lucky.

    graph: what a loss refers to that is still alive at the step, as it is in a training loop. A tensor to which only
    Python refers costs torch two trips through the GIL machinery at every access, by normkern and by every peer.
    """

    params: list[nn.Parameter]
    momentum_buffers: list[Tensor]
    hyper: dict[str, float]
    graph: list[Tensor]

    @property
    def grads(self) -> list[Tensor | None]:
        return [p.grad for p in self.params]

    @functools.cached_property
    def held(self) -> list[Tensor]:
        """The first gradients of the pairs: random, always the same, made on the first access."""
        make = torch.Generator().manual_seed(0)
        return [torch.randn(p.shape, generator=make, dtype=p.dtype) for p in self.params]


def arrays(shapes: Sequence[Shape], dtype: torch.dtype) -> Arrays:
    """Random weights and gradients, momentum buffers of zeros."""
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, dtype=dtype)
    buffers = [torch.zeros_like(p, requires_grad=False) for p in params]
    return Arrays(params, buffers, HYPER, [p.view_as(p) for p in params])


#: Of AdamW.
ADAMW_HYPER = {"lr": 1e-6, "weight_decay": 1e-2}


@dataclass(frozen=True)
class AdamArrays:
    """Weights with their gradients, and the state of AdamW, the same memory for every peer.

    graph: as in `Arrays`.
    """

    params: list[nn.Parameter]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    hyper: dict[str, float]
    graph: list[Tensor]


def adam_arrays(shapes: Sequence[Shape], dtype: torch.dtype) -> AdamArrays:
    """Random weights and gradients, averages as after some steps."""
    given = arrays(shapes, dtype)
    squares = [torch.full_like(p, 1e-2, requires_grad=False) for p in given.params]
    return AdamArrays(given.params, given.momentum_buffers, squares, ADAMW_HYPER, given.graph)


@dataclass(frozen=True)
class Matrix:
    """Gradients of single samples, a row each, as torch.func or Opacus would have left them."""

    x: Tensor


def matrix(shapes: Sequence[Shape], dtype: torch.dtype) -> Matrix:
    """Normal numbers, drawn in place: of one shape."""
    (shape,) = shapes
    return Matrix(torch.empty(shape, dtype=dtype).normal_())


@dataclass(frozen=True)
class Step:
    """One step of one peer.

    run: the step, which is what gets timed.
    sums: |w|^2, |g|^2, <w,g> of the last run, (tensors, 3) float64, and of pairs <g1,g2>, |g1-g2|^2 too; of a matrix
        its columns' means and variances and its rows' |x|^2, one after the other; None where nothing is measured.
    write_back: copies the weights into the params, for a peer that has arrays of its own.
    true_scale: what the params are to be multiplied with to be the weights; gradients there are those times it.
    """

    run: Callable[[], object]
    sums: Callable[[], Tensor] | None = None
    write_back: Callable[[], None] = lambda: None
    true_scale: Callable[[], float] = lambda: 1.0


Maker = Callable[[Arrays], Step]
AdamMaker = Callable[[AdamArrays], Step]
MatrixMaker = Callable[[Matrix], Step]
