"""`Pair`: the gradients of a step from two."""

from __future__ import annotations

from typing import Any, NamedTuple


class Pair(NamedTuple):
    """The gradients of one group in a step from two gradients, such as SVAG's."""

    held: list[Any]  # the first ones; None: no pair, the only gradient is in `grads`
    grads: list[Any]
    has_own_grads: bool  # `grads` are the parameters' own, each of a pair
    l: float
    first_inverse_scale: float
    second_inverse_scale: float
