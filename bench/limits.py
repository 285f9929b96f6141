"""The machine's limits, measured in every run beside the peers: the loops of limits.cpp, compiled when they are needed.

Each limit runs on float32 arrays with as many bytes as the case has, whatever its dtype.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from normkern import ops

#: Name -> (function of limits.cpp, how many arrays it reads or writes).
LIMITS: dict[str, tuple[str, int]] = {
    "five-stream loop": ("five_streams", 5),
    "six-stream loop": ("six_streams", 6),
    "seven-stream loop": ("seven_streams", 7),
    "read": ("read", 1),
    "sum-of-squares read": ("sum_of_squares", 1),
    "copy": ("copy", 2),
}
#: Arrays beyond every cache; a longer one would only cost memory, and rates are what is compared.
LONGEST_BYTES = 256 << 20


def compiler() -> str | None:
    """Return the user's C++ compiler, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)


@functools.cache
def library() -> ctypes.CDLL:
    found = compiler()
    if found is None:
        raise FileNotFoundError("no C++ compiler")
    folder = tempfile.TemporaryDirectory(prefix="limits")
    built = Path(folder.name, "limits.so")
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]
    subprocess.run([found, *flags, str(Path(__file__).with_name("limits.cpp")), "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    folder.cleanup()
    return loaded


def limit_bytes(array_bytes: int) -> int:
    """Return the bytes of one array of the limits, for a case with arrays of so many bytes."""
    return min(array_bytes, LONGEST_BYTES) // 4 * 4


def limit_steps(array_bytes: int) -> dict[str, Callable[[], None]]:
    """Return name -> loop over arrays of so many bytes, in the order of `LIMITS`; without a compiler none."""
    if compiler() is None:
        return {}
    n = limit_bytes(array_bytes) // 4
    arrays = [torch.randn(n) for _ in range(4)]
    arguments = [ctypes.c_void_p(ops.torch_symbol("torch_parallel_for"))]
    arguments += [ctypes.c_void_p(a.data_ptr()) for a in arrays]
    sizes = ctypes.c_int64(n), ctypes.c_int64(torch.get_num_threads())

    def loop(symbol: str) -> Callable[[], None]:
        function = getattr(library(), symbol)

        def step(arrays: list[torch.Tensor] = arrays) -> None:  # keeps them alive
            function(*arguments, *sizes)

        return step

    return {name: loop(symbol) for name, (symbol, _) in LIMITS.items()}
