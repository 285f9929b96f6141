"""Does what was installed fit together: versions, binary, OpenMP runtimes, devices, and torch's own kernels."""

from __future__ import annotations

import ast
import os
import re
import sys
from importlib import metadata
from pathlib import Path

import torch

import normkern

from .. import ops
from . import gpu, machine
from .finding import Check, Finding, failed, note, ok, skipped
from .info import dlpack_version

_DLPACK_MAJOR = 1  # what csrc/dlpack.h declares
_REINSTALL = "pip install --force-reinstall --no-deps normkern"


def _numbers(version: str) -> tuple[int, ...]:
    """The first two of a version: 2.13.0+cpu -> (2, 13)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def versions() -> Finding:
    """torch and Python are new enough, and torch speaks the DLPack that the binary reads."""
    floor = ".".join(map(str, normkern.TORCH_FLOOR))
    if _numbers(torch.__version__) < normkern.TORCH_FLOOR:
        return failed(f"torch {torch.__version__}, expected >= {floor}", f"pip install 'torch>={floor}'")
    dlpack = dlpack_version()
    if dlpack is None or dlpack[0] != _DLPACK_MAJOR:
        found = "no DLPack exchange API" if dlpack is None else f"DLPack {dlpack[0]}.{dlpack[1]}"
        return failed(
            f"torch {torch.__version__} has {found}, expected DLPack {_DLPACK_MAJOR}.x",
            "install a normkern made for this torch: pip install --upgrade normkern",
        )
    python, python_floor = sys.version_info[:2], _python_floor()
    if python < python_floor:
        oldest = ".".join(map(str, python_floor))
        return failed(
            f"Python {python[0]}.{python[1]}, expected >= {oldest}",
            f"make an environment with Python >= {oldest} and install normkern there",
        )
    return ok(
        f"torch {torch.__version__} >= {floor}, DLPack {dlpack[0]}.{dlpack[1]}, "
        f"Python {python[0]}.{python[1]} >= {'.'.join(map(str, python_floor))}"
    )


def _python_floor() -> tuple[int, ...]:
    """From the metadata of the installed package; (0, 0) where it was not installed but found on a path."""
    try:
        return _numbers(metadata.metadata("normkern")["Requires-Python"].lstrip(">= "))
    except (metadata.PackageNotFoundError, KeyError):
        return (0, 0)


def binary() -> Finding:
    """The binary has everything that the Python sources know of, and was installed with them."""
    stub = Path(normkern.__file__).with_name("_C.pyi")
    if not stub.exists():
        return skipped(f"{stub.name} is not installed")
    missing = [name for name in _declared(stub) if not _has(ops.binary, name)]
    if missing:
        return failed(f"the binary lacks {', '.join(missing)}: older than the Python files", _REINSTALL)
    try:
        installed = metadata.version("normkern")
    except metadata.PackageNotFoundError:
        return note(f"has all of {stub.name}; normkern {normkern.__version__} was not installed by pip")
    if installed != normkern.__version__:
        return failed(f"normkern {normkern.__version__} over an installed {installed}", _REINSTALL)
    return ok(f"normkern {installed}; the binary has all of {stub.name}")


def _declared(stub: Path) -> list[str]:
    """Names of a stub file, those of a class's members as "Class.member"."""
    names = []
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        elif isinstance(node, ast.ClassDef):
            names += [node.name, *(f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef))]
    return names


def _has(thing: object, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


def level() -> Finding:
    """The best instruction-set level that runs here is the one that runs."""
    chosen, best = ops.isa(), ops.supported_isas()[0]
    if chosen == best:
        return ok(f"{chosen}, the best of {', '.join(ops.supported_isas())}")
    by = f"NORMKERN_ISA={os.environ['NORMKERN_ISA']}" if "NORMKERN_ISA" in os.environ else "select_isa"
    return note(f"{chosen}, chosen by {by}; this machine runs {best}")


def openmp(brought_by: dict[str, str]) -> Finding:
    """One OpenMP runtime in this process; `brought_by`: file -> the module whose import loaded it, where known.

    Two of them are a failure: each keeps its own threads, which wait for work on the same CPUs, and some pairs (Intel's
    with LLVM's) stop the process.
    """
    files = machine.openmp_runtimes()
    if files is None:
        return skipped("this system does not tell what is loaded")
    if len(files) < 2:
        return ok(f"one: {Path(files[0]).name}, of {_owner(files[0])}" if files else "none is loaded")
    preloaded = {os.path.realpath(part) for part in re.split(r"[ :]", os.environ.get("LD_PRELOAD", "")) if part}
    # The kernels run on torch's; of the others one is named, as one cure at a time is enough.
    other = max(files, key=lambda f: (f in brought_by, f in preloaded, _owner(f) != "torch"))
    named = " and ".join(f"{Path(f).name} of {_owner(f)}" for f in files)
    if other in preloaded:
        return failed(f"{len(files)}: {named}", f"take {other} out of LD_PRELOAD")
    by = f"`import {brought_by[other]}`" if other in brought_by else _owner(other)
    return failed(
        f"{len(files)}: {named}",
        f"{other} came with {by}, beside {next(f for f in files if f != other)}: install both packages from "
        "conda-forge, where all share one runtime, or use them in separate processes",
    )


def _owner(file: str) -> str:
    """The installed package that a library lies in: ".../site-packages/torch/lib/libgomp.so.1" -> "torch"."""
    found = re.search(r"/(?:site|dist)-packages/([^/]+?)(?:\.libs)?/", file)
    return found[1] if found else "the system"


def torchs_own() -> Finding:
    """What torch's fused SGD makes of bfloat16 and float16 on this CPU. Not our failure, but a reason to know."""
    wrong = []
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.nn.Parameter(torch.ones(1003, dtype=dtype))
        p.grad = torch.ones_like(p)
        torch.optim.SGD([p], lr=0.5, fused=True).step()
        if not torch.equal(p, torch.full_like(p, 0.5)):
            wrong.append(str(dtype).removeprefix("torch."))
    if wrong:
        return note(f"torch's own fused SGD is wrong in {' and '.join(wrong)} here; normkern's is not affected")
    return ok("torch's own fused SGD is right in bfloat16 and float16 here")


def checks(brought_by: dict[str, str]) -> list[Check]:
    """The lines of the table that are about the installation."""
    return [
        Check("versions", versions),
        Check("binary", binary),
        Check("ISA level", level),
        Check("OpenMP runtimes", lambda: openmp(brought_by)),
        Check("devices", gpu.devices),
        Check("GPU kernels", gpu.same_as_cpu),
        Check("torch's fused SGD", torchs_own),
    ]
