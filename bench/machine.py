"""The machine and the versions of a run, for the JSON; compare.py refuses runs of different machines."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import normkern
from normkern import ops

from .limits import compiler

#: Packages of the peers; those that are not installed are left out.
PACKAGES = (
    "numpy",
    "torch-optimi",
    "pytorch-optimizer",
    "bitsandbytes",
    "jax",
    "optax",
    "backpack-for-pytorch",
    "opacus",
)


def machine_info() -> dict[str, Any]:
    """Return what makes the machine fast or slow, without its name or its owner."""
    import cpuinfo  # comes with pytest-benchmark

    brand = cpuinfo.get_cpu_info().get("brand_raw")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": brand or platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "machine": platform.machine(),
        "isa": ops.isa(),
        "normkern": normkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _compiler_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _compiler_version() -> str | None:
    found = compiler()
    if found is None:
        return None
    printed = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    return printed.splitlines()[0] if printed else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def build_numbers() -> dict[str, float]:
    """Return seconds of a clean build, megabytes of its wheel, and milliseconds of the import after torch's."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        options = ["--no-deps", "--quiet", "-w", folder, f"--config-settings=build-dir={folder}/build"]
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(root)], check=True)
        build = time.perf_counter() - begin
        size = next(Path(folder).glob("*.whl")).stat().st_size / 1e6
    code = "import torch, time; t = time.perf_counter(); import normkern; print(time.perf_counter() - t)"
    imports = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    return {"build_seconds": build, "wheel_megabytes": size, "import_milliseconds": 1e3 * statistics.median(imports)}
