"""Counts every path: instructions by callgrind, bytecodes by the interpreter, in two processes at the same time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import callgrind

TESTS = Path(__file__).resolve().parent.parent
#: Functions of less than this part of a path are counted together.
SMALL = 0.005
THE_REST = f"all functions of less than {SMALL:.1%} each"


@dataclass(frozen=True)
class PathCounts:
    """One step of one path.

    instructions: all of them. functions: those of each C function itself. bytecodes: those of each Python function itself.
    """

    instructions: int
    functions: dict[str, int]
    bytecodes: dict[str, int]

    def folded(self) -> PathCounts:
        """Return the same with small functions together: what the budgets keep. The sums stay."""
        return PathCounts(self.instructions, _fold(self.functions), _fold(self.bytecodes))


def _fold(counts: dict[str, int]) -> dict[str, int]:
    least = SMALL * sum(counts.values())
    rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    large = {name: n for name, n in rows if n >= least and name != THE_REST}
    rest = sum(counts.values()) - sum(large.values())
    return {**large, THE_REST: rest} if rest else large


@dataclass(frozen=True)
class Counts:
    """What was counted. build: what the numbers depend on, beside the code of this repository."""

    build: str
    paths: dict[str, PathCounts]


def environment(marks: Path) -> dict[str, str]:
    """Return an environment in which two runs execute the same instructions."""
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    level = {"NORMKERN_ISA": "v3"} if platform.machine() in ("x86_64", "AMD64") else {}  # valgrind knows no AVX-512
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ, **threads, **level,
        "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(paths), "INSTRUCTIONS_MARKS": str(marks),
    }  # fmt: skip


def count(tree: Path | None = None, only: Sequence[str] = ()) -> Counts:
    """Count the steps of every path, or of some, of what is installed or of the package in a folder.

    Raises:
        RuntimeError: one of the two processes failed; the text has what it wrote.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [*(["--tree", str(tree)] if tree else []), *(f"--only={path}" for path in only)]
        environ = environment(callgrind.build_marks(folder))
        running = {}
        for what, before in (("machine", callgrind.command(folder / "profile")), ("python", [])):
            child = [sys.executable, "-m", "instructions.child", what, str(folder / f"{what}.json"), *options]
            running[what] = subprocess.Popen(
                [*before, *child], cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for what, process in running.items():
            output, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"counting the {what} side failed ({process.returncode}):\n{output}")
        machine, python = (json.loads((folder / f"{what}.json").read_text()) for what in running)
        profiles = [callgrind.parse(file.read_text()) for file in sorted(folder.glob("profile.*"))]
        steps = callgrind.least([profile for profile in profiles if profile is not None])
    return Counts(
        machine["build"],
        {
            path: PathCounts(steps[path].instructions, steps[path].functions, python["bytecodes"][path])
            for path in machine["paths"]
        },
    )
