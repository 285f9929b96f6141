"""Finds functions of torch's library, for the binary, which does not link it."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

import torch

#: Of torch's C shim, each with "aoti_torch_" before its name: what the binary asks of a tensor that it has seen before.
_SHIM = (
    "layout_strided", "get_layout", "get_dim", "get_sizes", "get_strides", "get_dtype", "get_device_type",
    "get_data_ptr",
)  # fmt: skip
#: bool at::native::is_neg(const at::Tensor&)
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"


def torch_symbol(name: str) -> int:
    """Return the address of one of torch's functions, from the library that torch itself has loaded.

    Raises:
        AttributeError: there is none of that name.
    """
    address = ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value
    assert address is not None
    return address


@functools.cache
def _library() -> ctypes.CDLL:
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    file = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    return ctypes.CDLL(os.path.join(folder, file))


def torch_shim() -> tuple[dict[str, int], int]:
    """Return functions that read an `at::Tensor`, and where in a Python tensor it is; without them, an empty dict."""
    offset = tensor_offset()
    if offset is None:
        return {}, 0
    try:
        functions = {name: torch_symbol(f"aoti_torch_{name}") for name in _SHIM}
        functions["is_neg"] = torch_symbol(_IS_NEG)
    except AttributeError:
        return {}, 0
    return functions, offset


def tensor_offset() -> int | None:
    """Return where in the object of a tensor its `at::Tensor` is, in bytes, or None where none is found.

    An `at::Tensor` is a pointer to its implementation, which torch tells as `_cdata`.
    """
    plain = torch.empty(2, device="cpu")
    probes = [plain, torch.nn.Parameter(plain), torch._neg_view(plain), plain[:1].expand(3, 3)]
    for offset in range(object.__basicsize__, torch.Tensor.__basicsize__, ctypes.sizeof(ctypes.c_void_p)):
        if all(ctypes.c_void_p.from_address(id(t) + offset).value == t._cdata for t in probes):
            return offset
    return None
