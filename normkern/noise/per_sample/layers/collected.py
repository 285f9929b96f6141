"""Weights that one call of the model uses many times, step by step: their contributions are summed in one pass.

An autograd node between the weights and their uses runs after all uses of a backward, so that the products of all steps
become one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contributions import Contribution
from ..tensor_state import TensorState, Use
from .base import first_order, without_modes


class Collected:
    """The contributions of all uses of some weights in one call of the model, which come in the backward."""

    def __init__(self, use: Use) -> None:
        self.use = use
        self._came: dict[int, list[Callable[[int], Contribution]]] = {}  # by the backward, which may run inside another

    def add(self, contribution: Callable[[int], Contribution]) -> None:
        """Take a function that returns the contributions of one use to the i-th weight."""
        if not any(target is not None for target in self.use.targets):
            return
        self._came.setdefault(torch._C._current_graph_task_id(), []).append(contribution)

    def take(self) -> list[Callable[[int], Contribution]]:
        """Return what came in this backward, and forget everything."""
        came = self._came.get(torch._C._current_graph_task_id(), [])
        self._came = {}
        return came


class Collect(torch.autograd.Function):
    """Returns the weights; its backward measures what was collected."""

    @staticmethod
    def forward(ctx: Any, collected: Collected, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.collected = collected
        ctx.set_materialize_grads(False)
        return tuple(None if w is None else w.view_as(w) for w in weights)

    @staticmethod
    @first_order
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Any, ...]:
        use, needs = ctx.collected.use, ctx.needs_input_grad[1:]
        came = ctx.collected.take()
        if not came:
            return (None,) * (1 + len(needs))
        with without_modes():
            use.begin()
            grads = [use.measure(i, functools.partial(_sum, came, i)) if n else None for i, n in enumerate(needs)]
            return (None, *grads)


def _sum(came: Sequence[Callable[[int], Contribution]], i: int) -> Contribution:
    first, *others = [contribution(i) for contribution in came]
    merged = first.merge(others) if others else first
    assert merged is not None
    return merged


def collect(
    tensors: TensorState, name: str, weights: Sequence[Tensor | None]
) -> tuple[Collected, tuple[Tensor | None, ...]]:
    """Return what collects the contributions to these weights, and the weights as their uses take them."""

    def make() -> tuple[Collected, tuple[Tensor | None, ...], Sequence[Tensor | None]]:
        collected = Collected(tensors.use(name, weights))
        return collected, Collect.apply(collected, *weights), weights

    collected, instead, _ = tensors.once_per_call((name, *map(id, weights)), make)
    return collected, instead
