"""Finds the binary: beside the Python files or, in a source tree without one, where pip installed it."""

from __future__ import annotations

import importlib.util
import sys
from importlib import machinery, metadata
from pathlib import Path

_NAME = "normkern._C"
_FOLDER = Path(__file__).resolve().parent.parent

#: The command that replaces an installation. There is no `normkern` in any package index.
REINSTALL = "`pip install --force-reinstall --no-deps .` in normkern's source folder"
#: The command that replaces it by one with kernels for GPUs.
REINSTALL_WITH_CUDA = REINSTALL.replace("`", "`NORMKERN_CUDA=ON ", 1)


def provide_binary() -> None:
    """Make `normkern._C` importable in a source tree that has none, if pip installed the same sources somewhere else.

    Python started in a checkout finds the tree's `normkern` before the installed one, and the tree has the Python files
    only. An installed binary serves them if its version and its `_C.pyi`, which has every signature, are theirs.
    """
    if _NAME in sys.modules or not is_source_tree(_FOLDER) or importlib.util.find_spec(_NAME) is not None:
        return
    version, stub = sys.modules["normkern"].__version__, (_FOLDER / "_C.pyi").read_bytes()
    for installed, folder in _installed():
        binary = next((f for s in machinery.EXTENSION_SUFFIXES if (f := folder / f"_C{s}").is_file()), None)
        its_stub = folder / "_C.pyi"
        if binary and installed == version and its_stub.is_file() and its_stub.read_bytes() == stub:
            _load(binary)
            return


def is_source_tree(folder: Path) -> bool:
    """Return whether the package folder lies in normkern's sources, where pip builds from."""
    return (folder.parent / "pyproject.toml").is_file() and (folder.parent / "csrc").is_dir()


def why_missing(error: ImportError) -> str:
    """Return the sentence for a binary that could not be loaded."""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if not is_source_tree(_FOLDER):
        return f"normkern's binary could not be loaded ({error}). Build it for this interpreter, {python}: {REINSTALL}"
    others = [f"{version} in {folder}" for version, folder in _installed()]
    what = f"; the installed normkern {others[0]} has none of the same sources for {python}" if others else ""
    return (
        f"normkern's binary could not be loaded ({error}): {_FOLDER} is the source tree, and pip built no binary in "
        f"it{what}. Use `pip install -e .` in {_FOLDER.parent}, or `pip install .` there and start Python in another "
        "folder"
    )


def _installed() -> list[tuple[str, Path]]:
    """Return version and package folder of each normkern that pip installed, in the order of `sys.path`."""
    found = [
        (d.version, Path(str(d.locate_file("normkern"))).resolve()) for d in metadata.distributions(name="normkern")
    ]
    return [(version, folder) for version, folder in found if folder != _FOLDER]


def _load(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(_NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_NAME]
        raise
