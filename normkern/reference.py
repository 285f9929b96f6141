"""The same functions as `ops`, with the same signatures, in eager torch: the definition of correct.

The oracle of the tests (give it float64 tensors) and the "eager implementation" of the benchmarks. One statement per
line of the equations; never imported where speed matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import Stats


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None] | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    stats: Stats = None,
    held: Sequence[Tensor | None] | None = None,
    l: float = 1.0,
    held_scale: float = 1.0,
) -> Tensor | None:
    """`ops.sgd_`, one tensor and one operation at a time."""
    table, pairs = [], held is not None and any(h is not None for h in held)
    stats = stats or (None if held is None else "tensor")
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            if stats:
                table.append(_no_sums(p, stats, 9 if pairs else 5))
            continue
        real = _real_dtype(p)
        w, g = p.to(real), grad.to(real) / (grad_scale if held is None else held_scale)
        first = None if held is None else held[i]
        g1 = None if first is None else first.to(real) / held_scale
        if g1 is not None:
            g2 = grad.to(real) / grad_scale
            g = svag_combination(g1, g2, l)
        w_before = w.clone() if stats else w
        d = -g if maximize else g
        if weight_decay != 0:
            d = d + weight_decay * w
        u = d
        if momentum != 0:
            assert momentum_buffers is not None
            v = momentum_buffers[i]
            v_new = d.clone() if v is None else momentum * v.to(real) + (1 - dampening) * d
            u = d + momentum * v_new if nesterov else v_new
            if v is None:
                v = momentum_buffers[i] = torch.empty_like(p, requires_grad=False)
            v.copy_(v_new)
        p.copy_(w - lr * u)
        if stats:
            sums = [step_sums(w_before, g, p, stats)]
            if pairs:
                sums.append(_no_sums(p, stats, 4) if g1 is None else gradient_sums(g1, g2, stats))
            table.append(torch.cat(sums, dim=1))
    return torch.cat(table) if stats else None


def svag_combination(g1: Tensor, g2: Tensor, l: float) -> Tensor:
    """(g1 + g2)/2 + sqrt(2l - 1)/2 (g1 - g2); g1 for l = 1."""
    return g1 if l == 1 else (g1 + g2) * 0.5 + (g1 - g2) * (math.sqrt(2 * l - 1) / 2)


@torch.no_grad()
def svag_combine_(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], l: float) -> None:
    """`ops.svag_combine_`."""
    for a, b in zip(grads_a, grads_b, strict=True):
        if a is not None and b is not None:
            real = _real_dtype(a)
            a.copy_(svag_combination(a.to(real), b.to(real), l))


def pair_sums(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], stats: Stats = "tensor") -> Tensor:
    """`ops.pair_sums`."""
    table = []
    device = next((a.device for a in grads_a if a is not None), None)
    for a, b in zip(grads_a, grads_b, strict=True):
        if a is None or b is None:
            table.append(torch.full((1, 4), torch.nan, dtype=torch.float64, device=device))
        else:
            table.append(gradient_sums(a, b, stats))
    return torch.cat(table) if table else torch.empty((0, 4), dtype=torch.float64)


@torch.no_grad()
def welford_(
    means: Sequence[Tensor], samples: Sequence[Tensor | None], squares: Sequence[Tensor], *, n: int, stats: Stats = None
) -> Tensor | None:
    """`ops.welford_`."""
    table = []
    for m, x, s in zip(means, samples, squares, strict=True):
        if x is None:
            if stats:
                table.append(_no_sums(m, stats, 5))
            continue
        real = _real_dtype(m)
        before, sample = m.to(real), x.to(real)
        after = before + (sample - before) / n
        s.copy_(s.to(real) + (sample - before) * (sample - after))
        if stats:
            table.append(step_sums(before, sample, after.to(m.dtype), stats))
        m.copy_(after)
    return torch.cat(table) if stats else None


def gradient_sums(g1: Tensor, g2: Tensor, stats: Stats) -> Tensor:
    """<g1,g2>, |g1-g2|^2, |g1|^2, |g2|^2 over the tensor or each row: (slots, 4) float64."""
    shape = (_slots(g1, stats), -1) if g1.numel() else (_slots(g1, stats), 0)
    a, b = (_as_real(x.detach()).reshape(shape).double() for x in (g1, g2))
    return torch.stack([(x * y).sum(1) for x, y in ((a, b), (a - b, a - b), (a, a), (b, b))], dim=1)


def step_sums(w: Tensor, g: Tensor, w_new: Tensor, stats: Stats) -> Tensor:
    """|w|^2, |g|^2, <w,g>, |u|^2, <w,u> with u = w_new - w, over the tensor or each row: (slots, 5) float64."""
    shape = (_slots(w, stats), -1) if w.numel() else (_slots(w, stats), 0)
    w, g, w_new = (_as_real(x.detach()).reshape(shape).double() for x in (w, g, w_new))
    u = w_new - w
    return torch.stack([(a * b).sum(1) for a, b in ((w, w), (g, g), (w, g), (u, u), (w, u))], dim=1)


def _real_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32


def _no_sums(p: Tensor, stats: Stats, columns: int) -> Tensor:
    """The rows of an entry that was skipped."""
    return torch.full((_slots(p, stats), columns), torch.nan, dtype=torch.float64, device=p.device)


def _slots(p: Tensor, stats: Stats) -> int:
    return p.shape[0] if stats == "row" and p.ndim >= 2 else 1


def _as_real(x: Tensor) -> Tensor:
    x = x.to_dense() if x.layout != torch.strided else x
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
