"""normkern's binary compiled a second time, with the CUDA kernels under the emulator, as one more back end.

The binding is the shipped one. It sees tensors through torch's exchange API; here it is given one in whose eyes CPU
tensors lie on CUDA device 0. So argument checks, tables, launches, kernels and sums run as they would on a GPU.
"""

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import re
import subprocess
import types

import numpy as np
import torch

from normkern import ops

from . import build
from .names import readable


class Refused:
    """CUDA's error codes that a launch can be refused with."""

    NO_KERNEL_IMAGE = 209
    OUT_OF_RESOURCES = 701


class Backend:
    """The emulated binary.

    Args:
        checked: examine every access of every kernel, fifty times slower.
        kernels: units of .cu files that take the place of the shipped ones of the same names.
    """

    def __init__(self, checked, *, kernels=()):
        self.path = path = str(build.binding(checked=checked, kernels=kernels))
        self._library = ctypes.CDLL(path)
        self._library.simt_exchange_api.restype = ctypes.c_void_p
        self._library.simt_launches.restype = ctypes.c_uint64
        name = f"simt_{'checked' if checked else 'fast'}._C"  # pybind11 keeps one module of each name
        loader = importlib.machinery.ExtensionFileLoader(name, path)
        self.binary = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(self.binary)
        self.binary.connect(
            self._exchange_api(), ops.torch_symbol("torch_parallel_for"), torch.Tensor, torch.nn.Parameter, {}, 0
        )

    def _exchange_api(self):
        python, name = ctypes.pythonapi, b"dlpack_exchange_api"
        python.PyCapsule_GetPointer.restype = ctypes.c_void_p
        python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        python.PyCapsule_New.restype = ctypes.py_object
        python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        of_torch = python.PyCapsule_GetPointer(torch.Tensor.__dlpack_c_exchange_api__, name)
        self._name = ctypes.create_string_buffer(name)  # the capsule points to it
        return python.PyCapsule_New(
            self._library.simt_exchange_api(ctypes.c_void_p(of_torch)), ctypes.cast(self._name, ctypes.c_char_p), None
        )

    @contextlib.contextmanager
    def in_place(self, seed=1):
        """For as long as this lasts, normkern's ops run under the emulator."""
        real = ops.binary
        modules = [ops, *(x for x in vars(ops).values() if isinstance(x, types.ModuleType) and x is not real)]
        named = [(module, name) for module in modules for name in vars(module)]
        swapped = [(*at, vars(at[0])[at[1]]) for at in named if vars(at[0])[at[1]] is getattr(real, at[1], self)]
        swapped += [(*at, real) for at in named if vars(at[0])[at[1]] is real]
        self.seed(seed)
        self.forget()
        try:
            for module, name, value in swapped:
                setattr(module, name, self.binary if value is real else getattr(self.binary, name))
            yield self
        finally:
            for module, name, value in swapped:
                setattr(module, name, value)
            self.devices()

    def seed(self, seed):
        """Another order of blocks and threads."""
        self._library.simt_seed(ctypes.c_uint64(seed))

    def forget(self):
        """All memory that kernels may touch, and what was counted."""
        self._library.simt_forget_all()

    def blank(self, tensor):
        """Marks memory as unwritten: a kernel that reads it before it writes it is wrong."""
        pointer, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        self._library.simt_allow(pointer, size, b"blank memory")
        self._library.simt_blank(pointer, size)

    def traffic(self):
        """What kernels have moved since the last time: bytes read, bytes written, sectors of 32 bytes, accesses, and
        how many of these were of 16 bytes. Of the check build."""
        numbers = (ctypes.c_uint64 * 5)()
        self._library.simt_traffic(numbers)
        return tuple(numbers)

    def launches(self):
        """How many there have been."""
        return self._library.simt_launches()

    def refuse_launch(self, error, after=0):
        """One of the next launches, after so many others, fails with the error."""
        self._library.simt_refuse_launch(error, after)

    def devices(self, count=1, current=0, of_tensors=0):
        """How many there are, which is current, and on which one tensors lie."""
        self._library.simt_devices(count, current, of_tensors)

    def place(self, tensor, device):
        """From now on, until `devices`, the tensor lies on this one."""
        self._library.simt_place(ctypes.c_void_p(tensor.data_ptr()), device)

    def current_device(self):
        return self._library.simt_current_device()

    # ---- What another machine for launches needs

    @contextlib.contextmanager
    def launches_run_by(self, run):
        """`run(kernel, grid, block, parameters)` in place of fibers: a name, two numbers, bytes."""
        failed = []

        @ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint64
        )
        def called(kernel, grid, block, parameters, size):
            try:
                run(self._kernel_names[kernel], grid, block, ctypes.string_at(parameters, size))
            except BaseException as error:  # it must not cross C++
                failed.append(error)
            return len(failed)

        self._library.simt_run_elsewhere(called)
        try:
            yield
        except RuntimeError:
            if failed:
                raise failed[0] from None
            raise
        finally:
            self._library.simt_run_elsewhere(None)

    @functools.cached_property
    def _kernel_names(self):
        """Of every function of the library, by its place in it."""
        listed = subprocess.run(["nm", self.path], check=True, capture_output=True, text=True).stdout
        found = re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", listed, re.MULTILINE)
        return {int(at, 16): name for (at, _), name in zip(found, readable(m for _, m in found), strict=True)}

    def allowed(self):
        """(address, size) of the memory that kernels may touch."""
        room = self._library.simt_allowed(None, 0)
        stretches = (ctypes.c_uint64 * 2 * room)()
        count = self._library.simt_allowed(stretches, room)
        assert count == room
        return [(a, n) for a, n in stretches[:count]]

    def fma(self, a, b, c):
        """a*b + c with one rounding, of arrays of float32 or float64."""
        function = {4: self._library.simt_fma32, 8: self._library.simt_fma64}[a.dtype.itemsize]
        arrays = [np.ascontiguousarray(x) for x in (a, b, c)]
        out = np.empty_like(arrays[0])
        function(*(ctypes.c_void_p(x.ctypes.data) for x in (*arrays, out)), ctypes.c_int64(out.size))
        return out
