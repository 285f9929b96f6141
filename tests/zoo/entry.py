"""An entry of the zoo: a published model with a batch of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 3


@dataclass(frozen=True)
class Problem:
    """A model in float64, and its loss.

    Attributes:
        loss: returns the mean over the samples of these numbers, 0 to SAMPLES - 1, which may be repeated.
        options: of `GradientNoise`.
        single: whether the model is measured in float32, because it does not run in float64 as it is; the loop over
            samples takes float64, after `instead` changed the model to a way of the same equations.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Sequence[int]], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    single: bool = False
    instead: Callable[[nn.Module], Any] | None = None


@dataclass(frozen=True)
class Entry:
    """A model of a library; `make` returns its problem."""

    library: str
    name: str
    make: Callable[[], Problem]
    quick: bool = False  #: one of those that the tests take

    def problem(self) -> Problem:
        """Return the problem, always with the same numbers."""
        torch.manual_seed(0)
        problem = self.make()
        model = problem.model.to(torch.float32 if problem.single else torch.float64).eval()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        with torch.no_grad():  # layers that begin as 0 hide mistakes
            for p in model.parameters():
                if p.is_floating_point():
                    p.add_(0.05 * torch.randn(p.shape))
        return problem


class Zoo(list[Entry]):
    """Entries, in the order in which they are measured."""

    def add(self, library: str, name: str, make: Callable[[], Problem], quick: bool = False) -> None:
        """Add a model, where its library is installed."""
        if importlib.util.find_spec(library) is not None:
            self.append(Entry(library, name, make, quick))


def output_of(out: Any) -> Tensor:
    """Return the first tensor with a gradient in what a model returns."""
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "last_hidden_state", "sample", "prediction_logits"):
        if isinstance(getattr(out, name, None), Tensor):
            return getattr(out, name)
    values = out.values() if hasattr(out, "values") else out
    return next(output_of(x) for x in values if x is not None)


def distance(y: Tensor, samples: Sequence[int]) -> Tensor:
    """Return the mean over samples of the squared distance from a wave of the sample's own frequency."""
    y = y.flatten(1)
    target = torch.stack([torch.cos(torch.arange(y.shape[1]) * (0.3 + 0.1 * i)) for i in samples])
    return (y - target.to(y.dtype)).square().mean()


def with_tensors(model: nn.Module, common: dict[str, Any] | None = None, **inputs: Tensor) -> Problem:
    """Return the problem of a model that is called with tensors that begin with the samples."""

    def loss(model: nn.Module, samples: Sequence[int]) -> Tensor:
        at = torch.tensor(samples)
        dtype = next(model.parameters()).dtype
        given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        given = {k: x.index_select(0, at) for k, x in given.items()}
        positional = [given.pop(k) for k in sorted(given) if k.startswith("_")]
        return distance(output_of(model(*positional, **given, **(common or {}))), samples)

    return Problem(model, loss)
