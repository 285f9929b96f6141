"""The build and the machine that it runs on: `python -m normkern info`."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import normkern

from .. import ops
from . import elf, machine

_X86, _ARM = ["v4", "v3", "v2"], ["neon"]
#: The levels that the binary is compiled for, per processor: CMakeLists.txt's list.
_LEVELS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
_VARIABLES = ("NORMKERN_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD")


def info() -> dict[str, Any]:
    """Return versions, binary, processor, threads and GPUs as strings, numbers, lists and dicts, ready for JSON.

    The keys are the same on every machine; what is not known there is None.
    """
    file = Path(ops.binary.__file__ or "")
    needs = elf.needs(file)
    dlpack = dlpack_version()
    cpus = machine.cpus()
    return {
        "normkern": normkern.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "floor": ".".join(map(str, normkern.TORCH_FLOOR)),
            "cuda": torch.version.cuda,
            "dlpack": dlpack and ".".join(map(str, dlpack)),
        },
        "binary": {
            "file": str(file),
            "bytes": file.stat().st_size,
            "cuda_architectures": [f"{a // 10}.{a % 10}" for a in ops.cuda_architectures()],
            "libraries": needs and needs.libraries,
            "symbol_versions": needs and needs.versions,
        },
        "isa": {
            "chosen": ops.isa(),
            "supported": ops.supported_isas(),
            "built": _LEVELS.get(platform.machine(), ["portable"]),
        },
        "cpu": {"model": machine.cpu_model(), "present": cpus.present, "allowed": cpus.allowed, "quota": cpus.quota},
        "threads": torch.get_num_threads(),
        "openmp_runtimes": machine.openmp_runtimes(),
        "gpus": machine.gpus(),
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
    }


def dlpack_version() -> tuple[int, int] | None:
    """Return the version (major, minor) of torch's DLPack exchange API; None where torch has none."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    get_pointer = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))
    address = get_pointer(capsule, b"dlpack_exchange_api")
    major, minor = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint32 * 2)).contents  # how the struct begins
    return major, minor


def show(as_json: bool) -> None:
    """Print `info` as a table or as JSON."""
    facts = info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    lines = _lines(facts)
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:{width}}  {text}")


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines that `show` prints: name, text."""
    t, b, isa, cpu = (facts[name] for name in ("torch", "binary", "isa", "cpu"))
    quota = "" if cpu["quota"] is None else f", {cpu['quota']:g} by cgroup quota"
    versions = ", ".join(f"{kind} {version}" for kind, version in (b["symbol_versions"] or {}).items())
    runtimes = facts["openmp_runtimes"]
    gpus = f" and compute capability {', '.join(b['cuda_architectures'])}" if b["cuda_architectures"] else ""
    lines = [
        ("normkern", facts["normkern"]),
        ("binary", b["file"]),
        ("", f"{b['bytes'] / 1024:,.0f} KiB, for CPUs{gpus}"),
        ("needs", "not an ELF file" if b["libraries"] is None else ", ".join(b["libraries"])),
        ("", versions),
        ("torch", f"{t['version']} (needs >= {t['floor']}), CUDA {t['cuda'] or 'no'}, DLPack {t['dlpack'] or 'no'}"),
        ("Python", facts["python"]),
        ("platform", facts["platform"]),
        ("CPU", f"{cpu['model']}: {cpu['present']} CPUs, {cpu['allowed']} allowed{quota}"),
        ("ISA", f"{isa['chosen']}; runs here: {', '.join(isa['supported'])}; built: {', '.join(isa['built'])}"),
        ("threads", f"{facts['threads']} (torch)"),
        *[("" if i else "OpenMP", file) for i, file in enumerate(["unknown"] if runtimes is None else runtimes)],
        *[("" if i else "GPUs", f"{g['name']}, {g['capability']}") for i, g in enumerate(facts["gpus"])],
        *[(name, value) for name, value in facts["environment"].items() if value is not None],
    ]
    return [(name, text) for name, text in lines if text]
