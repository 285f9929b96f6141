"""The CPUs and GPUs that this process can use, and the OpenMP runtimes that it has loaded."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
#: GNU's, Intel's and LLVM's runtime, under the names that wheels give their own copies too (libgomp-e985bcbb.so.1).
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)([-.][^/]*)?\.so[.\d]*")


def cpu_model() -> str:
    """Return the name of the processor, or else its architecture."""
    for line in _lines(_PROC / "cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Cpus:
    """`present` in the machine; `allowed` by the affinity mask; `quota` of CPU time by cgroups, in CPUs, or None."""

    present: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """The number of threads that can run at a time without waiting for each other."""
        return min(self.allowed, math.ceil(self.quota)) if self.quota else self.allowed


def cpus() -> Cpus:
    """Return the CPUs that this process may use now."""
    present = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    return Cpus(present, allowed, _quota())


def _quota() -> float | None:
    """Return the tightest limit of this process's cgroup and its parents, versions 1 and 2."""
    limits = []
    for line in _lines(_PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUP / controllers
        here = root / path.lstrip("/")
        # In a container the path may be the one on the host, where only the root is mounted.
        for folder in (here, *here.parents):
            quota, period = _limit(folder) if controllers == "" else _limit_v1(folder)
            if quota > 0 and period > 0:
                limits.append(quota / period)
            if folder == root:
                break
    return min(limits, default=None)


def _limit(folder: Path) -> tuple[int, int]:
    """Return microseconds of CPU time per period, and the period; 0 where there is no limit."""
    words = " ".join(_lines(folder / "cpu.max")).split()
    return (int(words[0]), int(words[1])) if len(words) == 2 and words[0] != "max" else (0, 0)


def _limit_v1(folder: Path) -> tuple[int, int]:
    quota, period = (_lines(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return (int(quota[0]), int(period[0])) if quota and period else (0, 0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body on so many of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def busy_seconds() -> float | None:
    """Return the CPU time so far of all programs on the CPUs that this process may use; None where it is not known."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    fields = [line.split() for line in _lines(_PROC / "stat")]
    # user, nice, system, idle, iowait, irq, softirq, steal
    busy = [sum(map(int, f[1:4])) + sum(map(int, f[6:9])) for f in fields if f and f[0] in allowed]
    return sum(busy) / os.sysconf("SC_CLK_TCK") if busy else None


def gpus() -> list[dict[str, str]]:
    """Return name and compute capability of the CUDA devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}"} for p in properties]


def openmp_runtimes() -> list[str] | None:
    """Return the files of the OpenMP runtimes mapped into this process; None where /proc does not list them."""
    maps = _lines(_PROC / "self" / "maps")
    if not maps:
        return None
    fields = (line.split(maxsplit=5) for line in maps)
    files = {f[5].removesuffix(" (deleted)") for f in fields if len(f) == 6}
    return sorted(file for file in files if _OPENMP.fullmatch(file.rsplit("/", 1)[-1]))


def _lines(file: Path) -> list[str]:
    """Return the lines of a file of the system; none if it cannot be read."""
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []
