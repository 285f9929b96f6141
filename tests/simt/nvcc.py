"""What nvcc makes of the shipped .cu files, or of others; what is unchanged is kept."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .build import BUILD, CSRC, digest, headers_digest, run

#: Of csrc/cuda/build.cmake: no fused multiply-add that is not written as one.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", f"-I{CSRC}")


def missing() -> str | None:
    """What this machine lacks to compile for a GPU, and how to get it."""
    if not shutil.which("nvcc"):
        return "machine code and PTX come from nvcc, which is not on the path: it is part of the CUDA toolkit, 12.8 or newer"
    return None


def _compile(source: Path, suffix: str, *how: str) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / f"{source.stem}-{digest(headers_digest([CSRC]), source.read_text(), FLAGS, how)}{suffix}"
    if not target.exists():
        made = f"{target}.{os.getpid()}"
        run(["nvcc", *FLAGS, *how, str(source), "-o", made])
        os.replace(made, target)
    return target


def ptx(sources, capability: int) -> list[str]:
    """The PTX of each file for a compute capability, 75 for 7.5."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = pool.map(lambda s: _compile(s, ".ptx", f"-arch=compute_{capability}", "-ptx"), sources)
        return [file.read_text() for file in files]


def objects(sources, capabilities) -> list[Path]:
    """Objects of each file for each capability."""
    jobs = [(source, f"-gencode=arch=compute_{c},code=sm_{c}") for source in sources for c in capabilities]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: _compile(job[0], ".o", job[1], "-c"), jobs))
