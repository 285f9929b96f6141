"""What a tensor is besides a tensor: one with values, one that somebody watches, one of a class nobody imported."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_excluded, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_dynamo_compiling


def has_values(x: Tensor) -> bool:
    """Not a meta or fake tensor, and nobody looks on: there is something to measure."""
    return not x.is_meta and not somebody_watches() and not is_a(x, "torch._subclasses.fake_tensor", "FakeTensor")


def somebody_watches() -> bool:
    """A dispatch mode (make_fx, FakeTensorMode) or a torch.func transform wants to see every operation on a tensor."""
    return _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None


def is_traced() -> bool:
    """torch.compile, or a dispatch mode, wants ops as such: it cannot see what their kernels do to memory."""
    return is_dynamo_compiling() or (
        _len_torch_dispatch_stack() > 0 and not _dispatch_tls_is_dispatch_key_excluded(DispatchKey.Python)
    )


def is_a(x: Any, module: str, name: str) -> bool:
    """isinstance, without an import: where nobody imported the module there are no such objects."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(x, getattr(loaded, name))
