"""Compiles the shipped .cu files, or others, with g++ and the emulator into a library; what is unchanged is kept."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "simt"

EMULATOR = [HERE / name for name in ("launch.cpp", "check.cpp", "runtime.cpp")]
# The numbers policy of CMakeLists.txt; FMA hardware, as every GPU has it. A cast from an array to packs is what nvcc
# allows everywhere.
FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-march=x86-64-v3", "-ffp-contract=off", "-fno-strict-aliasing",
    "-fno-threadsafe-statics", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
)  # fmt: skip
FAST = ("-O1",)  # half the time of -O2 to compile, and as fast where each kernel runs a few times
# Without the last two, g++ splits loads of 16 bytes and repeats stores, and the bytes counted are not the kernel's.
CHECKED = ("-O1", "-fsanitize=thread", "-fno-tree-sra", "-fno-move-loop-stores")


def missing() -> str | None:
    """What this machine lacks to run kernels under the emulator, and how to get it."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return f"the emulator switches its fibers on x86-64 Linux, this is {os.uname().machine} {sys.platform}"
    if not shutil.which("g++"):
        return "the emulator compiles kernels with g++, which is not here (Debian: apt install g++)"
    return None


def digest(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def headers_digest(folders) -> str:
    files = sorted(p for folder in folders for suffix in ("*.h", "*.cuh") for p in folder.rglob(suffix))
    return digest(*(f"{p.name}\0{p.read_text()}" for p in files))


def storage_types() -> list[str]:
    """The types of scalar.h, as CMake reads them."""
    return re.search(r"^using StorageTypes = List<(.*)>;", (CSRC / "core" / "scalar.h").read_text(), re.M)[1].split(
        ", "
    )


@dataclass(frozen=True)
class Unit:
    """One compilation of a file: some are compiled once for each storage type."""

    path: Path
    storage: str = ""

    @property
    def name(self) -> tuple[str, str]:
        return self.path.name, self.storage


def units(paths) -> list[Unit]:
    """What is compiled of these .cu files."""
    types = {path: storage_types() if "NK_TYPE" in path.read_text() else [""] for path in paths}
    return [Unit(path, storage) for path, all_types in types.items() for storage in all_types]


def reads(source: Path, name: str) -> bool:
    """Whether this file is the one of that name, or includes it, also through others."""
    seen, todo = set(), [source.resolve()]
    while todo:
        path = todo.pop()
        if path.name == name:
            return True
        seen.add(path)
        included = {(path.parent / x).resolve() for x in re.findall(r'^ *# *include "(.*)"', path.read_text(), re.M)}
        todo += [other for other in included - seen if other.exists()]
    return False


def _compile(source: Path, flags) -> Path:
    near = source.parent.parent  # a mutant has a csrc/ of its own, and finds its headers beside itself
    headers = headers_digest([near if (near / "core").exists() else CSRC, HERE])
    command = ["g++", *FLAGS, *flags, f"-I{CSRC}", f"-I{HERE}", "-x", "c++", "-c", str(source)]
    target = BUILD / f"{source.stem}-{digest(headers, source.read_text(), command)}.o"
    _make(target, [*command, "-o"])
    return target


def _make(target: Path, command) -> None:
    """Runs a command that ends in the name of what it makes; where several processes want it, one of them."""
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = f"{target}.{os.getpid()}"
            run([*command, made])
            os.replace(made, target)


def run(command) -> None:
    """A compiler.

    Raises:
        RuntimeError: it failed; the text is what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def library(name: str, kernels, *, checked: bool, host=(), flags=()) -> Path:
    """A shared library of kernel sources and, uninstrumented, host sources, with the emulator.

    Args:
        name: of the file.
        kernels: .cu files or units of them, instrumented if `checked`.
        host: further sources.
        flags: for all of them.

    Raises:
        RuntimeError: g++ failed; the text is what it said.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    for old in BUILD.iterdir():  # of sources that have changed since
        if old.is_file() and time.time() - old.stat().st_mtime > 7 * 24 * 3600:
            old.unlink(missing_ok=True)
    cuda = [k if isinstance(k, Unit) else Unit(k) for k in kernels]
    types = [(f"-DNK_TYPE={k.storage}",) if k.storage else () for k in cuda]
    jobs = [(k.path, (*(CHECKED if checked else FAST), *flags, *of)) for k, of in zip(cuda, types, strict=True)]
    jobs += [(h, ("-O1", *flags)) for h in host]
    jobs += [(e, ("-O2",)) for e in EMULATOR]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    target = BUILD / f"{name}-{digest(*objects)}.so"
    _make(target, ["g++", "-shared", *map(str, objects), "-o"])
    return target


def _as_one_file(sources) -> Path:
    """A file that includes the others: g++ reads pybind11's headers, most of the time that each takes, once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    inside = digest(*(path.read_text() for path in sources))
    target = BUILD / f"all-{inside}.cpp"
    made = target.with_suffix(f".{os.getpid()}")
    made.write_text("".join(f'#include "{path}"\n' for path in sources) + f"// {inside}\n")
    os.replace(made, target)
    return target


def binding(*, checked: bool, kernels=()) -> Path:
    """The whole binary once more, with emulated kernels in place of both back ends: a module named `_C`.

    Args:
        checked: examine every access.
        kernels: units that take the place of the shipped ones of the same names.
    """
    import pybind11

    name = "checked" if checked else "fast"
    # Types of the real binary, and of the other build, have other names.
    flags = (f"-Dnk=nk_{name}", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}")
    shipped = {unit.name: unit for unit in units(sorted((CSRC / "cuda").glob("*.cu")))}
    chosen = (shipped | {unit.name: unit for unit in kernels}).values()
    host = [*sorted(CSRC.glob("core/*.cpp")), _as_one_file(sorted(CSRC.glob("binding/*.cpp")))]
    host += [CSRC / "cuda" / "kernels.cpp", HERE / "no_cpu.cpp"]
    return library(f"_C-{name}", chosen, checked=checked, host=host, flags=flags)
