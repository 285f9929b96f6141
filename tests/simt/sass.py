"""Machine code as nvdisasm and cuobjdump print it: kernels, their resources, their loops and what these move."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .names import readable

PACKAGES = "nvidia-cuda-nvdisasm==13.2.51 nvidia-cuda-cuobjdump==13.2.51"
_FROM_PYPI = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"


def tool(name: str) -> str | None:
    """Where nvdisasm or cuobjdump is: from PyPI, whose version we know, or on the path."""
    ours = _FROM_PYPI / name
    return str(ours) if ours.exists() else shutil.which(name)


def missing() -> str | None:
    """What this machine lacks to read machine code, and how to get it."""
    absent = [name for name in ("nvdisasm", "cuobjdump", "c++filt") if not (tool(name) or shutil.which(name))]
    if absent:
        return f"machine code is read with {' and '.join(absent)}: pip install {PACKAGES}; Debian: apt install binutils"
    return None


@dataclass
class Instruction:
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that one thread moves."""
        found = re.search(r"\.[US]?(8|16|32|64|128|256)(?:\.|$)", self.opcode)
        return int(found[1]) // 8 if found else 4


@dataclass
class Kernel:
    name: str  # demangled, without namespaces: update<SgdMomentum, Measure 1, float>
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.name.split("<")[0]

    @property
    def arguments(self) -> list[str]:
        """Of the template."""
        return re.findall(r"[^<>,]+", self.name.partition("<")[2].replace(" ", "")) if "<" in self.name else []

    def local_accesses(self) -> int:
        return sum(i.kind in ("LDL", "STL") for i in self.instructions)

    def loops(self) -> list["Loop"]:
        """The innermost ones: from a label to a jump back to it, with no other such stretch inside."""
        spans = []
        for end, i in enumerate(self.instructions):
            target = re.search(r"\.L_x_\d+", i.operands) if i.kind == "BRA" else None
            if target and self.labels.get(target[0], end + 1) <= end:
                spans.append((self.labels[target[0]], end + 1))
        inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        return [Loop(self.instructions[a:b]) for a, b in sorted(set(inner))]


@dataclass
class Loop:
    instructions: list[Instruction]

    def widths(self, *kinds: str) -> list[int]:
        return [i.width for i in self.instructions if i.kind in kinds]

    @property
    def loads(self) -> list[int]:
        return self.widths("LDG", "LD")

    @property
    def stores(self) -> list[int]:
        return self.widths("STG", "ST")

    @property
    def in_flight(self) -> int:
        """Bytes that a thread has asked for when it first must wait: loads before a store, at most."""
        most = now = 0
        for i in self.instructions:
            if i.kind in ("LDG", "LD"):
                now += i.width
                most = max(most, now)
            elif i.kind in ("STG", "ST"):
                now = 0
        return most


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_cubin(path: Path, arch: str) -> list[Kernel]:
    kernels: dict[str, Kernel] = {}
    usage = _output(tool("cuobjdump"), "-res-usage", str(path))
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for mangled, *numbers in re.findall(pattern, usage):
        kernels[mangled] = Kernel(mangled, arch, *map(int, numbers))
    current = None
    for line in _output(tool("nvdisasm"), "-c", str(path)).splitlines():
        if found := re.match(r"^\.text\.(\S+):", line):
            current = kernels.get(found[1])
        elif current is None:
            continue
        elif found := re.match(r"^(\.L_x_\d+):", line):
            current.labels[found[1]] = len(current.instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            current.instructions.append(Instruction(found[1], found[2]))
    for kernel, name in zip(kernels.values(), readable(kernels), strict=True):
        kernel.name = name
    return list(kernels.values())


def read_binary(path: Path) -> list[Kernel]:
    """Of everything that carries device code: an object, a shared library."""
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xelf", "all", str(path.resolve())], cwd=folder, check=True, capture_output=True
        )
        cubins = sorted(Path(folder).glob("*.cubin"))
        archs = [re.search(r"\.(sm_\d+)a?\.cubin$", cubin.name)[1] for cubin in cubins]
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(read_cubin, cubins, archs):
                kernels += found
    return kernels
