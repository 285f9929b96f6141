"""Loads the binary and connects it to torch. Only this file imports it."""

from __future__ import annotations

import os

import torch

from ._load import provide_binary, why_missing
from ._torch_library import torch_shim, torch_symbol

provide_binary()
try:
    import normkern._C as _C
except ImportError as error:
    raise ImportError(why_missing(error)) from error

#: The binary, for the other files of this folder and for tools that examine it.
binary = _C

#: Coordinates per chunk: the unit of work and of summation.
CHUNK: int = _C.CHUNK
Pass = _C.Pass
Hyper = _C.Hyper
GaugeStep = _C.GaugeStep
LrMultipliers = _C.LrMultipliers
most_decay = _C.most_decay
gather = _C.gather
describe = _C.describe
shared_pair = _C.shared_pair
kernel_takes = _C.kernel_takes
#: The index of the CUDA device whose kernels reach a tensor, -1 for the CPU, None where no kernel takes it.
device_index = _C.device_index
#: The compute capabilities that the binary has kernels for, 80 for 8.0; none: it was built for CPUs only.
cuda_architectures = _C.cuda_architectures
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


_C.connect(
    torch.Tensor.__dlpack_c_exchange_api__,
    torch_symbol("torch_parallel_for"),
    torch.Tensor,
    torch.nn.Parameter,
    *torch_shim(),
)
if "NORMKERN_ISA" in os.environ:
    try:
        select_isa(os.environ["NORMKERN_ISA"])
    except ValueError as error:
        raise ImportError(f"NORMKERN_ISA: {error}") from None
