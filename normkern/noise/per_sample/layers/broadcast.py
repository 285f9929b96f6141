"""Broadcasting: parameters that meet samples element by element, and parameters repeated once for every sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import sample_layout
from ..contributions import Loop, Matrix
from ..operation import Operation
from ..propagation import WIDENS
from ..sample_layout import SampleLayout
from ..tensor_state import TensorState, Use
from .base import without_modes
from .registry import handles

#: Element by element, with broadcasting.
BROADCASTS = frozenset(
    """add sub subtract mul multiply div divide true_divide floor_divide __add__ __radd__ __sub__ __rsub__
    __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ rsub where lerp addcmul addcdiv pow float_power
    maximum minimum fmax fmin max min atan2 hypot logaddexp logaddexp2 xlogy copysign clamp clip clamp_min
    clamp_max masked_fill fmod remainder""".split()
)


class Spread(torch.autograd.Function):
    """Repeats a parameter once for every sample, along the samples' dimension of the other operands.

    The operation that follows may be any one with broadcasting: the gradient arrives with a contribution per sample.
    """

    @staticmethod
    def forward(ctx: Any, use: Use, q: Tensor, batch: int, rank: int, dim: int, outer: int, inner: int) -> Tensor:
        ctx.use, ctx.batch, ctx.dim, ctx.folds, ctx.shape = use, batch, dim, (outer, inner), q.shape
        with without_modes():
            shape = [1] * (rank - q.dim()) + list(q.shape)
            out = q.reshape(shape).unsqueeze(dim).unsqueeze(dim)  # outer, batch, inner at dim
            out = out.expand(*shape[:dim], outer, batch, inner, *shape[dim + 1 :])
            return out.reshape(*shape[:dim], outer * batch * inner, *shape[dim + 1 :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        with without_modes():
            outer, inner = ctx.folds
            g = g.unflatten(ctx.dim, (outer, ctx.batch, inner)).sum((ctx.dim, ctx.dim + 2))
            matrix = g.movedim(ctx.dim, 0).reshape(ctx.batch, -1)
            ctx.use.begin()
            grad = ctx.use.measure(0, lambda: Matrix(matrix, ctx.shape))
            return (None, grad, *(None,) * 5)


class PerSampleParameter(torch.autograd.Function):
    """Returns a parameter whose entries along one dimension are already one for each sample."""

    @staticmethod
    def forward(ctx: Any, use: Use, q: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        ctx.use, ctx.at = use, (dim, outer, inner)
        return q.view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        dim, outer, inner = ctx.at
        use: Use = ctx.use

        def one(b: int) -> Tensor:
            out = torch.zeros_like(g)
            index = (slice(None),) * (dim + 1) + (b,)
            folds = (outer, use.batch, inner)
            out.unflatten(dim, folds)[index] = g.unflatten(dim, folds)[index]
            return out

        with without_modes():
            use.begin()
            return (None, use.measure(0, lambda: Loop(use.batch, g.shape, one)), None, None, None)


@handles(*BROADCASTS, takes_complex=True)
def broadcast(tensors: TensorState, op: Operation) -> Any:
    """Operations element by element: each gets every parameter once per sample, along the samples' dimension."""
    batch = tensors.rules.batch
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in op.tensors()))
    except RuntimeError:
        return NotImplemented
    blocks = {sample_layout.broadcast(t.shape, layout.block, shape, batch) for t, layout in op.samples}
    block = blocks.pop() if len(blocks) == 1 else None
    found = None if block is None else sample_layout.axis(shape, block, batch)
    if found is None:
        return NotImplemented
    dim, inner = found
    outer = shape[dim] // (batch * inner)
    instead: dict[int, Tensor] = {}
    for q in op.parameters:
        if id(q) not in instead:
            instead[id(q)] = for_each_sample(tensors, q, op.name, len(shape), dim, outer, inner)
    changed = [instead.get(id(a), a) if isinstance(a, Tensor) else a for a in op.args]
    return tensors.run(op.func, *changed, **{k: instead.get(id(v), v) for k, v in op.kwargs.items()})


def for_each_sample(
    tensors: TensorState, q: Tensor, name: str, rank: int, dim: int, outer: int, inner: int
) -> Tensor:  # fmt: skip
    """Return a parameter with entries for each sample along a dimension of a result of this rank."""
    at = dim - (rank - q.dim())
    if at < 0 or q.shape[at] == 1:
        return _spread(tensors, q, name, rank, dim, outer, inner)
    out: Tensor = PerSampleParameter.apply(tensors.use(name, [q]), q, at, outer, inner)
    tensors.mark(out, SampleLayout(sample_layout.block_on(q.shape, at, inner), True))
    return out


def _spread(tensors: TensorState, q: Tensor, name: str, rank: int, dim: int, outer: int, inner: int) -> Tensor:
    use = tensors.use(name, [q])
    out: Tensor = Spread.apply(use, q, use.batch, rank, dim, outer, inner)
    tensors.mark(out, SampleLayout(sample_layout.block_on(out.shape, dim, inner), True))
    return out


@handles("prelu")
def prelu(tensors: TensorState, op: Operation) -> Any:
    """max(x, 0) + w min(x, 0), with one weight or one for each channel."""
    x, weight = op.bind("input weight")
    if x is op.parameters[0]:
        return NotImplemented
    if weight.numel() > 1:
        weight = tensors.run(torch.Tensor.view, weight, [-1] + [1] * (x.dim() - 2))
    return tensors.run(lambda: torch.where(x > 0, x, weight * x))


def _is_widened_to_batch(tensors: TensorState, op: Operation) -> bool:
    return _dim_of_batch(tensors, op) is not None


def _dim_of_batch(tensors: TensorState, op: Operation) -> int | None:
    """Return the dimension along which a parameter is repeated once per sample; None: it is not."""
    batch = tensors.accumulator.batch
    if batch is None or len(op.parameters) != 1 or not op.args or op.args[0] is not op.parameters[0]:
        return None
    q, sizes = op.parameters[0], _sizes(op)
    if sizes is None or len(sizes) < q.dim():
        return None
    own = [0] * (len(sizes) - q.dim()) + list(q.shape)
    found = [d for d, (n, m) in enumerate(zip(sizes, own, strict=True)) if n == batch and m in (0, 1)]
    return found[0] if found and (found[0] == 0 or len(found) == 1) else None


def _sizes(op: Operation) -> list[int] | None:
    given = list(op.args[1:]) or list(op.kwargs.values())
    if len(given) == 1 and isinstance(given[0], Tensor):
        return list(given[0].shape)
    flat = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    return [int(n) for n in flat] if all(isinstance(n, int) for n in flat) else None


@handles(*WIDENS, without_samples=_is_widened_to_batch, takes_complex=True)
def widen(tensors: TensorState, op: Operation) -> Any:
    """expand and repeat: the copies of a parameter are one for each sample."""
    if op.samples:
        return broadcast(tensors, op) if op.name == "expand_as" else NotImplemented
    dim, sizes = _dim_of_batch(tensors, op), _sizes(op)
    assert dim is not None
    assert sizes is not None
    out = _spread(tensors, op.parameters[0], op.name, len(sizes), dim, 1, 1)
    if op.name in ("repeat", "tile"):
        sizes[dim] = 1
        return tensors.run(torch.Tensor.repeat, out, sizes)
    return tensors.run(torch.Tensor.expand, out, sizes)
