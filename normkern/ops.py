"""Typed, documented functions, one per bound op. The only importer of the binary."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

try:
    import normkern._C as _C
except ImportError as error:
    raise ImportError(
        f"normkern's binary could not be loaded ({error}). Build it for this interpreter "
        f"(Python {sys.version_info.major}.{sys.version_info.minor}): pip install --force-reinstall --no-deps normkern"
    ) from error

Stats: TypeAlias = Literal["tensor", "row"] | None

#: Columns of the table of sums, in order.
SUMS = ("weight_sq", "grad_sq", "weight_grad_dot", "update_sq", "weight_update_dot")
#: Coordinates per chunk: the unit of work and of summation.
CHUNK: int = _C.CHUNK
#: The binary itself, for those who examine it.
binary = _C
_STATS_CODE = {None: 0, "tensor": 1, "row": 2}

SgdStep = _C.SgdStep
gather = _C.gather
describe = _C.describe
kernel_takes = _C.kernel_takes
slot_count = _C.slot_count
isa = _C.isa
supported_isas = _C.supported_isas


def select_isa(name: str) -> None:
    """Run the CPU loops of one instruction-set level from now on: one of `supported_isas()`.

    The environment variable ``NORMKERN_ISA`` does the same at import.

    Raises:
        ValueError: this binary does not have the level, or this machine cannot run it.
    """
    if not _C.select_isa(name):
        raise ValueError(f"select_isa: expected one of {', '.join(supported_isas())} on this machine, got {name!r}")


def torch_symbol(name: str) -> int:
    """The address of one of torch's C functions, from the library that torch itself has loaded."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    file = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    library = ctypes.CDLL(os.path.join(folder, file))
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address


_C.connect(
    torch.Tensor.__dlpack_c_exchange_api__,
    torch_symbol("torch_parallel_for"),
    torch.Tensor,
    torch.nn.Parameter,
)
if "NORMKERN_ISA" in os.environ:
    try:
        select_isa(os.environ["NORMKERN_ISA"])
    except ValueError as error:
        raise ImportError(f"NORMKERN_ISA: {error}") from None


def stats_code(stats: Stats, where: str) -> int:
    """How the binary spells a choice of statistics."""
    try:
        return _STATS_CODE[stats]
    except (KeyError, TypeError):
        raise ValueError(f'{where}: stats expected None, "tensor" or "row", got {stats!r}') from None


def new_table(slots: int) -> Tensor:
    """An unwritten table of sums, (slots, 5) float64 on the CPU."""
    return torch.empty((slots, len(SUMS)), dtype=torch.float64, device="cpu")


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None] | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    stats: Stats = None,
) -> Tensor | None:
    r"""One step of SGD on a list of tensors, in one pass over memory.

    .. math::
        d = \pm g/\mathrm{grad\_scale} + \lambda w, \quad v' = \mu v + (1-\tau) d, \quad w' = w - \eta v'

    with :math:`v' = d` where there is no buffer yet, and :math:`w' = w - \eta (d + \mu v')` for nesterov. Arithmetic in
    float32 (float64 for float64 tensors), one rounding at the store.

    Args:
        params: CPU tensors of float64, float32, bfloat16 or float16, any shapes and strides; updated in place.
        grads: same shapes, dtypes and devices; None skips the parameter. Read only.
        momentum_buffers: one per parameter, updated in place; None entries are created and put into the list.
            Needed if `momentum` is not 0.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
        grad_scale: what the gradients were multiplied with.
        stats: "tensor" sums over each parameter, "row" over each index of its first dimension (ndim >= 2).

    Returns:
        None, or with `stats` a float64 tensor (slots, 5) on the CPU: `SUMS` of every slot, parameter after parameter;
        NaN for a skipped one. Nothing is synchronised.

    Raises:
        TypeError: an entry is not a plain CPU tensor of these dtypes, or dtypes differ.
        ValueError: lengths or shapes differ, a tensor overlaps itself or part of another in memory. Nothing is written.

    Reference: the update of `torch.optim.SGD`; sums as in Li and Arora, arXiv 1910.07454, section 2.

    >>> w, g = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    >>> sgd_([w], [g], lr=0.1, weight_decay=0.5, stats="tensor")
    tensor([[25.0000,  5.0000, 11.0000,  0.2225, -2.3500]], dtype=torch.float64)
    >>> w
    tensor([2.7500, 3.6000])
    """
    params, grads = list(params), list(grads)
    buffers: list[Tensor | None] | None = None
    first: list[int] = []
    if momentum != 0 and momentum_buffers is not None:
        buffers = list(momentum_buffers)
        for i, (p, g, v) in enumerate(zip(params, grads, buffers, strict=False)):
            if v is None and g is not None and isinstance(p, Tensor):
                buffers[i] = torch.empty_like(p, requires_grad=False)
                first.append(i)
    step = SgdStep()
    step.begin()
    code = stats_code(stats, "sgd_")
    refused = step.add(
        params, grads, buffers, first, lr, momentum, dampening, weight_decay, nesterov, maximize, 1 / grad_scale, code,
        -1, None,
    )  # fmt: skip
    if refused:
        raise TypeError(_why_refused(refused[0], params, grads, buffers))
    written = step.check(None)
    table = new_table(step.slots) if stats else None
    step.run(table)
    torch.autograd.graph.increment_version(written)
    if momentum_buffers is not None and buffers is not None:
        for i in first:
            momentum_buffers[i] = buffers[i]
    return table


def _why_refused(i: int, params: list[Tensor], grads: list[Tensor | None], buffers: list[Tensor | None] | None) -> str:
    named = {"params": params[i], "grads": grads[i]}
    if buffers is not None:
        named["momentum_buffers"] = buffers[i]
    for name, tensor in named.items():
        if not kernel_takes(tensor):
            return (
                f"sgd_: {name}[{i}] is {describe(tensor)}; "
                "expected a torch.Tensor of float64, float32, bfloat16 or float16 on cpu"
            )
    name, tensor = next((n, t) for n, t in named.items() if t is not None and t.dtype != params[i].dtype)
    return f"sgd_: {name}[{i}] is {describe(tensor)} but params[{i}] is {describe(params[i])}; expected one dtype"
