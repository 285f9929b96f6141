"""The optimizer inside the wrappers of frameworks."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

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
    >>> from normkern.integrations import unwrap_optimizer
    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer = optimizer
    >>> sgd = normkern.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    >>> unwrap_optimizer(Wrapper(sgd)) is sgd
    True
    """
    seen: list[Any] = []  # wrappers may be in a cycle; some cannot be hashed
    while not any(optimizer is x for x in seen):
        seen.append(optimizer)
        for name in ATTRIBUTES:
            inner = getattr(optimizer, name, None)
            # A wrapper of a wrapper need not be an Optimizer itself.
            if inner is not None and (isinstance(inner, Optimizer) or hasattr(inner, "param_groups")):
                optimizer = inner
                break
    return optimizer
