"""python -m fuzz ops|checkpoints FOLDER [libFuzzer's options]: tries bytes that take new ways through the code.

Both the Python of normkern and, where the binary counts its edges (`make fuzz` builds such a one), the binding are
watched. It begins with tests/fuzz/corpus (a string of bytes a line) and what the folder holds, and puts new ones there.
"""

import ctypes
import gc
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import atheris
import torch

import normkern

from . import calls, checkpoints

TARGETS = {"ops": calls.call, "checkpoints": checkpoints.load}


def follow_python() -> None:
    """Every function of normkern, wherever it was imported from: atheris' own hook cannot follow an editable install."""
    for x in gc.get_objects():
        if isinstance(x, types.FunctionType) and (x.__module__ or "").partition(".")[0] in ("normkern", "fuzz"):
            atheris.instrument_func(x)


def count_edges_of_the_binding() -> None:
    binary = ctypes.CDLL(normkern.ops.binary.__file__)
    if not hasattr(binary, "normkern_edges"):
        print("fuzz: this binary does not count its edges; only Python's are followed", file=sys.stderr)
        return
    found = importlib.util.find_spec("atheris.core_with_libfuzzer")  # which atheris imports when it begins
    assert found is not None
    fuzzer = ctypes.CDLL(found.origin)
    binary.normkern_edges(fuzzer.__sanitizer_cov_8bit_counters_init, fuzzer.__sanitizer_cov_pcs_init)


def main() -> None:
    name, folder = sys.argv.pop(1), Path(sys.argv[1])
    target = TARGETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for i, line in enumerate((Path(__file__).parent / "corpus" / f"{name}.txt").read_text().split()):
        (folder / f"kept-{i}").write_bytes(bytes.fromhex(line))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    follow_python()

    def one(data: bytes) -> None:
        target(data)

    atheris.Setup(sys.argv, one)
    count_edges_of_the_binding()
    atheris.Fuzz()


main()
