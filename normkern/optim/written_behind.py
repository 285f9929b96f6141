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
#: Parameters that a step looks at. To read a version counter costs as much as to step a small tensor.
_AT_A_TIME = 4


class Versions:
    """The version counters and addresses of a group's parameters after a step.

    A step adds one to every counter, so that a write from outside stays visible. Each step looks at some parameters,
    one after the other: it finds at once what writes all of them, as averages and loading do, and one alone after all
    have had their turn.
    """

    __slots__ = ("_layouts", "_next", "_numbers", "_params", "_steps")

    def __init__(self, params: Sequence[Any]) -> None:
        self._params = list(params)
        self._numbers = _numbers(params)
        self._layouts = [] if self._numbers is None else [_layout(p) for p in params]
        self._steps = self._next = 0

    def stepped(self) -> None:
        """Expect every counter to be higher by one: the kernel has written all parameters, once."""
        self._steps += 1

    def find_written(self, params: Sequence[Any], is_whole: bool) -> int | None:
        """Return a parameter that was written by others; None where none was found, or the group has others now.

        `is_whole`: the kernel takes the whole group, and `stepped` is all that follows; else all parameters have their
        turn at once, as the next step will not know what this one does to the counters.
        """
        count = len(self._params)
        if len(params) != count or self._numbers is None or (not is_whole and in_dispatch_mode()):
            return None
        turns = range(count) if not is_whole else range(self._next, min(self._next + _AT_A_TIME, count))
        self._next = turns.stop if turns.stop < count else 0
        versions, pointers = self._numbers
        for i in turns:
            p = params[i]
            if p is not self._params[i]:
                self._numbers = None
                return None
            if p._version != versions[i] + self._steps or p.data_ptr() != pointers[i]:
                # Another dtype, device or memory format has the same values.
                if _layout(p) == self._layouts[i]:
                    return i
                versions[i], pointers[i], self._layouts[i] = p._version - self._steps, p.data_ptr(), _layout(p)
        return None

    def are_of(self, params: Sequence[Any]) -> bool:
        """Return whether these are the parameters that were read, as far as `find_written` has looked."""
        return self._numbers is not None and len(params) == len(self._params)


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
        f'normkern: the weight {name} was written between steps, in a group with decay="exponential". The scale '
        "of its stored weights changes from step to step, so weights that are mixed with earlier ones (Lookahead, "
        "averaging over processes) or restored without the optimizer's state have a wrong scale. Load the optimizer's "
        "state together with the weights; without momentum, name the copies that are mixed in the group's followers; "
        'else use decay="coupled"',
        UserWarning,
        stacklevel=caller_level(),
    )
