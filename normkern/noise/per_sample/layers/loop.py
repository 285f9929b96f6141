"""Operations without a faster way: computed for the batch, and in the backward once more for each sample."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import sample_layout
from ..contributions import Contribution, Loop
from ..numbered import table_of
from ..operation import Operation
from ..sample_layout import Mixed, SampleLayout
from ..tensor_state import TensorState, Use
from .base import without_modes
from .registry import handles
from .rows import masked

#: Operations that treat each sample by itself, besides those that other files handle.
ALONE = frozenset(
    """einsum bilinear bmm baddbmm addbmm mv tensordot inner index_select gather take take_along_dim cdist
    pairwise_distance cosine_similarity embedding_bag""".split()
)


class LoopOverSamples(torch.autograd.Function):
    """Computes the operation for the batch; its backward computes it once more for each sample."""

    @staticmethod
    def forward(ctx: Any, use: Use, run: Callable[..., Tensor], cut: Callable[[Tensor, int, int], Tensor],
                *tensors: Tensor) -> Tensor:  # fmt: skip
        """Run `run(data…, parameters…)`; `cut(tensor, i, b)` cuts sample b out of data i, or of the result (i = -1)."""
        ctx.use, ctx.run, ctx.cut = use, run, cut
        ctx.save_for_backward(*tensors)
        with without_modes():
            out = run(*tensors)
            return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        use: Use = ctx.use
        needs = ctx.needs_input_grad[3:]
        tensors = ctx.saved_tensors
        with without_modes():
            count = len(use.targets)
            data, params = tensors[: len(tensors) - count], tensors[len(tensors) - count :]
            dx: list[Tensor | None] = [None] * len(data)
            wanted = [i for i in range(len(data)) if needs[i]]
            if wanted:
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(data)]
                    out = ctx.run(*leaves, *(p.detach() for p in params))
                for i, d in zip(wanted, torch.autograd.grad(out, [leaves[i] for i in wanted], g), strict=True):
                    dx[i] = d

            def one(i: int, b: int) -> Tensor:
                with torch.enable_grad():
                    leaf = params[i].detach().requires_grad_()
                    cut = [ctx.cut(t.detach(), k, b) for k, t in enumerate(data)]
                    out = ctx.run(*cut, *(leaf if k == i else p.detach() for k, p in enumerate(params)))
                return torch.autograd.grad(out, leaf, ctx.cut(g, -1, b))[0]

            def contribution(i: int) -> Contribution:
                return Loop(use.batch, params[i].shape, functools.partial(one, i))

            use.begin()
            grads = [
                use.measure(i, functools.partial(contribution, i)) if needs[len(data) + i] else None
                for i in range(count)
            ]
            return (None, None, None, *dx, *grads)


@handles(*ALONE, takes_complex=True)
def loop_over_samples(tensors: TensorState, op: Operation) -> Any:
    """Any operation whose result has one dimension for the samples, as each operand that has samples."""
    batch = tensors.rules.batch
    params = _distinct(op.parameters)
    data = [t for t in _distinct(list(op.tensors())) if not any(t is p for p in params)]
    order = {id(t): i for i, t in enumerate([*data, *params])}

    def run(*instead: Tensor) -> Tensor:
        out: Tensor = op.run_with(lambda t: instead[order[id(t)]])
        return out

    with torch.no_grad(), without_modes():
        try:
            like = run(*(torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (*data, *params)))
        except (RuntimeError, NotImplementedError):
            return NotImplemented
    if not isinstance(like, Tensor):
        return NotImplemented
    (state,) = tensors.rules.after(op, like)
    axes: dict[int, tuple[int, int] | None] = {-1: None}
    if isinstance(state, SampleLayout):
        axes[-1] = sample_layout.axis(like.shape, state.block, batch)
    of = {id(t): layout for t, layout in op.samples}
    for i, t in enumerate(data):
        axes[i] = sample_layout.axis(t.shape, of[id(t)].block, batch) if id(t) in of else None
        if id(t) in of and axes[i] is None:
            return NotImplemented
    if axes[-1] is None or isinstance(state, Mixed):
        return NotImplemented

    def cut(t: Tensor, i: int, b: int) -> Tensor:
        at = axes[i]
        if at is None:
            return t
        return t.unflatten(at[0], (-1, batch, at[1])).select(at[0] + 1, b).flatten(at[0], at[0] + 1)

    if not _is_cut_alone(run, cut, like, data, params, axes[-1][0]):  # a parameter has entries for each sample, too
        table = table_of(like.shape, state, batch)
        assert table is not None
        return masked(tensors, op, table)
    use = tensors.use(op.name, params)
    out: Tensor = LoopOverSamples.apply(use, run, cut, *data, *params)
    tensors.mark(out, state)
    return out


def _is_cut_alone(
    run: Callable[..., Tensor], cut: Callable[[Tensor, int, int], Tensor], like: Tensor, data: list[Tensor],
    params: list[Tensor], dim: int,
) -> bool:  # fmt: skip
    """Return whether the operation on one sample's part of the data returns that sample's part of the result."""
    if not any(n == like.shape[dim] for p in params for n in p.shape):
        return True
    with torch.no_grad(), without_modes():
        some = [cut(torch.empty(t.shape, dtype=t.dtype, device="meta"), i, 0) for i, t in enumerate(data)]
        try:
            out = run(*some, *(torch.empty(p.shape, dtype=p.dtype, device="meta") for p in params))
        except RuntimeError:
            return False
        return out.shape == cut(like, -1, 0).shape


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())
