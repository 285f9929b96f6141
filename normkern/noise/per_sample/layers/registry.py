"""The functions that measure operations of torch: `@handles` registers one, `find` returns it.

A handler runs in place of an operation that joins parameters with samples. It gets the `TensorState` of the context and
the `Operation`, and returns what the operation returns, or NotImplemented where it does not know these arguments; then
the parameters are uncovered. A handler either expresses the operation by others that have handlers,

    @handles("my_library::scaled_linear")
    def scaled_linear(tensors: TensorState, op: Operation) -> Any:
        x, weight, scale = op.bind("x weight scale")
        return tensors.run(lambda: F.linear(x, weight) * scale)

or computes it by a `LayerKind` (see `base`), whose backward hands every sample's contributions to the accumulator:

    @handles("my_library::scaled_linear")
    def scaled_linear(tensors: TensorState, op: Operation) -> Any:
        x, weight, scale = op.bind("x weight scale")
        layout = tensors.layout(x)
        if layout is None:  # weight is multiplied with something else than samples
            return NotImplemented
        use = tensors.use("scaled_linear", [weight])
        out = apply(use, ScaledLinear(use.batch, layout.block, scale, weight.shape), x, weight)
        tensors.mark(out, SampleLayout(layout.block // x.shape[-1] * out.shape[-1], layout.certain))
        return out

What a handler may use of `tensors`: `state`, `layout` and `mark` (where samples are), `derived`, `roots` and `target`
(which parameters a tensor was made of), `use` (announces contributions), `once_per_call` (what all uses in one call of
the model share), `run` (other operations), `rules` (where the samples are after an operation), and `accumulator`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import errors
from ..operation import Operation, name_of
from ..tensor_state import TensorState

Handler = Callable[[TensorState, Operation], Any]
#: Refuses an operation, with or without parameters, by an exception.
Check = Callable[[TensorState, Operation], None]


@dataclass(frozen=True, slots=True)
class Registration:
    """A handler, and when it is called."""

    handler: Handler
    needs_batch: bool = False
    without_samples: Callable[[TensorState, Operation], bool] | None = None
    takes_numbered: bool = False
    takes_complex: bool = False


#: The handler of each operation, by its name.
HANDLERS: dict[str, Registration] = {}
#: The check of each operation that has one, by its name.
CHECKS: dict[str, Check] = {}


def handles(
    *operations: str | Callable[..., Any],
    needs_batch: bool = False,
    without_samples: Callable[[TensorState, Operation], bool] | None = None,
    takes_numbered: bool = False,
    takes_complex: bool = False,
) -> Callable[[Handler], Handler]:
    """Register a handler for operations.

    Args:
        operations: names of functions or methods of torch ("linear", "__matmul__"), of custom ops
            ("my_library::my_op"), or the functions themselves. An in-place operation has the name of the other one.
        needs_batch: whether the operation always has samples, so that its use is an error where the batch size is not
            known yet.
        without_samples: returns whether the handler is called although no operand has samples: it makes them.
        takes_numbered: whether the handler knows operands whose samples lie in any order (`numbered`).
        takes_complex: whether the handler knows complex operands; otherwise their parameters are uncovered.

    Raises:
        TypeError: no operation, something that is none, or a handler that does not take (tensors, op).
        ValueError: an operation that has a handler.
    """
    names = [_name(op) for op in operations]
    if not names:
        raise errors.no_operation()

    def register(handler: Handler) -> Handler:
        if not callable(handler):
            raise errors.wrong_signature(repr(handler))
        try:
            inspect.signature(handler).bind(None, None)
        except TypeError:
            raise errors.wrong_signature(_described(handler)) from None
        for name in names:
            if name in HANDLERS:
                raise errors.already_handled(name, _described(HANDLERS[name].handler))
        for name in names:
            HANDLERS[name] = Registration(handler, needs_batch, without_samples, takes_numbered, takes_complex)
        return handler

    return register


def refuses(operation: str) -> Callable[[Check], Check]:
    """Register a check that raises an exception where an operation couples the samples, also without parameters."""

    def register(check: Check) -> Check:
        CHECKS[operation] = check
        return check

    return register


def find(name: str) -> Registration | None:
    """Return the registration of an operation; None: it has none."""
    return HANDLERS.get(name)


def _name(operation: object) -> str:
    name = operation if isinstance(operation, str) else name_of(operation) if callable(operation) else ""
    if not name:
        raise errors.not_an_operation(operation)
    return name


def _described(handler: Handler) -> str:
    return f"{handler.__module__}.{getattr(handler, '__qualname__', repr(handler))}"
