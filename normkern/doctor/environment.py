"""Checks of the installation: versions, binary, OpenMP runtimes and devices fit together."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path

import torch

import normkern

from .. import ops
from ..ops._load import REINSTALL, is_source_tree
from . import gpu, machine
from .finding import Check, Finding, failed, note, ok, skipped
from .info import dlpack_version

_DLPACK_MAJOR = 1  # what csrc/dlpack.h declares


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: 2.13.0+cpu -> (2, 13)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def versions() -> Finding:
    """Check that torch and Python are new enough, and that torch has the DLPack version that the binary reads."""
    floor = ".".join(map(str, normkern.TORCH_FLOOR))
    if _numbers(torch.__version__) < normkern.TORCH_FLOOR:
        return failed(f"torch {torch.__version__}, expected >= {floor}", f"pip install 'torch>={floor}'")
    dlpack = dlpack_version()
    if dlpack is None or dlpack[0] != _DLPACK_MAJOR:
        found = "no DLPack exchange API" if dlpack is None else f"DLPack {dlpack[0]}.{dlpack[1]}"
        return failed(
            f"torch {torch.__version__} has {found}, expected DLPack {_DLPACK_MAJOR}.x",
            f"get normkern's sources of a version for this torch, and install them: {REINSTALL}",
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
        f"Python {python[0]}.{python[1]}{' >= ' if python_floor else ''}{'.'.join(map(str, python_floor))}"
    )


def _python_floor() -> tuple[int, ...]:
    """Return the oldest Python from the metadata of the installed package; () where pip did not install it."""
    try:
        return _numbers(metadata.metadata("normkern")["Requires-Python"].lstrip(">= "))
    except (metadata.PackageNotFoundError, KeyError):
        return ()


def binary() -> Finding:
    """Check that the binary has everything that the Python files use, and was installed with them."""
    folder = Path(normkern.__file__).resolve().parent
    stub = folder / "_C.pyi"
    if not stub.exists():
        return skipped(f"{stub.name} is not installed")
    missing = [name for name in _declared(stub) if not _has(ops.binary, name)]
    if missing:
        return failed(f"the binary lacks {', '.join(missing)}: older than the Python files", REINSTALL)
    try:
        installed = metadata.version("normkern")
    except metadata.PackageNotFoundError:
        return note(f"has all of {stub.name}; normkern {normkern.__version__} was not installed by pip")
    if installed != normkern.__version__:
        return failed(f"normkern {normkern.__version__} over an installed {installed}", REINSTALL)
    binary = Path(ops.binary.__file__ or "").resolve()
    if is_source_tree(folder) and not _is_editable() and binary.parent != folder:
        return note(f"normkern {installed}: the Python files of {folder} with the binary {binary}")
    return ok(f"normkern {installed}; the binary has all of {stub.name}")


def _is_editable() -> bool:
    """Return whether pip installed normkern in editable mode, so that the Python files and the binary lie apart."""
    origin = metadata.distribution("normkern").read_text("direct_url.json")
    return bool(origin and json.loads(origin).get("dir_info", {}).get("editable"))


def _declared(stub: Path) -> list[str]:
    """Return the names of a stub file, those of a class's members as "Class.member"."""
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
    """Check that the best instruction-set level that this machine can run is selected."""
    chosen, best = ops.isa(), ops.supported_isas()[0]
    if chosen == best:
        return ok(f"{chosen}, the best of {', '.join(ops.supported_isas())}")
    by = f"NORMKERN_ISA={os.environ['NORMKERN_ISA']}" if "NORMKERN_ISA" in os.environ else "select_isa"
    return note(f"{chosen}, chosen by {by}; this machine runs {best}")


def openmp(brought_by: dict[str, str]) -> Finding:
    """Check that this process has one OpenMP runtime; `brought_by`: file -> the module that loaded it, if known.

    Two runtimes are a failure: each keeps its own threads, which wait for work on the same CPUs, and some pairs
    (Intel's with LLVM's) stop the process.
    """
    files = machine.openmp_runtimes()
    if files is None:
        return skipped("this system does not list the loaded libraries")
    if len(files) < 2:
        return ok(f"one: {Path(files[0]).name}, of {_owner(files[0])}" if files else "none is loaded")
    preloaded = {os.path.realpath(part) for part in re.split(r"[ :]", os.environ.get("LD_PRELOAD", "")) if part}
    # The kernels run on torch's runtime. The sentence names one of the others: one cure at a time is enough.
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
    """Return the installed package that a library lies in: ".../site-packages/torch/lib/libgomp.so.1" -> "torch"."""
    found = re.search(r"/(?:site|dist)-packages/([^/]+?)(?:\.libs)?/", file)
    return found[1] if found else "the system"


def checks(brought_by: dict[str, str]) -> list[Check]:
    """Return the checks of the installation."""
    return [
        Check("versions", versions),
        Check("binary", binary),
        Check("ISA level", level),
        Check("OpenMP runtimes", lambda: openmp(brought_by)),
        Check("devices", gpu.devices),
        Check("GPU kernels", gpu.same_as_cpu),
    ]
