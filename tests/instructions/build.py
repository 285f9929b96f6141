"""What decides how many instructions a step takes, apart from the code of this repository."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import torch

from normkern import ops


def compiler(binary: Path) -> str:
    """Return the name and version of the compiler, which every compiler leaves in the files that it writes."""
    text = binary.read_bytes()
    for name, pattern in (("clang", rb"clang version (\d+\.\d+\.\d+)"), ("gcc", rb"GCC: \([^)]*\) (\d+\.\d+\.\d+)")):
        if found := re.search(pattern, text):
            return f"{name} {found[1].decode()}"
    return "an unknown compiler"


def describe() -> str:
    """Return the key of this build in the budgets. Builds of one version of Python differ too: see `budgets.why_not`."""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    built = compiler(Path(ops.binary.__file__))
    return f"{python}, torch {torch.__version__}, {built}, {platform.machine()} {ops.isa()}"
