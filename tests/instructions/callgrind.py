"""Runs the counted process under callgrind, and reads the profiles that it writes."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: callgrind's own profile of a whole run holds nothing: collection is off but for the counted steps.
_TRIGGER = re.compile(r"^desc: Trigger: Client Request: (.*)$")
#: callgrind marks a function that calls itself: name'2.
_RECURSION = re.compile(r"'\d+$")
_NAMELESS = "functions without a name in"


@dataclass(frozen=True)
class Profile:
    """One step: the instructions of each function itself, without those of what it calls."""

    path: str
    functions: dict[str, int]

    @property
    def instructions(self) -> int:
        return sum(self.functions.values())


def missing() -> str | None:
    """Return why nothing can be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "expected valgrind on the path, found none (apt install valgrind)"
    if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        return f"expected x86-64 or aarch64, got {platform.machine()}"
    return None


def build_marks(folder: Path) -> Path:
    """Compile what lets Python speak to callgrind.

    Raises:
        RuntimeError: there is no C compiler, or valgrind came without its headers.
    """
    library = folder / "marks.so"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    source = Path(__file__).with_name("marks.c")
    done = subprocess.run(
        [*compiler, "-O1", "-fPIC", "-shared", str(source), "-o", str(library)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{source.name}: expected a C compiler and valgrind's headers, got: {done.stderr.strip()}")
    return library


def command(out: Path) -> list[str]:
    """Return what comes before the command of the process that is counted."""
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []  # addresses are the same each time
    return [
        *fixed, "valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}",
        "--instr-atstart=no", "--collect-atstart=no",  # importing torch takes a minute otherwise
        "--dump-line=no", "--compress-strings=no", "--compress-pos=no",
    ]  # fmt: skip


def parse(text: str) -> Profile | None:
    """Return one profile, or None where no step was counted: callgrind writes one more when the process ends."""
    path, functions = None, Counter[str]()
    binary = name = ""
    inclusive = False
    for line in text.splitlines():
        if found := _TRIGGER.match(line):
            path = found[1]
        elif line.startswith("ob="):
            binary = line[3:].rpartition("/")[2]
        elif line.startswith("fn="):
            name = _RECURSION.sub("", line[3:])
            if name.startswith("0x"):  # an address: the binary has no names
                name = f"{_NAMELESS} {binary}"
        elif line.startswith("calls="):
            inclusive = True  # the next line is what the callee cost
        elif line[:1].isdigit():
            if not inclusive:
                functions[name] += int(line.split()[1])
            inclusive = False
    return None if path is None else Profile(path, dict(functions))


def has_names(functions: Iterable[str]) -> bool:
    """Return whether normkern's binary has kept the names of its functions."""
    return not any(name.startswith(f"{_NAMELESS} _C.") for name in functions)


def least(profiles: list[Profile]) -> dict[str, Profile]:
    """Return the cheapest step of each path."""
    found: dict[str, Profile] = {}
    for profile in profiles:
        if profile.path not in found or profile.instructions < found[profile.path].instructions:
            found[profile.path] = profile
    return found
