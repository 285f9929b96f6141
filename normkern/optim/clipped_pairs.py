"""`ClippedPairs`: notices that something has clipped the second gradients of pairs and not the first ones."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from .. import ops
from .options import caller_level

#: Steps in a row whose second gradients have one norm up to this relative difference, while the first ones vary more.
_STEPS, _SAME, _VARIES = 4, 1e-5, 1e-3


class ClippedPairs:
    """Looks at the norms of both gradients, step by step.

    A gradient clipped by its norm has the norm that it was clipped to. The norms of random gradients do not agree to
    five digits four times in a row, while those of their partners differ.
    """

    __slots__ = ("_norms", "found")

    def __init__(self) -> None:
        self._norms: list[tuple[float, float]] = []
        self.found = False

    def add(self, table: Tensor) -> bool:
        """Add the sums of a step; return True once, when it is found out. Synchronises."""
        if self.found:
            return False
        columns = [ops.column(table, name) for name in ("first_sq", "second_sq")]
        first_sq, second_sq = (float(x.nansum()) for x in columns)
        self._norms = [*self._norms[1 - _STEPS :], (math.sqrt(max(first_sq, 0)), math.sqrt(max(second_sq, 0)))]
        if len(self._norms) == _STEPS:
            first, second = zip(*self._norms, strict=True)
            is_same = max(second) - min(second) <= _SAME * max(second)
            self.found = is_same and max(first) - min(first) > _VARIES * max(first)
        return self.found


def warn_of_clipped_pairs() -> None:
    """Warn of gradients that were clipped between hold() and step(); the warning points at the caller of the step."""
    warnings.warn(
        "normkern: the second gradients of the last steps all have the same norm and the first ones have not: "
        "something clips .grad between hold() and step() (clip_grad_norm_, a trainer's max_grad_norm or "
        "gradient_clip_val), and the two gradients are no pair any more. Switch it off, and construct the optimizer "
        "with max_norm=, which clips their combination",
        UserWarning,
        stacklevel=caller_level(),
    )
