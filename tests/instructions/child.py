"""python -m instructions.child machine|python OUT [--tree FOLDER] [--only PATH]...: the process that is counted.

"machine" runs under callgrind, which writes a profile for each step that is counted. "python" counts the bytecodes of each
Python function. Both write what they ran to OUT, as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

#: Steps before the first that is counted: by then every cache is warm, and the interpreter has specialised its code.
WARM = 40
#: Steps that are counted; the least of them is the result.
STEPS = 3


def import_only_from(tree: str) -> None:
    """Make Python import normkern from this folder, wherever an editable install points."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
    sys.path.insert(0, tree)


def warm(steps: dict[str, Any]) -> None:
    for step in steps.values():
        for _ in range(WARM):
            step(lambda function: function())
    gc.collect()
    gc.freeze()
    gc.disable()


def count_machine(steps: dict[str, Any]) -> None:
    marks = ctypes.PyDLL(os.environ["INSTRUCTIONS_MARKS"])
    toggle = marks.marks_toggle

    def counted(function: Callable[[], Any]) -> None:
        toggle()
        function()
        toggle()

    marks.marks_start()
    for name, step in steps.items():
        for _ in range(STEPS):
            step(counted)
            marks.marks_dump(name.encode())


def count_python(steps: dict[str, Any]) -> dict[str, dict[str, int]]:
    import normkern

    from . import bytecodes

    counts = {}
    for name, step in steps.items():
        found: Counter[CodeType] = Counter()
        step(lambda function, found=found: bytecodes.count(function, found))
        counts[name] = bytecodes.by_name(found, normkern)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="instructions.child")
    parser.add_argument("what", choices=("machine", "python"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tree", help="the folder with the package that is counted, instead of what is installed")
    parser.add_argument("--only", action="append", help="one path, in place of all")
    given = parser.parse_args()
    if given.tree:
        import_only_from(given.tree)

    import normkern

    if given.tree and Path(given.tree).resolve() not in Path(normkern.__file__).resolve().parents:
        sys.exit(f"expected normkern in {given.tree}, imported {normkern.__file__}")

    import torch

    from . import build, paths

    torch.manual_seed(0)
    torch.set_num_threads(1)
    steps = {name: make() for name, make in paths.paths().items() if not given.only or name in given.only}
    warm(steps)
    written = {"build": build.describe(), "paths": list(steps)}
    if given.what == "python":
        written["bytecodes"] = count_python(steps)
    else:
        count_machine(steps)
    given.out.write_text(json.dumps(written))


if __name__ == "__main__":
    main()
