"""Checks of arguments that several ops share, and the sentences for what no kernel takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from ..tracing import is_traced, isinstance_if_imported
from ._binary import cuda_architectures, describe, device_index, kernel_takes
from ._load import REINSTALL_WITH_CUDA
from .types import DTYPES, one_of

#: Decides whether a kernel takes a tensor: `kernel_takes` (None), or `would_take` where tensors have no values.
Takes: TypeAlias = Callable[[Any], bool]


def would_take(x: Any) -> bool:
    """Return whether a kernel takes tensors such as x, which may have no values: a FakeTensor, a meta tensor."""
    plain = type(x) in (Tensor, torch.nn.Parameter) or isinstance_if_imported(
        x, "torch._subclasses.fake_tensor", "FakeTensor"
    )
    is_here = plain and (x.device.type in ("cpu", "meta") or (x.device.type == "cuda" and bool(cuda_architectures())))
    return is_here and x.layout == torch.strided and x.dtype in DTYPES


def kernels_take(tensors: Iterable[Any]) -> bool:
    """Return whether one call of an op takes all: plain tensors of real dtypes, on one device. None is no tensor."""
    if is_traced():
        given = [x for x in tensors if x is not None]
        return all(would_take(x) and not x.is_meta and x.device == given[0].device for x in given)
    devices = {device_index(x) for x in tensors if x is not None}
    return None not in devices and len(devices) <= 1


def why_refused(op: str, i: int, lists: dict[str, Any], takes: Takes | None = None) -> str:
    """Return the sentence for position `i`, which no kernel takes. The other lists must match the first."""
    takes = takes or kernel_takes
    named = {name: x[i] for name, x in lists.items() if x is not None and x[i] is not None}
    for name, tensor in named.items():
        if not takes(tensor):
            return not_taken(op, f"{name}[{i}]", tensor)
    (first, model), *others = named.items()
    for name, tensor in others:
        if tensor.dtype != model.dtype or tensor.device != model.device:
            what = "dtype" if tensor.dtype != model.dtype else "device"
            return f"{op}: {name}[{i}] is {describe(tensor)} but {first}[{i}] is {describe(model)}; expected one {what}"
    return f"{op}: {first}[{i}] is {describe(model)} but others, or numbers of the call, are not; expected one device"


def not_taken(op: str, name: str, x: object, dtypes: Sequence[torch.dtype] = DTYPES) -> str:
    """Return the sentence for a tensor that no kernel takes."""
    if lacks_storage(x):
        return _no_storage(f"{op}: {name}", x)
    if peek_interpreter_stack() is not None:
        return f"{op}: {name} is inside a torch.func transform, where no kernel sees it; torch.ops.normkern.{op} may"
    return f"{op}: {name} is {describe(x)}; expected a torch.Tensor of {one_of(dtypes)} on {_where_kernels_run(x)}"


def lacks_storage(x: Any) -> bool:
    """Return whether a tensor's memory was freed, or is shorter than the tensor: torch would read past its end."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided or x.is_meta:
        return False
    if peek_interpreter_stack() is not None or is_traced():
        return False
    try:
        there = x.untyped_storage().nbytes()
        last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    except (RuntimeError, NotImplementedError):  # a tensor of a mode, without memory of its own
        return False
    return x.numel() > 0 and there < (last + 1) * x.element_size()


def _no_storage(where: str, x: Any) -> str:
    there = x.untyped_storage().nbytes()
    return (
        f"{where} has shape {tuple(x.shape)}, but its memory {'was freed' if there == 0 else f'is {there} bytes long'} "
        "(untyped_storage().resize_); expected a tensor with its values"
    )


def check_storage(x: Any, where: str) -> None:
    """Check that a tensor that falls back to torch has memory: torch does not, and crashes.

    Raises:
        RuntimeError: it was freed.
    """
    if lacks_storage(x):
        raise RuntimeError(_no_storage(where, x))


def _where_kernels_run(tensor: Any) -> str:
    if cuda_architectures():
        return "cpu or cuda"
    if getattr(getattr(tensor, "device", None), "type", None) != "cuda":
        return "cpu"
    return f"cpu: this binary was built without CUDA ({REINSTALL_WITH_CUDA} builds it with CUDA)"


def check_l(l: object, where: str) -> float:
    """Return SVAG's l as a float.

    Raises:
        ValueError: it is no number of at least 1/2.
    """
    if isinstance(l, bool) or not isinstance(l, (int, float)) or not 0.5 <= l <= sys.float_info.max:
        raise ValueError(f"{where}: l expected a number of at least 1/2, got {l!r}")
    return float(l)


def as_float(op: str, name: str, x: Any) -> float:
    """Return a number, or a tensor of one, as a float.

    Raises:
        ValueError: it is something else.
    """
    try:
        return float(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{op}: {name} expected one number, got {x!r}") from None


def inverses(op: str, grad_scale: Any, held_scale: Any) -> tuple[float, float]:
    """Return the factors of first and second gradients; there are no second ones without `held_scale`.

    Raises:
        ValueError: a scale is 0 or no number.
    """

    def inverse(name: str, scale: Any) -> float:
        try:
            return 1 / float(scale)
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):
            raise ValueError(f"{op}: {name} expected a number that is not 0, got {scale!r}") from None

    of_grads = inverse("grad_scale", grad_scale)
    return (of_grads, 1.0) if held_scale is None else (inverse("held_scale", held_scale), of_grads)


def check_pairs(op: str, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
    """Check that every entry has a partner of its shape and dtype.

    Raises:
        ValueError: lengths or shapes differ.
        TypeError: dtypes differ, an entry is no tensor, or its partner alone is None.
    """
    if len(a) != len(b):
        raise ValueError(f"{op}: grads_b has {len(b)} entries but grads_a has {len(a)}")
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        for name, entry in (("grads_a", x), ("grads_b", y)):
            if entry is not None and not isinstance(entry, Tensor):
                raise TypeError(f"{op}: {name}[{i}] is {describe(entry)}; expected a torch.Tensor or None")
        if (x is None) != (y is None):
            name = "grads_a" if x is None else "grads_b"
            raise TypeError(f"{op}: {name}[{i}] is None but its partner is not; expected both or neither")
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape != y.shape:
                raise ValueError(f"{op}: grads_b[{i}] has shape {tuple(y.shape)} but grads_a[{i}] has {tuple(x.shape)}")
            if x.dtype != y.dtype:
                raise TypeError(
                    f"{op}: grads_b[{i}] is {describe(y)} but grads_a[{i}] is {describe(x)}; expected one dtype"
                )
