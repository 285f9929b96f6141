"""Write normkern/_C.pyi from the binary (`make stubs`), or check that it is up to date (`make lint ONLY=stubs`).

pybind11-stubgen reads the signatures that pybind11 wrote. They have "object" where the binding examines the argument
itself, so `TYPES` has the types of those: a name means the same wherever it is bound. A vague type without an entry is
an error, and so is an entry that nothing needs.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

STUB = Path(__file__).parent.parent / "normkern" / "_C.pyi"

#: Type -> arguments "name" or "function.name", results "function()", where signatures are vague. The longer name wins.
TYPES = {
    "Tensor": "a g x raw out total sq_norms row_sq totals rstd of_weight of_bias ids param norm coef "
    "Pass.sq_norms.table",
    "Tensor | None": "centred mean order begin table scratch found_inf Pass.like()",
    "Callable[[int], Tensor]": "moments.new_scratch row_sums.new_scratch embedding_moments.new_scratch "
    "Pass.sq_norms.new_scratch",
    "Callable[[int], Tensor] | None": "outer_moments.new_scratch conv_moments.new_scratch",
    "list[Tensor]": "coefs Pass.places() gather.params samples moments.means",
    "list[Tensor] | None": "moments.centred",
    "float | Tensor": "LrMultipliers.value()",
    "list[Any]": "params grads",
    "list[list[Any]] | None": "buffers",
    "list[Any] | None": "held masters counts radii",
    "tuple[str, ...]": "keys",
    "dict[str, int]": "shim",
    "dict[int, tuple[Any, Hyper]]": "Pass.hypers()",
    "list[int] | None": "first slots",
    "tuple[Tensor | None, ...] | None": "on_device",
    "tuple[Tensor, ...]": "Pass.check()",
    "tuple[Tensor, ...] | None": "last",
    "tuple[int, ...]": "Pass.slot_offsets()",
    "tuple[list[Any], tuple[list[Any], ...], list[int]]": "gather()",
    "object": "given tensor exchange_api kernel_size stride padding dilation",
    "Any": "state",
}
_VAGUE = {"typing.Any", "list[typing.Any]", "object", "list", "tuple", "dict", "set"}
_NUMBERS = {"typing.SupportsInt | typing.SupportsIndex": "int", "typing.SupportsFloat | typing.SupportsIndex": "float"}
_HEAD = '''"""The binary. Arguments are documented where they are used: ops/. Written by `make stubs`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

'''


def raw() -> str:
    """What pybind11-stubgen makes of the binary alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "normkern._C", "--exit-code", "-o", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"csrc/stubs.py: pybind11-stubgen: {done.stderr.strip()}")
        return (Path(folder) / "normkern" / "_C.pyi").read_text()


def typed(text: str, types: dict[str, str] = TYPES) -> str:
    """The stub `text` with every vague type replaced by its entry in `types`.

    Raises:
        ValueError: a vague type has no entry, an entry is not needed.
    """
    known = {name: kind for kind, names in types.items() for name in names.split()}
    needed: set[str] = set()
    missing: list[str] = []

    def better(annotation: ast.expr | None, where: str, *names: str) -> ast.expr | None:
        if annotation is None:
            return None
        found = ast.unparse(annotation)
        for number, plain in _NUMBERS.items():
            found = found.replace(number, plain)
        if found in _VAGUE:
            entry = next((name for name in names if name in known), None)
            if entry is None:
                missing.append(f"{where} is {found}")
            else:
                needed.add(entry)
                found = known[entry]
        return ast.parse(found, mode="eval").body

    tree = ast.parse(text)
    for path, function in _functions(tree):
        arguments = [*function.args.args, *function.args.kwonlyargs]
        without_default = len(function.args.args) - len(function.args.defaults)
        defaults = [None] * without_default + function.args.defaults + function.args.kw_defaults
        for argument, default in zip(arguments, defaults, strict=True):
            name = argument.arg
            argument.annotation = better(argument.annotation, f"{path}.{name}", f"{path}.{name}", name)
            if argument.annotation and isinstance(default, ast.Constant) and default.value is None:
                argument.annotation = _or_none(argument.annotation)
        function.returns = better(function.returns, f"{path}()", f"{path}()")
    if missing:
        raise ValueError(f"no type for what the binary leaves vague: {', '.join(missing)}; TYPES expected an entry")
    if idle := known.keys() - needed:
        raise ValueError(f"TYPES has entries that nothing needs: {', '.join(sorted(idle))}")
    body = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    numbers = [ast.unparse(node).split(" = ")[0] for node in tree.body if _is_constant(node)]
    return _HEAD + "\n".join([*numbers, *map(ast.unparse, body)])


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from (
                (f"{node.name}.{inner.name}", inner) for inner in node.body if isinstance(inner, ast.FunctionDef)
            )


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.target) != "__all__"


def _or_none(annotation: ast.expr) -> ast.expr:
    text = ast.unparse(annotation)
    return annotation if text.endswith("| None") or text == "Any" else ast.parse(f"{text} | None", mode="eval").body


def formatted(text: str) -> str:
    """By ruff, as every file."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail and show what would change")
    arguments = parser.parse_args()
    new, old = formatted(typed(raw())), STUB.read_text()
    if not arguments.check:
        STUB.write_text(new)
    elif new != old:
        lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "checked in", "from the binary")
        raise SystemExit("".join(lines) + "\nnormkern/_C.pyi is not what the binary says: make stubs writes it anew")


if __name__ == "__main__":
    main()
