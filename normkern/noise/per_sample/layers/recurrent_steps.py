"""Backpropagation through time of one direction of a recurrent layer, from its inputs and outputs.

The outputs are known, so the products with the weights, which cost the most, are computed for all time steps at once.
What is left for each step is the recurrence of the gradient, a product and a few operations element by element.

Rows are those of all steps, one step after the other; a step has as many rows as sequences that reach it. Everything is
in the dtype in which contributions are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Steps:
    """The time steps of one direction, in the order in which the forward takes them.

    Args:
        sizes: the number of sequences that reach each time step; they are sorted, the longest first.
        is_reversed: whether the forward begins at the last step.
    """

    def __init__(self, sizes: Sequence[int], is_reversed: bool) -> None:
        self.sizes = list(sizes)
        count = len(self.sizes)
        self.order = range(count - 1, -1, -1) if is_reversed else range(count)
        self.is_reversed = is_reversed

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each step, as views."""
        return rows.split(self.sizes)

    def before(self, rows: Tensor, first: Tensor) -> Tensor:
        """Return for each row that of the step before, in the order of the forward; `first` where there is none."""
        each, sizes = self.split(rows), self.sizes
        if not self.is_reversed:
            return torch.cat([first[: sizes[0]], *(x[:n] for x, n in zip(each, sizes[1:], strict=False))])
        parts: list[Tensor] = []
        for t, n in enumerate(sizes):
            reached = sizes[t + 1] if t + 1 < len(sizes) else 0
            parts += [each[t + 1], first[reached:n]] if reached else [first[:n]]
        return torch.cat(parts)


class Weights(NamedTuple):
    """The weights of one direction."""

    w_x: Tensor
    w_h: Tensor
    b_x: Tensor | None
    b_h: Tensor | None
    w_r: Tensor | None = None  #: of an LSTM with projections


@dataclass
class Gradients:
    """The gradients of one direction: dL/d of its pre-activations; all other gradients are products with them."""

    of_x: Tensor  #: (rows, gates) of W_x x + b_x
    of_h: Tensor  #: (rows, gates) of W_h h + b_h; of_x itself, unless a gate comes between
    h: Tensor  #: (sequences, width) of the first state
    c: Tensor | None = None
    projected: tuple[Tensor, Tensor] | None = None  #: what is projected, and dL/d of the projections


def products(x: Tensor, h: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """Return W_h h + b_h and W_x x + b_x."""
    return F.linear(h, w.w_h, w.b_h), F.linear(x, w.w_x, w.b_x)


def gru_gates(from_h: Tensor, from_x: Tensor) -> tuple[Tensor, ...]:
    """Return r, z, n and n_h, in part in the memory of the products."""
    r_h, z_h, n_h = from_h.chunk(3, 1)
    r_x, z_x, n_x = from_x.chunk(3, 1)
    r, z = r_h.add_(r_x).sigmoid_(), z_h.add_(z_x).sigmoid_()
    return r, z, n_x.add(n_h * r).tanh_(), n_h


def lstm_gates(from_h: Tensor, from_x: Tensor) -> Tensor:
    """Return i, f, g and o, (rows, 4, width), in the memory of a product."""
    gates = from_h.add_(from_x).unflatten(1, (4, -1))
    gates[:, :2].sigmoid_()
    gates[:, 2].tanh_()
    gates[:, 3].sigmoid_()
    return gates


def rnn(steps: Steps, y: Tensor, g: Tensor | None, g_h: Tensor, w: Weights, is_relu: bool) -> Gradients:
    """Return the gradients of h' = tanh(W_x x + b_x + W_h h + b_h), or relu of it, from the outputs y."""
    slope = (y > 0).to(y.dtype) if is_relu else 1 - y * y
    of = torch.empty_like(slope)

    def step(t: int, d: Tensor) -> Tensor:
        return torch.mul(d, slopes[t], out=into[t])

    slopes, into = steps.split(slope), steps.split(of)
    return Gradients(of, of, _backward(steps, g, g_h, step, w.w_h))


def gru(
    steps: Steps, gates: Sequence[Tensor], before: Tensor, g: Tensor | None, g_h: Tensor, w: Weights
) -> Gradients:  # fmt: skip
    """Return the gradients of h' = n + z (h - n) with n = tanh(n_x + r n_h), from the gates r, z, n and n_h."""
    r, z, n, n_h = gates
    width = before.shape[1]
    slope = (1 - z) * (1 - n * n)  # of n's pre-activation
    factors = n.new_empty(len(n), 3, width)  # of r, z and n_h
    torch.mul(slope, n_h, out=factors[:, 0]).mul_(r).mul_(1 - r)
    torch.mul(before - n, z, out=factors[:, 1]).mul_(1 - z)
    torch.mul(slope, r, out=factors[:, 2])
    of_h = torch.empty_like(factors)
    arrived = torch.empty_like(n)
    parts, into, kept, leaks = (steps.split(a) for a in (factors, of_h, arrived, z))

    def step(t: int, d: Tensor) -> Tensor:
        kept[t].copy_(d)
        return torch.mul(d.unsqueeze(1), parts[t], out=into[t]).flatten(1)

    first = _backward(steps, g, g_h, step, w.w_h, leaks)
    of_n = arrived.mul_(slope)
    of_h = of_h.flatten(1)
    return Gradients(torch.cat([of_h[:, : 2 * width], of_n], 1), of_h, first)


def lstm(
    steps: Steps, gates: Tensor, c_first: Tensor, g: Tensor | None, g_h: Tensor, g_c: Tensor, w: Weights
) -> Gradients:  # fmt: skip
    """Return the gradients of c' = f c + i g, h' = o tanh(c') or a projection of it, from the gates i, f, g and o."""
    rows, _, width = gates.shape
    i, f, new, o = gates.unbind(1)
    cells = _cells(steps, i * new, f, c_first)
    squashed = cells.tanh()
    slope = (1 - squashed * squashed).mul_(o)  # dh/dc
    last = (1 - o).mul_(o).mul_(squashed)  # dh/d of o's pre-activation
    factors = gates.new_empty(rows, 3, width)  # dc/d of those of i, f and g
    torch.mul(1 - i, i, out=factors[:, 0]).mul_(new)
    torch.mul(1 - f, f, out=factors[:, 1]).mul_(steps.before(cells, c_first))
    torch.mul(new, new, out=factors[:, 2]).neg_().add_(1).mul_(i)
    of = torch.empty_like(gates)
    arrived = None if w.w_r is None else gates.new_empty(rows, len(w.w_r))
    parts, slopes, lasts, into, leaks = (steps.split(a) for a in (factors, slope, last, of, f))
    kept = None if arrived is None else steps.split(arrived)
    w_r, g_c = w.w_r, g_c.clone()

    def step(t: int, d: Tensor) -> Tensor:
        if kept is not None and w_r is not None:
            kept[t].copy_(d)
            d = d @ w_r
        c = g_c[: len(d)]
        c.addcmul_(d, slopes[t])
        torch.mul(c.unsqueeze(1), parts[t], out=into[t][:, :3])
        torch.mul(d, lasts[t], out=into[t][:, 3])
        c.mul_(leaks[t])
        return into[t].flatten(1)

    first = _backward(steps, g, g_h, step, w.w_h)
    of = of.flatten(1)
    return Gradients(of, of, first, g_c, None if arrived is None else (o * squashed, arrived))


def _cells(steps: Steps, new: Tensor, f: Tensor, first: Tensor) -> Tensor:
    """Return the cell states of all rows, c' = f c + new, in the memory of `new`."""
    news, leaks = steps.split(new), steps.split(f)
    c = first
    for t in steps.order:
        count = len(news[t])
        c = c[:count] if count <= len(c) else torch.cat([c, first[len(c) : count]])  # more sequences begin here
        c = news[t].addcmul_(leaks[t], c)
    return new


def _backward(
    steps: Steps, g: Tensor | None, g_h: Tensor, step: Callable[[int, Tensor], Tensor], w_h: Tensor,
    leaks: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Run from the last step to the first, and return dL/d of the first state.

    Args:
        g: dL/d of the outputs, or None.
        g_h: dL/d of the last state.
        step: returns the gradient of a step's pre-activations from that of its output.
        leaks: what a state keeps of the one before, besides what goes through the weight.
    """
    h = g_h.clone()
    outer = None if g is None else steps.split(g)
    for t in reversed(steps.order):
        d = h[: steps.sizes[t]]
        if outer is not None:
            d.add_(outer[t])
        of = step(t, d)
        if leaks is None:
            torch.mm(of, w_h, out=d)
        else:
            d.mul_(leaks[t]).addmm_(of, w_h)
    return h
