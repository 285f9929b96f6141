"""`register`: rules of the user's own for operations, autograd functions and modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from .layers.registry import Handler, handles
from .operation import tensors_in


def register(*operations: str | Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Register a rule that measures operations of your own; use it as a decorator.

    `GradientNoise` calls ``rule(tensors, op)`` in place of the operation, where it joins parameters with samples. The
    rule returns what the operation returns, computed from operations that are covered, inside ``tensors.run``; or
    NotImplemented for arguments that it does not know. A module without a rule for its arguments runs as it is. That
    the contributions add up to ``.grad`` is checked as for every layer. Outside of a context nothing changes.

    Args:
        operations: names of functions of torch or of custom ops ("my_library::my_op"), the functions themselves,
            subclasses of `torch.autograd.Function` (``op.args`` are those of ``apply``), or classes of modules
            (``op.args`` are the module and those of ``forward``); not their subclasses that define them anew.

    Raises:
        TypeError: no operation, something that is none, or a rule that does not take (tensors, op).
        ValueError: an operation that has a rule.

    >>> import torch, normkern
    >>> class Scaled(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.ones(3))
    ...     def forward(self, x):
    ...         return x * self.weight
    >>> @normkern.noise.register(Scaled)
    ... def scaled(tensors, op):
    ...     module, x = op.args
    ...     return tensors.run(lambda: torch.mul(x, module.weight))
    """
    classes = [op for op in operations if isinstance(op, type) and issubclass(op, (torch.autograd.Function, nn.Module))]
    found = handles(*(_name(op) if op in classes else op for op in operations))

    def decorate(rule: Handler) -> Handler:
        rule = found(rule)
        for cls in classes:
            if issubclass(cls, nn.Module):
                cls.forward = _visible(cls.forward, _name(cls))
            else:
                apply = cls.apply
                cls.apply = staticmethod(_visible(apply, _name(cls)))  # type: ignore[method-assign]
        return rule

    return decorate


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _visible(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the function as one that a mode of torch sees."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(tensors_in((*args, *kwargs.values())))
        if has_torch_function(tensors):
            return handle_torch_function(call, tensors, *args, **kwargs)
        return original(*args, **kwargs)

    call.__name__ = name
    call.original = original  # type: ignore[attr-defined]
    return call
