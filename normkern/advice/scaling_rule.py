"""Which scaling rule holds for an optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..optim.unwrap import unwrap_optimizer
from .answer import Answer

QUESTION = "scaling rule"
_LINEAR = "linear: batch x k, lr x k; weight decay and momentum stay"
_ROOT = "square root: batch x k, lr x sqrt(k), 1 - beta x k, eps / sqrt(k)"
#: Names that stand for an optimizer -> (its class, its rule).
_NAMES = {
    "sgd": (torch.optim.SGD, "linear"),
    "svag": (torch.optim.SGD, "linear"),
    "adamw": (torch.optim.AdamW, "square root"),
    "adam": (torch.optim.Adam, "square root"),
    "rmsprop": (torch.optim.RMSprop, "square root"),
}


class Optimizer(NamedTuple):
    """What the advisor knows about an optimizer.

    Attributes:
        name: of its class, or as given; None if no optimizer was given.
        rule: "linear" (SGD), "square root" (Adam, AdamW, RMSprop), or None: unknown.
        decoupled: whether it is AdamW, whose weight decay scales with lr.
        momentum: the largest of the param groups; 0 where unknown.
        largest_k: where the first beta becomes 0 under the square root rule, 1 / (1 - beta); None without betas.
    """

    name: str | None
    rule: str | None
    decoupled: bool = False
    momentum: float = 0.0
    largest_k: float | None = None


def read(optimizer: Any) -> Optimizer:
    """Return what is known about an optimizer, a wrapper of one, or a name.

    Raises:
        TypeError: it is none of these. ValueError: an unknown name.
    """
    if optimizer is None:
        return Optimizer(None, None)
    if isinstance(optimizer, str):
        if optimizer.lower() not in _NAMES:
            raise ValueError(
                f"advise: optimizer expected an optimizer or one of {', '.join(map(repr, _NAMES))}, got {optimizer!r}"
            )
        return Optimizer(optimizer, _NAMES[optimizer.lower()][1], decoupled=optimizer.lower() == "adamw")
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"advise: optimizer expected an optimizer, a name or None, got {type(optimizer).__name__}")
    rule = next((rule for kind, rule in _NAMES.values() if isinstance(inner, kind)), None)
    groups = inner.param_groups
    betas = [float(beta) for g in groups for beta in (*g.get("betas", ()), *([g["alpha"]] if "alpha" in g else []))]
    return Optimizer(
        type(inner).__name__,
        rule,
        isinstance(inner, torch.optim.AdamW),
        max(float(g.get("momentum", 0.0)) for g in groups),
        1 / (1 - min(betas)) if betas and rule == "square root" else None,
    )


def answer(optimizer: Optimizer) -> Answer:
    """Return which rule to scale lr by, in words."""
    if optimizer.name is None:
        return Answer(QUESTION, "not asked: no optimizer was given", False, note="pass optimizer=")
    if optimizer.rule is None:
        return Answer(QUESTION, f"unknown for {optimizer.name}", False, note="no theory of its scaling is built in")
    if optimizer.rule == "linear":
        return Answer(QUESTION, _LINEAR, True, note="normkern.theory.linear_scaling")
    decay = "; weight decay x sqrt(k)" if optimizer.decoupled else "; weight decay stays"
    limit = "" if optimizer.largest_k is None else f"; k <= {optimizer.largest_k:.3g}, where a beta becomes 0"
    note = f"normkern.theory.square_root_scaling; holds where noise dominates{limit}"
    return Answer(QUESTION, _ROOT + decay, True, note=note)
