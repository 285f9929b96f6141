"""The base of layer kinds: an autograd function whose backward gives every parameter's contributions to its `Use`.

The forward computes what torch computes. The backward computes the input's gradient by torch's own kernels, and returns
as parameters' gradients what the contributions sum up to, because both come out of one pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import errors
from ..contributions import Contribution
from ..tensor_state import TensorState, Use

without_modes = torch._C.DisableTorchFunction


class LayerKind:
    """The arithmetic of a kind of layer, for one call of it."""

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the output, and the tensors that the other methods need."""
        raise NotImplementedError

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        """Return dL/dx from g = dL/dy."""
        raise NotImplementedError

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], Contribution]:
        """Return a function of i that returns the contributions to the i-th parameter; it is for one backward."""
        raise NotImplementedError


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Make a backward that refuses to be differentiated: with create_graph=True alone, because the check takes time."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gs: Tensor | None) -> tuple[Any, ...]:
        out: tuple[Any, ...] = (once if torch.is_grad_enabled() else backward)(ctx, *gs)
        return out

    return run


def apply(use: Use, kind: LayerKind, x: Tensor, *params: Tensor | None) -> Tensor:
    """Return the output of a layer; the contributions to its parameters, the targets of `use`, come in the backward."""
    out: Tensor = LayerFunction.apply(use, kind, x, *params)
    return out


class LayerFunction(torch.autograd.Function):
    """The autograd function of every `LayerKind`."""

    @staticmethod
    def forward(ctx: Any, use: Use, kind: LayerKind, x: Tensor, *params: Tensor | None) -> Tensor:
        ctx.use, ctx.kind = use, kind
        with without_modes():
            out, kept = kind.forward(x, *params)
            if out._is_view() or out is x:  # an in-place operation on a view that leaves a function is refused
                out = torch.ops.aten._unsafe_view(out, out.shape)
        ctx.check = AutogradCheck(kind, x, params) if use.accumulator.checking else None
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        use, kind = ctx.use, ctx.kind
        needs_x, *needs = ctx.needs_input_grad[2:]
        if g is None:
            return (None,) * (3 + len(needs))
        kept = ctx.saved_tensors  # with the mode on: activation checkpointing may run its forward here
        with without_modes():
            dx = kind.input_grad(g, *kept) if needs_x else None
            use.begin()
            contribution = kind.contributions(g, *kept)
            grads = [
                use.measure(i, functools.partial(contribution, i)) if needed else None for i, needed in enumerate(needs)
            ]
            if ctx.check is not None and use.accumulator.is_measuring:
                ctx.check.compare(use, g, grads)
                ctx.check = None  # the graph may live longer, and holds x
            return (None, None, dx, *grads)


class AutogradCheck:
    """Computes the gradients of a layer's parameters by autograd, for the contributions must add up to them.

    It takes a few rows at a time, because every layer treats rows by themselves: then the check needs little memory
    however large the batch is.
    """

    AT_A_TIME = 1 << 18  # numbers of the output

    def __init__(self, kind: LayerKind, x: Tensor, params: Sequence[Tensor | None]) -> None:
        self.kind, self.x, self.params = kind, x.detach(), params
        self.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)

    def compare(self, use: Use, g: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Raise RuntimeError if the contributions do not add up to autograd's gradients."""
        wanted = [i for i, d in enumerate(grads) if d is not None]
        if not wanted:
            return
        enabled, dtype = self.autocast
        with torch.enable_grad(), torch.autocast(g.device.type, dtype, enabled=enabled):
            leaves = {i: p.detach().requires_grad_() for i, p in enumerate(self.params) if p is not None}
            plain: list[Tensor] = []
            rows = max(1, self.AT_A_TIME * len(g) // max(1, g.numel()))
            for x, d in zip(self.x.split(rows), g.split(rows), strict=True):
                out, _ = self.kind.forward(x, *(leaves.get(i) for i in range(len(self.params))))
                some = torch.autograd.grad(out, [leaves[i] for i in wanted], d.to(out.dtype))
                plain = [a.add_(b) for a, b in zip(plain, some, strict=True)] if plain else list(some)
        for i, d in zip(wanted, plain, strict=True):
            use.compare(i, grads[i], d, g, self.x)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return tensors as autocast casts them for layers that it runs in low precision."""
    kind = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def shape_of(t: Tensor | None) -> torch.Size:
    """Return the shape of a parameter that may be missing."""
    return torch.Size() if t is None else t.shape


def mixed(tensors: TensorState, name: str, parameter: Tensor | None, why: str) -> RuntimeError:
    """Return the error of a layer whose input has samples that cannot be told apart."""
    assert parameter is not None
    return errors.mixed(tensors.roots(parameter)[0].record.described, name, why)
