"""`SignedBackward`: the estimator for parameters that no handler measures.

One more backward runs from the model's outputs, in which each sample's gradient is multiplied by its weight in a random
contrast (`contrast`). The gradients that it gives estimate the spread of the per-sample gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import sample_layout
from .accumulator import Accumulator
from .contrast import Contrast


class SignedBackward(torch.autograd.Function):
    """The model's output; its backward first runs once more with the samples' gradients weighted by the contrast."""

    @staticmethod
    def forward(ctx: Any, accumulator: Accumulator, block: int, out: Tensor, held: list[Tensor]) -> Tensor:
        ctx.accumulator, ctx.block, ctx.held = accumulator, block, held
        return out.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        accumulator: Accumulator = ctx.accumulator
        out = ctx.held[0]
        estimated = [
            r for r in accumulator.records if r.status == "estimated" or (r.status == "exact" and not r.expected)
        ]
        batch = accumulator.batch
        if estimated and accumulator.open and not accumulator.estimating and batch is not None:
            if accumulator.contrast is None or len(accumulator.contrast.weights) != batch:
                accumulator.contrast = Contrast.draw(batch)
            numbers = sample_layout.numbers(g.shape, ctx.block, batch).long().to(g.device)
            weights = accumulator.contrast.weights.to(g.device, g.dtype)[numbers]
            accumulator.estimating = True
            try:
                with torch._C.DisableTorchFunction():
                    found = torch.autograd.grad(
                        out, [r.param for r in estimated], g * weights, retain_graph=True, allow_unused=True
                    )
            finally:
                accumulator.estimating = False
            for r, q in zip(estimated, found, strict=True):
                if q is not None:
                    r.signed = q if r.signed is None else r.signed + q
        ctx.held.clear()
        return None, None, g, None
