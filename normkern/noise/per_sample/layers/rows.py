"""Operations that join parameters with samples in any order: on the rows of each sample, or masked sample by sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import errors, row_rules
from ..contributions import Contribution, Loop, Matrix
from ..numbered import NO_SAMPLE, Numbered, by_rows, described, table_of, without_last
from ..operation import Operation
from ..sample_layout import SampleLayout
from ..tensor_state import TensorState, Use
from .base import without_modes
from .broadcast import BROADCASTS
from .registry import find, handles

#: Layers of images, with the dimensions of one image.
_IMAGES = {**{f"conv{n}d": n + 1 for n in (1, 2, 3)}, **{f"conv_transpose{n}d": n + 1 for n in (1, 2, 3)}}
_NORMS = frozenset("batch_norm group_norm instance_norm".split())


def join(tensors: TensorState, op: Operation) -> Any:
    """Return the result of an operation, whose contributions come in the backward; NotImplemented: it is not known."""
    if op.name == "__getitem__" and op.args[0] is op.parameters[0]:
        registration = find(op.name)
        assert registration is not None
        return registration.handler(tensors, op)
    x = op.argument(0, "input")
    features = _features(op)
    if features is not None and [t for t, _ in op.numbered] == [x] and not op.samples:
        dims = x.dim() - features
        if op.numbered[0][1].last() <= dims:
            return _by_rows(tensors, op, x, op.numbered[0][1], dims)
    like = _like(op)
    (state,) = (None,) if like is None else row_rules.after(op, [like], tensors.rules.batch)
    table = None if like is None else table_of(like.shape, state, tensors.rules.batch)
    if table is None:
        op.why = getattr(state, "why", None)
        return NotImplemented
    if op.name in BROADCASTS:
        return _spread(tensors, op, table)
    return masked(tensors, op, table)


class NoRows(torch.autograd.Function):
    """The result of an operation on no rows: every sample contributes zero."""

    @staticmethod
    def forward(ctx: Any, use: Use, out: Tensor, *params: Tensor) -> Tensor:
        ctx.use, ctx.params = use, params
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        use: Use = ctx.use
        with without_modes():
            use.begin()
            grads = [
                use.measure(i, lambda p=p: Loop(use.batch, p.shape, lambda b: torch.zeros_like(p)))  # type: ignore[misc]
                for i, p in enumerate(ctx.params)
            ]
            return (None, g, *grads)


def join_empty(tensors: TensorState, op: Operation) -> Any:
    """Return the result of an operation on no rows at all, as of an expert that gets no token."""
    params = list({id(t): t for t in op.parameters}.values())
    out = op.run_with(lambda t: t.detach() if any(t is p for p in params) else t)
    if not isinstance(out, Tensor):
        return op.func(*op.args, **op.kwargs)
    out = NoRows.apply(tensors.use(op.name, params), out, *params)
    tensors.mark(out, None)
    return out


def _like(op: Operation) -> Tensor | None:
    """Return a result of the operation without numbers; None: it has several, or is not known."""
    with torch.no_grad(), without_modes():
        try:
            out = op.run_with(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
        except (RuntimeError, NotImplementedError):
            return None
    return out if isinstance(out, Tensor) else None


def _features(op: Operation) -> int | None:
    """Return how many of the last dimensions of its first operand an operation takes as one; None: it has no rows."""
    x, name = op.argument(0, "input"), op.name
    if not isinstance(x, Tensor) or any(x is p for p in op.parameters):
        return None
    if name == "linear":
        return 1
    if name in ("matmul", "__matmul__", "mm"):
        weight = op.argument(1, "other", op.kwargs.get("mat2"))
        return 1 if weight.dim() == 2 and x.dim() > 1 else None
    if name == "embedding":
        return 0
    if name in ("layer_norm", "rms_norm"):
        over = op.argument(1, "normalized_shape")
        return 1 if isinstance(over, int) else len(over)
    if name in _IMAGES:
        return _IMAGES[name] if x.dim() == _IMAGES[name] + 1 else None
    return x.dim() - 1 if name in _NORMS else None


def _by_rows(tensors: TensorState, op: Operation, x: Tensor, state: Numbered, dims: int) -> Tensor:
    batch = tensors.rules.batch

    def run(rows: Tensor) -> Tensor:
        tensors.mark(rows, SampleLayout(rows.numel() // batch))
        out: Tensor = tensors.run(lambda: op.run_with(lambda t: rows if t is x else t))
        return out

    out, table = by_rows(x, state, dims, batch, run)
    out = _guarded(tensors, op, out, table)
    tensors.mark(out, described(table, out.shape, batch))
    return out


# ---- Rows that no sample made ---------------------------------------------------------------------------------------


class Guard(torch.autograd.Function):
    """Refuses a gradient of entries that no sample made, for it is unknown whose it is."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, table: Tensor, refuse: Callable[[], None]) -> Tensor:
        ctx.table, ctx.refuse = table, refuse
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        with without_modes():
            check(g, ctx.table, ctx.refuse)
        return g, None, None


def check(g: Tensor, table: Tensor, refuse: Callable[[], None]) -> None:
    """Refuse a gradient of entries that no sample made, if it is not zero."""
    if bool((table == NO_SAMPLE).any()) and bool(g.masked_fill((table != NO_SAMPLE).to(g.device), 0).any()):
        refuse()


def _guarded(tensors: TensorState, op: Operation, out: Tensor, table: Tensor) -> Tensor:
    if not bool((table == NO_SAMPLE).any()):
        return out
    guarded: Tensor = Guard.apply(out, table, _refusal(tensors, op))
    return guarded


def _refusal(tensors: TensorState, op: Operation) -> Callable[[], None]:
    """Return a function that raises an error, or leaves out the parameters of an operation, as the user asked."""
    accumulator, records = tensors.accumulator, tensors.records(op.parameters)

    def refuse() -> None:
        if accumulator.uncovered_is == "raise":
            raise errors.rows_of_no_sample(records[0].described, op.name)
        accumulator.exclude(records)

    return refuse


# ---- Element by element ---------------------------------------------------------------------------------------------


class SpreadRows(torch.autograd.Function):
    """Repeats a parameter for every entry of the result, whose samples are in a table."""

    @staticmethod
    def forward(ctx: Any, use: Use, q: Tensor, shape: torch.Size, table: Tensor, refuse: Any) -> Tensor:
        ctx.use, ctx.shape, ctx.table, ctx.refuse = use, q.shape, table, refuse
        return q.expand(shape).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        with without_modes():
            ctx.use.begin()
            check(g, ctx.table, ctx.refuse)
            table = ctx.table.clamp(min=0).to(g.device)
            grad = ctx.use.measure(0, lambda: _contribution(g, table, ctx.use.batch, ctx.shape))
            return (None, grad, None, None, None)


def _contribution(g: Tensor, table: Tensor, batch: int, shape: torch.Size) -> Contribution:
    """Return what a gradient of the result contributes to a parameter that was broadcast."""
    aligned = [1] * (g.dim() - len(shape)) + list(shape)
    dims = max((d + 1 for d, size in enumerate(table.shape) if size != 1), default=0)
    if all(n == 1 for n in aligned[:dims]):
        rest = g.shape[dims:]
        numbers = without_last(table, g.dim() - dims).expand(g.shape[:dims]).reshape(-1).clamp(min=0)
        rows = g.new_zeros(batch, *rest).index_add_(0, numbers, g.reshape(-1, *rest))
        over = [1 + d for d, n in enumerate(aligned[dims:]) if n == 1 and rest[d] != 1]
        return Matrix((rows.sum(over) if over else rows).reshape(batch, -1), shape)

    def one(b: int) -> Tensor:
        return g.masked_fill(table != b, 0).sum_to_size(aligned).reshape(shape)

    return Loop(batch, shape, one)


def _spread(tensors: TensorState, op: Operation, table: Tensor) -> Any:
    shape = torch.broadcast_shapes(*(t.shape for t in op.tensors()))
    batch = tensors.rules.batch
    instead: dict[int, Tensor] = {}
    for q in op.parameters:
        if id(q) not in instead:
            instead[id(q)] = spread_rows(tensors, op, q, shape, table)
            tensors.mark(instead[id(q)], described(table, shape, batch))
    return tensors.run(lambda: op.run_with(lambda t: instead.get(id(t), t)))


def spread_rows(tensors: TensorState, op: Operation, q: Tensor, shape: torch.Size, table: Tensor) -> Tensor:
    """Return a parameter repeated for every entry of a shape, whose samples are in a table."""
    out: Tensor = SpreadRows.apply(tensors.use(op.name, [q]), q, shape, table, _refusal(tensors, op))
    return out


# ---- Any other operation --------------------------------------------------------------------------------------------


class MaskedSamples(torch.autograd.Function):
    """Computes an operation; its backward takes the gradient of the entries of one sample after the other."""

    @staticmethod
    def forward(ctx: Any, use: Use, run: Callable[..., Tensor], table: Tensor, refuse: Any, *tensors: Tensor) -> Tensor:
        ctx.use, ctx.run, ctx.table, ctx.refuse = use, run, table, refuse
        ctx.save_for_backward(*tensors)
        with without_modes():
            out = run(*tensors)
            return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        use: Use = ctx.use
        needs = ctx.needs_input_grad[4:]
        tensors = ctx.saved_tensors
        with without_modes():
            check(g, ctx.table, ctx.refuse)
            first = len(tensors) - len(use.targets)
            table = ctx.table.clamp(min=0).to(g.device)
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(needs[i]) for i, t in enumerate(tensors)]
                out = ctx.run(*leaves)

            def gradient(i: int, g: Tensor) -> Tensor:
                (d,) = torch.autograd.grad(out, leaves[i], g, retain_graph=True, allow_unused=True)
                return torch.zeros_like(leaves[i]) if d is None else d

            def contribution(i: int) -> Contribution:
                one = lambda b: gradient(first + i, g.masked_fill(table != b, 0))  # noqa: E731
                return Loop(use.batch, leaves[first + i].shape, one)

            use.begin()
            grads: list[Tensor | None] = [gradient(i, g) if needs[i] else None for i in range(first)]
            grads += [
                use.measure(i, functools.partial(contribution, i)) if needs[first + i] else None
                for i in range(len(use.targets))
            ]
            return (None, None, None, None, *grads)


def masked(tensors: TensorState, op: Operation, table: Tensor) -> Any:
    """Run an operation whose result has entries of the samples in a table, the backward sample by sample."""
    params = list({id(t): t for t in op.parameters}.values())
    data = list({id(t): t for t in op.tensors() if not any(t is p for p in params)}.values())
    order = {id(t): i for i, t in enumerate([*data, *params])}

    def run(*instead: Tensor) -> Tensor:
        out: Tensor = op.run_with(lambda t: instead[order[id(t)]])
        return out

    use = tensors.use(op.name, params)
    out: Tensor = MaskedSamples.apply(use, run, table, _refusal(tensors, op), *data, *params)
    tensors.mark(out, described(table, out.shape, tensors.rules.batch))
    return out


# ---- Experts --------------------------------------------------------------------------------------------------------


@handles("grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback", takes_numbered=True)
def grouped_mm(tensors: TensorState, op: Operation) -> Any:
    """Groups of rows, each times its matrix: one product after the other."""
    x = op.argument(0, "input", op.kwargs.get("mat_a", op.kwargs.get("self")))
    weight = op.argument(1, "weight", op.kwargs.get("mat_b", op.kwargs.get("mat2")))
    offs, bias = op.argument(2, "offs"), op.argument(3, "bias")
    is_parameter = any(weight is p for p in op.parameters)
    if x.dim() != 2 or weight.dim() != 3 or offs is None or bias is not None or not is_parameter:
        op.why = "grouped_mm is measured for rows (S, I) times a parameter (E, I, O), with offs and without a bias"
        return NotImplemented
    ends = offs.tolist()
    if ends[-1] != len(x):
        op.why = "some of its rows are in no group"
        return NotImplemented

    def products() -> Tensor:
        starts = [0, *ends[:-1]]
        parts = [x[a:b] @ weight[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < b]
        return torch.cat(parts) if parts else x.new_zeros(0, math.prod(weight.shape[2:]))

    return tensors.run(products)
