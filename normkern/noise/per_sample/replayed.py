"""Tensors that a `torch.autograd.Function` made of parameters alone: a rounded weight, an adapter's product.

The function's own backward is the way back to the parameters. It may be called many times, also after autograd has
called it, because what the function saved is held here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .derived import Derived, coarser
from .operation import tensors_in

#: Of a node of autograd's graph and the number of its result: what that result was derived from; None: not known.
Find = Callable[[Any, int], Derived | None]


class Saved:
    """What the backward of a function reads of its context."""

    def __init__(self, node: Any) -> None:
        self.node, self.saved_tensors = node, node.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.node, name)

    def backward(self, at: int, g: Tensor) -> list[Tensor | None]:
        """Return the gradients of the inputs that need one, from the gradient of one result."""
        gs = [
            g if i == at else torch.zeros(tuple(of.shape), dtype=of.dtype, device=of.device)
            for i, of in enumerate(self.node._input_metadata)
        ]
        found = self.node._forward_cls.backward(self, *gs)
        found = found if isinstance(found, tuple) else (found,)
        return [d for d, needed in zip(found, self.node.needs_input_grad, strict=False) if needed]


class Replay(torch.autograd.Function):
    """A copy of one result of a function, whose backward is the function's."""

    @staticmethod
    def forward(ctx: Any, saved: Saved, at: int, value: Tensor, *inputs: Tensor) -> Tensor:
        ctx.saved, ctx.at = saved, at
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return (None, None, None, *ctx.saved.backward(ctx.at, g))


def replayed(made: Tensor, find: Find, has_samples: Callable[[Tensor], bool]) -> Derived | None:
    """Return what a tensor was derived from, if a function made it of parameters alone; else None.

    Args:
        made: a tensor with a gradient, of which no operation was seen to make it.
        find: returns what an input was derived from.
        has_samples: returns whether a tensor that the function keeps has samples.
    """
    node = made.grad_fn
    if not isinstance(node, BackwardCFunction) or node._forward_cls.__module__.startswith(__package__):
        return None
    saved = Saved(node)
    kept = [*saved.saved_tensors, *vars(node).values()]
    if any(map(has_samples, tensors_in(kept))) or any(hasattr(x, "__array_interface__") for x in kept):
        return None  # what numpy computed may be of samples
    inputs = [find(*edge) for edge in node.next_functions if edge[0] is not None]
    known = [d for d in inputs if d is not None]
    if not known or len(known) < len(inputs):
        return None
    leaves: dict[int, Tensor] = {}
    coarsest = made.dtype.to_real()
    for d in known:
        leaves.update(d.leaves)
        coarsest = coarser(coarsest, d.coarsest)
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        value = Replay.apply(saved, made.output_nr, made, *(d.value for d in known))
    return Derived(value, leaves, False, coarsest=coarsest)
