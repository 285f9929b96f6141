"""The binary, and what every op asks it: the only importer."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from ..tracing import is_traced, isinstance_if_imported

try:
    import normkern._C as _C
except ImportError as error:
    raise ImportError(
        f"normkern's binary could not be loaded ({error}). Build it for this interpreter "
        f"(Python {sys.version_info.major}.{sys.version_info.minor}): pip install --force-reinstall --no-deps normkern"
    ) from error

Stats: TypeAlias = Literal["tensor", "row"] | None
#: What kernels read and write.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Columns of the table of sums, in order.
SUMS = ("weight_sq", "grad_sq", "weight_grad_dot", "update_sq", "weight_update_dot")
#: What a pair of gradients adds to them: <g1,g2>, |g1-g2|^2, |g1|^2, |g2|^2.
PAIR_SUMS = ("pair_dot", "pair_difference_sq", "first_sq", "second_sq")
#: Coordinates per chunk: the unit of work and of summation.
CHUNK: int = _C.CHUNK
#: The binary itself, for the other files of this folder, and for those who examine it.
binary = _C
_STATS_CODE = {None: 0, "tensor": 1, "row": 2}

Pass = _C.Pass
Hyper = _C.Hyper
GaugeStep = _C.GaugeStep
LrMultipliers = _C.LrMultipliers
most_decay = _C.most_decay
gather = _C.gather
describe = _C.describe
shared_pair = _C.shared_pair
kernel_takes = _C.kernel_takes
#: The compute capabilities that the binary has kernels for, 80 for 8.0; none: it was built for CPUs only.
cuda_architectures = _C.cuda_architectures
slot_count = _C.slot_count
isa = _C.isa
supported_isas = _C.supported_isas


def torch_op(name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls ``torch.ops.normkern``: what a tracer can keep of an op, whose kernel writes where no tracer looks."""
    op: Any = torch.ops.normkern
    for part in name.split("."):
        op = getattr(op, part)
    return op(*args, **kwargs)


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


def new_table(slots: int, columns: int = len(SUMS), like: Tensor | None = None) -> Tensor:
    """An unwritten table of sums, (slots, columns) float64 on the device of `like`, or the CPU."""
    return torch.empty((slots, columns), dtype=torch.float64, device="cpu" if like is None else like.device)


def new_scratch(step: Pass) -> Tensor | None:
    """Where a `Pass` puts sums that come in parts; None where it needs no such place."""
    return new_table(step.scratch_rows, step.columns, step.like) if step.like is not None else None


def device_index(x: object) -> int | None:
    """The index of the CUDA device whose kernels reach x, -1 for the CPU, None where no kernel takes x."""
    return _C.device_index(x)


def scratch_beside(x: Tensor) -> Callable[[int], Tensor]:
    """Makes unwritten float64 memory on x's device, for what a kernel's blocks leave each other."""
    return lambda size: torch.empty(size, dtype=torch.float64, device=x.device)


#: What decides whether a kernel takes a tensor: `kernel_takes` (None), or `would_take` where tensors have no values.
Takes: TypeAlias = Callable[[Any], bool]


def would_take(x: Any) -> bool:
    """Whether a kernel takes tensors such as x, which may be a stand-in of no values: a FakeTensor, a meta tensor."""
    plain = type(x) in (Tensor, torch.nn.Parameter) or isinstance_if_imported(
        x, "torch._subclasses.fake_tensor", "FakeTensor"
    )
    is_here = plain and (x.device.type in ("cpu", "meta") or (x.device.type == "cuda" and bool(cuda_architectures())))
    return is_here and x.layout == torch.strided and x.dtype in DTYPES


def kernels_take(tensors: Iterable[Any]) -> bool:
    """Whether one call of an op takes them all: plain tensors of real dtypes, on one device. None is no tensor."""
    if is_traced():
        given = [x for x in tensors if x is not None]
        return all(would_take(x) and not x.is_meta and x.device == given[0].device for x in given)
    devices = {device_index(x) for x in tensors if x is not None}
    return None not in devices and len(devices) <= 1


def why_refused(op: str, i: int, lists: dict[str, Any], takes: Takes | None = None) -> str:
    """The sentence for position `i`, which no kernel takes. The first list is the one that the others must match."""
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


def not_taken(op: str, name: str, x: object) -> str:
    """The sentence for what no kernel takes."""
    if peek_interpreter_stack() is not None:
        return f"{op}: {name} is inside a torch.func transform, where no kernel sees it; torch.ops.normkern.{op} may"
    return (
        f"{op}: {name} is {describe(x)}; expected a torch.Tensor of float64, float32, bfloat16 or float16 on "
        f"{where_kernels_run(x)}"
    )


def where_kernels_run(tensor: Any) -> str:
    if cuda_architectures():
        return "cpu or cuda"
    if getattr(getattr(tensor, "device", None), "type", None) != "cuda":
        return "cpu"
    return "cpu: this binary was built without CUDA (NORMKERN_CUDA=ON pip install --no-binary normkern normkern)"
