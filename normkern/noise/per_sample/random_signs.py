r"""The estimator for whatever no layer's rule covers: one more backward, with the samples' gradients signed at random.

.. math::
    q = \sum_b h_b c_b, \qquad \sum_b h_b = 0: \qquad
    \mathbb E\,q_j^2 = \frac{\sum_b h_b^2}{B-1} \sum_b (c_{bj} - \bar c_j)^2

over random orders of any contrast h. For even B half of it is +1 and half -1 (balanced signs); for odd B
:math:`(B+1)/2` entries are :math:`1/(B+1)` and :math:`(B-1)/2` are :math:`-1/(B-1)`, so that every sample counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sample_layout as rows

if TYPE_CHECKING:
    from .accumulator import Ledger

_generator: torch.Generator | None = None


@dataclass
class Contrast:
    """A random contrast of B samples."""

    weights: Tensor  #: (B,) float64, their sum is 0

    @classmethod
    def draw(cls, batch: int) -> Contrast:
        """From a generator of its own, seeded as torch first was: the training's random numbers stay as they are."""
        global _generator
        if _generator is None:
            _generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        plus = (batch + 1) // 2
        weights = torch.full((batch,), 1.0 / plus, dtype=torch.float64)
        weights[plus:] = -1.0 / (batch - plus)
        return cls(weights[torch.randperm(batch, generator=_generator)])

    def spread(self, q: Tensor, batch: int) -> Tensor:
        """An estimate of sum_b (c_b - mean)^2, elementwise, from the contrast's gradient."""
        return q.square() * ((batch - 1) / self.weights.square().sum().item())


class Tap(torch.autograd.Function):
    """The model's output; on the way back, once more with the samples' gradients weighted by the contrast."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, block: int, out: Tensor, held: list[Tensor]) -> Tensor:
        ctx.ledger, ctx.block, ctx.held = ledger, block, held
        return out.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        ledger: Ledger = ctx.ledger
        out = ctx.held[0]
        estimated = [r for r in ledger.records if r.status == "estimated"]
        batch = ledger.batch
        if estimated and ledger.open and not ledger.estimating and batch is not None:
            if ledger.contrast is None or len(ledger.contrast.weights) != batch:
                ledger.contrast = Contrast.draw(batch)
            numbers = rows.numbers(g.shape, ctx.block, batch).long().to(g.device)
            weights = ledger.contrast.weights.to(g.device, g.dtype)[numbers]
            ledger.estimating = True
            try:
                with torch._C.DisableTorchFunction():
                    found = torch.autograd.grad(
                        out, [r.param for r in estimated], g * weights, retain_graph=True, allow_unused=True
                    )
            finally:
                ledger.estimating = False
            for r, q in zip(estimated, found, strict=True):
                if q is not None:
                    r.signed = q if r.signed is None else r.signed + q
        ctx.held.clear()
        return None, None, g, None
