"""Runs a model as if norms had no eps, in float64 throughout, without a change to its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: torch's norms: name -> the position of eps, the same in torch and torch.nn.functional.
_EPS_AT = {
    "batch_norm": 7,
    "group_norm": 4,
    "instance_norm": 7,
    "layer_norm": 4,
    "native_batch_norm": 7,
    "native_group_norm": 7,
    "native_layer_norm": 4,
    "rms_norm": 3,
}
_ADDITIONS = ("__add__", "__radd__", "add", "add_")
#: What is left of eps.
_EPS = {torch.float64: 1e-20, torch.float32: 1e-9}
#: A number up to this that is added to a tensor is an eps.
_LARGEST_EPS = 1e-3
_REAL = (torch.float16, torch.bfloat16, torch.float32)
_CASTS = ("half", "bfloat16", "float", "chalf", "cfloat")


class Exact(TorchFunctionMode):
    r"""Replaces every eps of torch's functions by nearly zero, and raises less precise tensors to `dtype`.

    A norm with eps > 0 breaks scale invariance by about :math:`\epsilon/\sigma^2`, which can't be told from a scale
    that matters a little. The eps that stays keeps 0/0 away, and the gradients of constant channels at rounding: those
    are rounded to about the precision over the root of eps.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = _EPS[dtype]
        # Promotion leaves float64 alone where `dtype` is float32.
        self._raised = {d: torch.promote_types(d, dtype) for d in _REAL}
        self._raised |= {d.to_complex(): r.to_complex() for d, r in self._raised.items() if d != torch.bfloat16}
        self._raised = {d: r for d, r in self._raised.items() if d != r}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _EPS_AT:
            at = _EPS_AT[name]
            if len(args) > at:
                args = (*args[:at], self.eps, *args[at + 1 :])
            else:
                kwargs["eps"] = self.eps
        elif name in _ADDITIONS:
            args = tuple(map(self._without_eps, args))
            kwargs = {key: x if key == "alpha" else self._without_eps(x) for key, x in kwargs.items()}
        if name in _CASTS and isinstance(args[0], Tensor):
            dtype = self._raised.get(getattr(torch, name), getattr(torch, name))
            return args[0].to(dtype, **kwargs)
        out = kwargs.pop("out", None)
        # A method that writes keeps the type of what it writes to.
        writes = out is not None or (name.endswith("_") and not name.endswith("__")) or name == "__set__"
        raises_tensors = not writes and self._are_mixed([*args, *kwargs.values()])
        args = tuple(self._raise(x, raises_tensors) for x in args)
        kwargs = {key: self._raise(x, raises_tensors) for key, x in kwargs.items()}
        return func(*args, **kwargs) if out is None else func(*args, out=out, **kwargs)

    def _without_eps(self, x: Any) -> Any:
        return self.eps if type(x) is float and 0 < x <= _LARGEST_EPS else x

    def _are_mixed(self, given: list[Any]) -> bool:
        low = high = False
        for x in given:
            for y in x if type(x) in (list, tuple) else (x,):
                if isinstance(y, Tensor):
                    low |= y.dtype in self._raised
                    high |= y.dtype in self._raised.values()
        return low and high

    def _raise(self, x: Any, tensors: bool) -> Any:
        if isinstance(x, torch.dtype):
            return self._raised.get(x, x)
        if tensors and isinstance(x, Tensor) and x.dtype in self._raised:
            return x.to(self._raised[x.dtype])
        if tensors and type(x) in (list, tuple):
            return type(x)(self._raise(y, tensors) for y in x)
        return x


def drop_eps(model: nn.Module, eps: float) -> None:
    """Set numbers that modules keep under a name with "eps" to nearly zero, for kernels that are not torch's."""
    for module in model.modules():
        for name, x in vars(module).items():
            if "eps" in name.lower() and type(x) is float and 0 < x <= _LARGEST_EPS:
                setattr(module, name, eps)
