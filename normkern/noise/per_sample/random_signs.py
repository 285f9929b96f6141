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
from .record import ParameterRecord


class SignedBackward(torch.autograd.Function):
    """The model's output; its backward first runs once more with the samples' gradients weighted by the contrast."""

    @staticmethod
    def forward(ctx: Any, accumulator: Accumulator, block: int, out: Tensor, held: list[Tensor]) -> Tensor:
        ctx.accumulator, ctx.block, ctx.held = accumulator, block, held
        return out.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        accumulator: Accumulator = ctx.accumulator
        if not accumulator.reaches_parameters():
            return None, None, g, None
        out = ctx.held[0]
        estimated = [r for r in accumulator.records if r.status == "estimated"]
        unseen = [r for r in accumulator.records if r.status == "exact" and not r.is_seen]
        batch = accumulator.batch
        if (estimated or unseen) and accumulator.open and accumulator.is_measuring and batch is not None:
            if accumulator.contrast is None or len(accumulator.contrast.weights) != batch:
                accumulator.contrast = Contrast.draw(batch)
            numbers = sample_layout.numbers(g.shape, ctx.block, batch).long().to(g.device)
            weights = accumulator.contrast.weights.to(g.device, g.dtype)[numbers]
            accumulator.estimating = True
            try:
                try:
                    _sign([*estimated, *unseen], out, g * weights)
                except RuntimeError as error:
                    if "Checkpointing" not in str(error):
                        raise
                    _sign(estimated, out, g * weights)  # the others' forward comes in the backward
            finally:
                accumulator.estimating = False
        ctx.held.clear()
        return None, None, g, None


def _sign(records: list[ParameterRecord], out: Tensor, signed: Tensor) -> None:
    """Add the gradients of these parameters from a signed gradient of an output."""
    if not records:
        return
    with torch._C.DisableTorchFunction():
        found = torch.autograd.grad(out, [r.param for r in records], signed, retain_graph=True, allow_unused=True)
    for r, q in zip(records, found, strict=True):
        if q is not None:
            r.signed = q if r.signed is None else r.signed + q
