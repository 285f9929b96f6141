"""Recurrent cells: one step of a recurrent layer, computed by the formulas of torch on the CPU, whose gates are kept.

The contributions of all steps of a loop are to the same weights, and are added as those of one linear layer are
(`LinearContribution.merge`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import sample_layout
from ..numbered import Grouping, Order, order_along, ordered
from ..operation import Operation
from ..recurrent_call import agreed
from ..sums import real
from ..tensor_state import TensorState
from . import recurrent_steps
from .base import first_order, mixed, shape_of, without_modes
from .collected import Collected, collect
from .recurrent import RecurrentCheck, contribution_of
from .recurrent_steps import Steps, Weights, gru_gates, lstm_gates, products
from .registry import handles


class Cell:
    """One call of a cell.

    Args:
        name: of torch's function.
        order: the sample of each row.
        batch: the number of samples.
        shapes: of the weights.
    """

    def __init__(self, name: str, order: Order, batch: int, shapes: Sequence[torch.Size]) -> None:
        self.name, self.order, self.batch, self.shapes = name, order, batch, shapes
        self.states = 2 if name == "lstm_cell" else 1

    def run(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return the new states, as torch computes them."""
        out = getattr(torch._VF, self.name)(x, tuple(states) if self.states == 2 else states[0], *weights)
        return out if self.states == 2 else (out,)

    def forward(self, x: Tensor, states: Sequence[Tensor], w: Weights) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the new states, and what `gradients` needs of them: the gates, or the new state of an RNNCell."""
        from_h, from_x = products(x, states[0], w)
        if self.name == "lstm_cell":
            gates = lstm_gates(from_h, from_x)
            i, f, new, o = gates.unbind(1)
            c = (f * states[1]).add_(i * new)
            return (o * c.tanh(), c), (gates,)
        if self.name == "gru_cell":
            r, z, n, n_h = gru_gates(from_h, from_x)
            return ((states[0] - n).mul_(z).add_(n),), (r, z, n, n_h)
        pre = from_h.add_(from_x)
        y = pre.relu_() if self.name == "rnn_relu_cell" else pre.tanh_()
        return (y,), (y,)

    def gradients(
        self, kept: Sequence[Tensor], states: Sequence[Tensor], gs: Sequence[Tensor], w: Weights
    ) -> recurrent_steps.Gradients:
        """Return the gradients of the pre-activations and of the states before."""
        steps = Steps([len(states[0])], False)
        if self.name == "lstm_cell":
            return recurrent_steps.lstm(steps, kept[0], states[1], None, gs[0], gs[1], w)
        if self.name == "gru_cell":
            return recurrent_steps.gru(steps, kept, states[0], None, gs[0], w)
        return recurrent_steps.rnn(steps, kept[0], None, gs[0], w, self.name == "rnn_relu_cell")

    def group(self, rows: Tensor) -> Tensor:
        """Return the rows of each sample, (B, T, width)."""
        if isinstance(self.order, Tensor):
            return Grouping.of(self.order, self.batch, rows.device).group(rows)
        width = rows.shape[1]
        out = sample_layout.by_sample(rows, self.order * width, self.batch, width)
        assert out is not None
        return out


class CellFunction(torch.autograd.Function):
    """The autograd function of a cell."""

    @staticmethod
    def forward(
        ctx: Any, collected: Collected, cell: Cell, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.collected, ctx.cell = collected, cell
        with without_modes():
            states = [h] if c is None else [h, c]
            out, kept = cell.forward(x, states, Weights(*weights))  # type: ignore[arg-type]
        ctx.check = RecurrentCheck(cell.run, x) if collected.use.accumulator.checking else None
        ctx.count = len(states)
        ctx.save_for_backward(x, *states, *weights, *kept)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Any, ...]:
        collected, cell, count = ctx.collected, ctx.cell, ctx.count
        needs = ctx.needs_input_grad[2:]
        if all(g is None for g in gs):
            return (None,) * (2 + len(needs))
        x, *rest = ctx.saved_tensors  # with the mode on, as in `base`
        with without_modes():
            states, weights, kept = rest[:count], rest[count : count + len(needs) - 3], rest[count + len(needs) - 3 :]
            kind = real(x.dtype)
            given = [
                torch.zeros(s.shape, dtype=kind, device=s.device) if g is None else g.to(kind)
                for g, s in zip(gs, (kept[0] if count == 1 else states[1],) * count, strict=True)
            ]
            w = Weights(*(None if p is None else p.to(kind) for p in weights))  # type: ignore[arg-type]
            before = [s.to(kind) for s in states]
            of = cell.gradients([t.to(kind) for t in kept], before, given, w)
            rows = x.to(kind)
            contribution = contribution_of(
                cell.group, functools.cache(lambda: cell.group(rows)), before[0], of, True, cell.shapes
            )
            collected.add(contribution)
            if ctx.check is not None and not collected.use.accumulator.estimating:
                ctx.check.compare(collected.use, x, states, weights, gs, contribution)
                ctx.check = None
            dx = (of.of_x @ w.w_x).to(x.dtype) if needs[0] else None
            dh = of.h.to(states[0].dtype) if needs[1] else None
            dc = of.c.to(states[1].dtype) if needs[2] and of.c is not None else None
            return (None, None, dx, dh, dc, *(None,) * (len(needs) - 3))


@handles("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", needs_batch=True, takes_numbered=True)
def recurrent_cell(tensors: TensorState, op: Operation) -> Any:
    """torch.nn.RNNCell, LSTMCell and GRUCell."""
    x, hx, w_x, w_h, b_x, b_h = op.bind("input hx w_ih w_hh b_ih b_hh")
    states, batch, weights = list(hx) if op.name == "lstm_cell" else [hx], tensors.rules.batch, (w_x, w_h, b_x, b_h)
    given = (x, *states)
    if x.dim() != 2 or any(tensors.is_parameter(t) for t in given):
        return NotImplemented
    of = {id(t): tensors.state(t) for t in given}
    found = order_along(x.shape, of[id(x)], 0, batch)
    order = agreed("they are not the rows of its input" if found is None else found, x, states, 0, of, batch)
    if isinstance(order, str):
        raise mixed(tensors, op.name, op.parameters[0], order)
    collected, used = collect(tensors, op.name, weights)
    cell = Cell(op.name, order, batch, [shape_of(w) for w in weights])
    out = CellFunction.apply(collected, cell, x, *(*states, None)[:2], *used)
    for t in out:
        tensors.mark(t, ordered(t.shape, 0, order, batch))
    return out if op.name == "lstm_cell" else out[0]
