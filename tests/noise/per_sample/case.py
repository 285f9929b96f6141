"""A net with a batch and a loss, of which it is known how a sample alone has its part in the loss."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """
    inputs, keywords: what the model is called with; every tensor has the samples along `batch_dim`.
    common: more keywords, which have no samples: positions, masks.
    target: for the loss, samples first.
    loss: (outputs, target) -> what backward() is called on.
    weights: target -> w_b with loss(batch) = sum_b w_b loss(sample b); None: all 1/B.
    batch_size: what GradientNoise must be told, because the model's first tensor does not show it.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    target: Any
    loss: Loss
    keywords: dict[str, Tensor] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[Any], Tensor] | None = None
    batch_dim: int = 0
    batch_size: int | None = None

    @property
    def samples(self) -> int:
        return (*self.inputs, *self.keywords.values())[0].shape[self.batch_dim]

    def value(self) -> Tensor:
        """The loss that a user has."""
        return self.loss(self.model(*self.inputs, **self.keywords, **self.common), self.target)

    def terms(self) -> Iterator[Tensor]:
        """w_b l_b of one sample after the other, each from a forward of its own that sees no other sample."""
        weights = (
            torch.full((self.samples,), 1 / self.samples, dtype=torch.float64)
            if self.weights is None
            else self.weights(self.target)
        )
        for b in range(self.samples):
            yield self.sample(b, b + 1).value() * float(weights[b])

    def sample(self, start: int, stop: int) -> Problem:
        """The problem of these samples alone, with the same model."""

        def cut(x: Any, dim: int) -> Any:
            if isinstance(x, tuple):
                return tuple(cut(y, dim) for y in x)
            return None if x is None else x.narrow(dim, start, stop - start)

        return replace(
            self,
            inputs=cut(self.inputs, self.batch_dim),
            keywords={name: cut(x, self.batch_dim) for name, x in self.keywords.items()},
            target=cut(self.target, 0),
            batch_size=None if self.batch_size is None else stop - start,
        )

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy in another dtype; whole numbers and masks stay what they are."""

        def cast(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(cast(y) for y in x)
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return replace(
            self,
            model=copy.deepcopy(self.model).to(dtype),
            inputs=cast(self.inputs),
            keywords={name: cast(x) for name, x in self.keywords.items()},
            common={name: cast(x) for name, x in self.common.items()},
            target=cast(self.target),
        )


@dataclass(frozen=True)
class Case:
    """A problem with a name.

    answer: "exact", its statistics; "exact or refused", either is right; "refused", nothing else is.
    weaker: float32's budget, in units of the usual one, for nets that amplify rounding.
    """

    name: str
    make: Callable[[], Problem]
    answer: str = "exact"
    weaker: float = 1.0

    @property
    def exercises(self) -> str:
        return (self.make.__doc__ or "").strip()

    def problem(self) -> Problem:
        """Always the same numbers, in float32."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            problem = self.make()
            with torch.no_grad():  # layers that begin as 0, 1 or the same for all channels hide mistakes
                for p in problem.model.parameters():
                    p.add_(0.1 * torch.randn(p.shape))
        return problem


class Cases(dict[str, Case]):
    """Name -> case. `@cases()` above a function that makes a problem: its name is the case's, its docstring says why."""

    def __call__(self, answer: str = "exact", weaker: float = 1.0) -> Callable[[Callable[[], Problem]], Any]:
        def add(make: Callable[[], Problem]) -> Callable[[], Problem]:
            name = make.__name__.strip("_")
            if name in self:
                raise ValueError(f"two cases are called {name}")
            self[name] = Case(name, make, answer, weaker)
            return make

        return add


# --- losses -----------------------------------------------------------------------------------------------------------


def squares(out: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of the squared distance of all outputs from the sample's one number."""
    return (out.flatten(1) - target).square().sum(1).mean()


def squares_sum(out: Tensor, target: Tensor) -> Tensor:
    return (out.flatten(1) - target).square().sum()


def cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    """Mean over samples, or over tokens of samples of equal length."""
    return F.cross_entropy(out.flatten(0, -2), target.flatten())


def two_heads(out: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(out[0], target[0]) + 0.5 * squares(out[1], target[1])


def ones(target: Any) -> Tensor:
    """The weights of a sum."""
    return torch.ones(len(target), dtype=torch.float64)


def share_of_tokens(target: Tensor) -> Tensor:
    """The weights of a mean over all tokens that count."""
    count = (target != -100).sum(1).double()
    return count / count.sum()


# --- makers of problems -----------------------------------------------------------------------------------------------


def numbers(model: nn.Module, *shape: int, **more: Any) -> Problem:
    """Normal inputs, samples first; the mean of squares."""
    return Problem(model, (torch.randn(shape),), torch.randn(shape[0], 1), **{"loss": squares, **more})


def classes(model: nn.Module, *shape: int, count: int = 4, **more: Any) -> Problem:
    """Normal inputs, a class for each sample."""
    return Problem(model, (torch.randn(shape),), torch.randint(count, shape[:1]), cross_entropy, **more)


def words(model: nn.Module, *shape: int, count: int = 7, **more: Any) -> Problem:
    """Word ids with repeats, and a number for each sample."""
    return Problem(model, (torch.randint(count, shape),), torch.randn(shape[0], 1), **{"loss": squares, **more})


def text(model: nn.Module, *shape: int, count: int = 7, **more: Any) -> Problem:
    """Word ids, and the next one as the target of each."""
    ids = torch.randint(count, shape)
    return Problem(model, (ids,), ids.roll(-1, -1), **{"loss": cross_entropy, **more})
