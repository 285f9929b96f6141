"""Asks whether torch traces, intercepts or fakes tensors; `force_eager` runs compiled code eagerly."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_excluded, _len_torch_dispatch_stack
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._functorch import peek_interpreter_stack
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling


def is_materialized(x: Tensor) -> bool:
    """Return whether a tensor has values to measure: it is not meta or fake, and no dispatch mode is active."""
    return (
        not x.is_meta
        and not in_dispatch_mode()
        and not isinstance_if_imported(x, "torch._subclasses.fake_tensor", "FakeTensor")
    )


def in_dispatch_mode() -> bool:
    """Return whether a dispatch mode (make_fx, FakeTensorMode) or a torch.func transform intercepts operations."""
    return _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None


def is_traced() -> bool:
    """Return whether torch.compile or a dispatch mode records ops: it cannot see what kernels do to memory."""
    return is_dynamo_compiling() or (
        _len_torch_dispatch_stack() > 0 and not _dispatch_tls_is_dispatch_key_excluded(DispatchKey.Python)
    )


def isinstance_if_imported(x: Any, module: str, name: str) -> bool:
    """Return isinstance without importing the module: until it is imported there are no such objects."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(x, getattr(loaded, name))


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def uncompiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that torch.compile is not to look into. Where nothing is compiled that costs little."""
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if is_dynamo_compiling() or get_eval_frame_callback() is not None:
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


_lock = threading.Lock()
_inside = 0
_stance: Any = None


@contextmanager
def force_eager() -> Iterator[None]:
    """Set torch.compile's stance "force_eager", for the process, until the last thread has left the context.

    Raises:
        RuntimeError: the caller is compiled itself.
    """
    if "torch._dynamo" not in sys.modules:  # without it nothing is compiled
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _stance
    with _lock:
        if _inside == 0:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
        _inside += 1


def _leave() -> None:
    global _inside, _stance
    with _lock:
        _inside -= 1
        if _inside == 0:
            _stance.__exit__(None, None, None)
            _stance = None
