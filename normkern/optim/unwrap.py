"""`unwrap_optimizer`: the optimizer inside the wrappers of frameworks."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from .adam import Adam
from .sgd import SGD

#: Where wrappers keep the optimizer that they wrap.
ATTRIBUTES = (
    "_optimizer",  # LightningOptimizer
    "optimizer",  # accelerate, Fabric, DeepSpeed, pytorch_optimizer
    "original_optimizer",  # Opacus
    "optim",  # ZeroRedundancyOptimizer, PostLocalSGDOptimizer
    "_base_optimizer",  # timm's Lookahead
    "base_optimizer",  # implementations of SAM
)


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the innermost optimizer: what steps the parameters behind wrappers that look like optimizers.

    >>> import torch, normkern
    >>> from normkern.optim.unwrap import unwrap_optimizer
    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer = optimizer
    >>> sgd = normkern.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    >>> unwrap_optimizer(Wrapper(sgd)) is sgd
    True
    """
    return _layers(optimizer)[-1][1]


def expect_sgd(optimizer: Any, who: str) -> SGD:
    """Return the `normkern.SGD` inside of what a framework hands out.

    Raises:
        TypeError: there is none.
    """
    found: SGD = _expect(optimizer, who, (SGD,), "a normkern.SGD or SVAG")
    return found


def expect_fused(optimizer: Any, who: str) -> SGD | Adam:
    """Return the `normkern.SGD`, `Adam` or `AdamW` inside of what a framework hands out.

    Raises:
        TypeError: there is none.
    """
    found: SGD | Adam = _expect(optimizer, who, (SGD, Adam), "a normkern.SGD, AdamW or SVAG")
    return found


def _expect(optimizer: Any, who: str, kinds: tuple[type, ...], words: str) -> Any:
    layers = _layers(optimizer)
    innermost = layers[-1][1]
    if isinstance(innermost, kinds):
        return innermost
    path = "".join(f".{name}" for name, _ in layers[1:])
    kind = type(innermost)
    module = "torch.optim" if kind.__module__.startswith("torch.optim.") else kind.__module__
    got = f"{module}.{kind.__name__}" if path or module == "torch.optim" else kind.__name__
    inside = f" as {type(optimizer).__name__}{path}" if path else ""
    cure = next((f"; pass its .{name}" for name, x in _attributes(innermost) if isinstance(x, kinds)), "")
    raise TypeError(
        f'{who}: optimizer expected {words}, constructed with stats="tensor" or "row", got {got}{inside}{cure}'
    )


def _attributes(x: Any) -> list[tuple[str, Any]]:
    """Return the attributes of an object, such as a wrapper that keeps its optimizer under a name of its own."""
    return list(getattr(x, "__dict__", {}).items())


def _is_or_wraps_optimizer(x: Any) -> bool:
    """Return whether x is an optimizer, or looks like a wrapper of one, which need not be an optimizer itself."""
    return isinstance(x, Optimizer) or hasattr(x, "param_groups") or any(hasattr(x, name) for name in ATTRIBUTES)


def _layers(optimizer: Any) -> list[tuple[str, Any]]:
    """Return the optimizer and what is inside of it, each with the attribute of the one before that holds it."""
    layers: list[tuple[str, Any]] = [("", optimizer)]
    while True:
        outer = layers[-1][1]
        for name in ATTRIBUTES:
            inner = getattr(outer, name, None)
            if inner is not None and _is_or_wraps_optimizer(inner):
                break
        else:
            return layers
        if any(inner is x for _, x in layers):  # wrappers may be in a cycle; some cannot be hashed
            return layers
        layers.append((name, inner))
