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

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Versions:
    """The version counters and addresses of a group's parameters after a step."""

    __slots__ = ("_layouts", "_numbers", "_params")

    def __init__(self, params: Sequence[Any], before: Versions | None = None) -> None:
        """Read the parameters; `before`, of the last step, has the layouts of those that are where they were."""
        self._params = list(params)
        self._numbers = _numbers(params)
        self._layouts: list[tuple[Any, ...]]
        if before is not None and len(before._params) == len(params) and before._pointers() == self._pointers():
            self._layouts = before._layouts
        else:
            self._layouts = [_layout(p) for p in params]

    def _pointers(self) -> list[int] | None:
        return None if self._numbers is None else self._numbers[1]

    def written(self, params: Sequence[Any]) -> int | None:
        """Return the first parameter that was written since; None where none was, or the group has others now."""
        if len(params) != len(self._params) or self._numbers is None:
            return None
        now = _numbers(params)
        if now is None or now == self._numbers:
            return None
        for i, (p, old, layout) in enumerate(zip(params, self._params, self._layouts, strict=True)):
            changed = any(kind[i] != before[i] for kind, before in zip(now, self._numbers, strict=True))
            # Another dtype, device or memory format has the same values.
            if p is old and changed and _layout(p) == layout:
                return i
        return None


def _numbers(params: Sequence[Any]) -> tuple[list[int], list[int]] | None:
    """Return version counters and addresses; None where one has none: subclasses, inference tensors, fake tensors."""
    if not _PLAIN.issuperset(map(type, params)) or in_dispatch_mode():
        return None
    try:
        return [p._version for p in params], [p.data_ptr() for p in params]
    except RuntimeError:  # a tensor made under inference_mode
        return None


def _layout(p: Any) -> tuple[Any, ...]:
    return p.dtype, p.device, p.stride()


def warn_of_written(name: str) -> None:
    """Warn of a weight that was written between two steps; the warning points at the caller of the step."""
    warnings.warn(
        f'normkern: the weight {name} was written since the last step, in a group with decay="exponential". The scale '
        "of its stored weights changes from step to step, so weights that are mixed with earlier ones (Lookahead, "
        "averaging over processes) or restored without the optimizer's state have a wrong scale. Load the optimizer's "
        "state together with the weights; without momentum, name the copies that are mixed in the group's followers; "
        'else use decay="coupled"',
        UserWarning,
        stacklevel=caller_level(),
    )
