"""Checks of pairs of gradients by torch's version counters.

`ClippedPairs` notices that something has clipped the second gradients and not the first ones, `SecondGradient` that
nothing has cleared the second ones before the next backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .options import caller_level

#: Steps with the same number of additional writes that convict: from the first pair on, and later.
_FROM_THE_FIRST, _LATER = 3, 20


def writes(grad: Any) -> int | None:
    """Return how often a gradient was written in place, by torch's version counter.

    None for no gradient, for one without storage (sparse), and for a view, whose counter is that of the whole memory
    (DDP's buckets).
    """
    if type(grad) is not Tensor or grad.layout != torch.strided or grad.is_inference() or grad._is_view():
        return None
    return grad._version


class ClippedPairs:
    """Compares, step by step, how often both gradients of each pair were written in place.

    Backwards of the same graph write equally often. ``clip_grad_norm_`` and ``clip_grad_value_`` write every ``.grad``
    once more, which shows at once if the first gradients were not written after they were made. Where they were
    (micro-batches, DDP, weights used several times), the number may vary by itself, so several steps must agree.
    """

    __slots__ = ("_before", "_count", "_in_a_row", "found")

    def __init__(self) -> None:
        self._before = self._count = self._in_a_row = 0
        self.found = False

    def add(self, count: int, writes_of: Callable[[int], tuple[int | None, int | None]], expected: int) -> bool:
        """Add the pairs of a step; return True once, when clipping is found.

        Args:
            count: of parameters.
            writes_of: `writes` of both gradients of the i-th parameter.
            expected: how often something that is known has written the second ones.
        """
        if self.found:
            return False
        times = self._additional(count, writes_of) - expected
        self._in_a_row = self._in_a_row + 1 if times == self._before else 1
        self._before = times
        self._count += 1
        if times <= 0:
            return False
        needed = _FROM_THE_FIRST if self._in_a_row == self._count else _LATER
        self.found = self._in_a_row >= needed or not any(writes_of(i)[0] for i in range(count))
        return self.found

    @staticmethod
    def _additional(count: int, writes_of: Callable[[int], tuple[int | None, int | None]]) -> int:
        """Return how much more often all second gradients were written; 0 where they do not agree."""
        more: int | None = None
        for i in range(count):
            first, second = writes_of(i)
            if first is None or second is None:
                continue
            if second <= first or more not in (None, second - first):
                return 0  # at the first parameter, in most steps
            more = second - first
        return more or 0


class SecondGradient:
    """The second gradient of one parameter, as a step has left it in ``.grad``."""

    __slots__ = ("_id", "_param", "_pointer", "_writes")

    def __init__(self, params: Sequence[Any]) -> None:
        """Look at the first parameter whose gradient is a plain tensor."""
        self._param: Any = None
        for p in params:
            grad = p.grad
            count = writes(grad)
            if count is not None:
                self._param, self._id, self._pointer, self._writes = p, id(grad), grad.data_ptr(), count
                return

    def was_added_to(self) -> bool:
        """Return whether a backward has added to it, as often as one has written it before.

        ``zero_grad()`` makes a new tensor, ``zero_grad(set_to_none=False)`` writes once more.
        """
        grad = None if self._param is None else self._param.grad
        if grad is None or id(grad) != self._id or grad.data_ptr() != self._pointer:
            return False
        return writes(grad) == 2 * self._writes + 1


def warn_of_clipped_pairs() -> None:
    """Warn of gradients that were clipped between hold() and step(); the warning points at the caller of the step."""
    warnings.warn(
        "normkern: something clips .grad between hold() and step() (clip_grad_norm_, a trainer's max_grad_norm or "
        "gradient_clip_val): the second gradients are written in place after their backward, and the first ones are "
        "not. So they are no longer a pair, and noise() and the steps are wrong. Switch it off, and construct the "
        "optimizer with max_norm=, which clips their combination",
        UserWarning,
        stacklevel=caller_level(),
    )
