"""One operation of torch as the tracer sees it: its name, its arguments, and which operands have samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from .numbered import Numbered
from .sample_layout import SampleLayout

Samples = list[tuple[Tensor, SampleLayout]]


@dataclass(slots=True)
class Operation:
    """A call of a function of torch, before it runs.

    Attributes:
        name: of the function or method, as `name_of` returns it: the same for ``torch.add`` and ``Tensor.add_``,
            ``"namespace::name"`` for a custom op.
        func: what was called.
        args, kwargs: its arguments.
        samples: the operands that have samples, with their layouts.
        parameters: the operands that are trainable parameters or were made of parameters alone.
        numbered: the operands whose samples lie in any order along one dimension.
        why: what keeps a handler from measuring these arguments; it is put into the sentence of the refusal.
    """

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    samples: Samples
    parameters: list[Tensor] = field(default_factory=list)
    numbered: list[tuple[Tensor, Numbered]] = field(default_factory=list)
    why: str | None = None

    def bind(self, names: str, **defaults: Any) -> list[Any]:
        """Return the arguments in the order of these names, separated by spaces; None where there is no default."""
        order = names.split()
        if len(self.args) == len(order):
            return list(self.args)
        of = {**defaults, **dict(zip(order, self.args, strict=False)), **self.kwargs}
        return [of.get(name) for name in order]

    def argument(self, at: int, name: str, default: Any = None) -> Any:
        """Return one argument, by its position or its name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def written(self) -> Tensor | None:
        """Return the tensor that the operation writes into; None: it works out of place."""
        target = self.kwargs.get("out")
        if is_in_place(self.func) or self.kwargs.get("inplace"):
            target = self.argument(0, "input", self.kwargs.get("tensor"))  # `nn.init` names what it fills "tensor"
        return target if isinstance(target, Tensor) else None

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors among the arguments."""
        return tensors_in((*self.args, *self.kwargs.values()))

    def of(self, samples: Samples) -> Operation:
        """Return the same operation with these operands as those that have samples."""
        return replace(self, samples=samples)

    def run_with(self, instead: Callable[[Tensor], Any]) -> Any:
        """Call the function with each tensor replaced."""
        return self.func(
            *(map_tensors(a, instead) for a in self.args),
            **{k: map_tensors(v, instead) for k, v in self.kwargs.items()},
        )


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return an argument with each tensor in it, also in lists and tuples, replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(map_tensors(v, change) for v in value)
    return value


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results, also those in lists and tuples of one level."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            for y in x:
                if isinstance(y, Tensor):
                    yield y


_TENSOR_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "data", "real"))
_NOT_IN_PLACE = frozenset("__iter__ __index__ __int__ __invert__ requires_grad_ set_".split())
_names: dict[Any, str] = {}


def name_of(func: Any) -> str:
    """Return the name of a function, method or attribute of torch; an in-place operation has that of the other one.

    An operation that is not torch's own (`torch.library`) is "namespace::name".
    """
    name = _names.get(func)
    if name is None:
        name = _names[func] = _name_of(func)
    return name


def is_in_place(func: Any) -> bool:
    """Return whether a function of torch writes into its first argument."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_") and name not in _NOT_IN_PLACE


def _name_of(func: Any) -> str:
    packet = func.overloadpacket if isinstance(func, OpOverload) else func
    if isinstance(packet, OpOverloadPacket) and not packet._qualified_op_name.startswith("aten::"):
        return packet._qualified_op_name
    name = getattr(func, "__name__", "")
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if attribute in _TENSOR_ATTRIBUTES else "size"
    if name in _NOT_IN_PLACE:
        return name
    if name.startswith("__i") and name.endswith("__"):
        return "__" + name[3:]
    if name.endswith("_") and not name.endswith("__"):
        return name[:-1]
    return name
