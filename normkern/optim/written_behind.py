"""`Versions`: finds weights that something else than the optimizer has written between two steps.

A group with ``decay="exponential"`` stores weights at a scale that changes from step to step. Weights that are mixed
with earlier ones or restored (Lookahead, post-local SGD, loading a model without its optimizer) are of another scale
than the optimizer thinks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tracing import in_dispatch_mode
from .options import caller_level

_PLAIN = (Tensor, torch.nn.Parameter)


class Versions:
    """What a step has left of a group's parameters: version counters, and where they are in memory."""

    __slots__ = ("_entries", "_params")

    def __init__(self, params: Sequence[Any]) -> None:
        self._params = list(params)
        self._entries = [_entry(p) for p in params]

    def written(self, params: Sequence[Any]) -> int | None:
        """Return the first parameter that was written since; None where none was, or the group has others now."""
        if len(params) != len(self._params):
            return None
        for i, (p, old, before) in enumerate(zip(params, self._params, self._entries, strict=True)):
            now = _entry(p) if p is old and before is not None else None
            # Another dtype, device or memory format has the same values.
            if now is not None and before is not None and now[:2] != before[:2] and now[2:] == before[2:]:
                return i
        return None


def _entry(p: Any) -> tuple[Any, ...] | None:
    if type(p) not in _PLAIN or p.is_meta or p.is_inference() or in_dispatch_mode():
        return None
    return p._version, p.data_ptr(), p.dtype, p.device, p.stride()


def warn_of_written(name: str) -> None:
    """Warn of a weight that was written between two steps; the warning points at the caller of the step."""
    warnings.warn(
        f'normkern: the weight {name} was written since the last step, in a group with decay="exponential", whose '
        "weights are stored at a scale of their own: mixed with those of other steps (Lookahead, averaging over "
        "processes) or restored without the optimizer's state they are of another run. Load the optimizer's state "
        "together with the weights; without momentum, name the copies that are mixed in the group's followers; else "
        'use decay="coupled"',
        UserWarning,
        stacklevel=caller_level(),
    )
