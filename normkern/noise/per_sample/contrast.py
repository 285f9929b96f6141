r"""A random contrast of the samples, whose gradient estimates their spread.

.. math::
    q = \sum_b h_b c_b, \qquad \sum_b h_b = 0: \qquad
    \mathbb E\,q_j^2 = \frac{\sum_b h_b^2}{B-1} \sum_b (c_{bj} - \bar c_j)^2

The mean is over random orders of any contrast h. For even B half of it is +1 and half -1 (balanced signs); for odd B
:math:`(B+1)/2` entries are :math:`1/(B+1)` and :math:`(B-1)/2` are :math:`-1/(B-1)`, so that every sample counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_generator: torch.Generator | None = None


@dataclass
class Contrast:
    """A random contrast of B samples."""

    weights: Tensor  #: (B,) float64, their sum is 0

    @classmethod
    def draw(cls, batch: int) -> Contrast:
        """Draw one from a generator of its own, seeded as torch first was, so that training's random numbers stay."""
        global _generator
        if _generator is None:
            _generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        plus = (batch + 1) // 2
        weights = torch.full((batch,), 1.0 / plus, dtype=torch.float64)
        weights[plus:] = -1.0 / (batch - plus)
        return cls(weights[torch.randperm(batch, generator=_generator)])

    def spread(self, q: Tensor, batch: int) -> Tensor:
        """Return an estimate of sum_b |c_b - mean|^2, elementwise, from the contrast's gradient q."""
        return (q.abs() if q.is_complex() else q).square() * ((batch - 1) / self.weights.square().sum().item())
