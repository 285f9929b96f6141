"""The same functions as `ops`, with the same signatures, in eager torch: the definition of correct.

The oracle of the tests (give it float64 tensors) and the "eager implementation" of the benchmarks. One statement per
line of the equations; never imported where speed matters.
"""

from __future__ import annotations

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
) -> Tensor | None:
    """`ops.sgd_`, one tensor and one operation at a time."""
    table = []
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            if stats:
                table.append(torch.full((_slots(p, stats), 5), torch.nan, dtype=torch.float64))
            continue
        real = p.dtype if p.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
        w, g = p.to(real), grad.to(real) / grad_scale
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
            table.append(step_sums(w_before, g, p, stats))
    return torch.cat(table) if stats else None


def step_sums(w: Tensor, g: Tensor, w_new: Tensor, stats: Stats) -> Tensor:
    """|w|^2, |g|^2, <w,g>, |u|^2, <w,u> with u = w_new - w, over the tensor or each row: (slots, 5) float64."""
    shape = (_slots(w, stats), -1) if w.numel() else (_slots(w, stats), 0)
    w, g, w_new = (_as_real(x.detach()).reshape(shape).double() for x in (w, g, w_new))
    u = w_new - w
    return torch.stack([(a * b).sum(1) for a, b in ((w, w), (g, g), (w, g), (u, u), (w, u))], dim=1)


def _slots(p: Tensor, stats: Stats) -> int:
    return p.shape[0] if stats == "row" and p.ndim >= 2 else 1


def _as_real(x: Tensor) -> Tensor:
    x = x.to_dense() if x.layout != torch.strided else x
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
