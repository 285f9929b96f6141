"""csrc/stubs.py: each type that the binary leaves vague has an entry, and no other has."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("stubs", Path(__file__).parent.parent / "csrc" / "stubs.py")
stubs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(stubs)

RAW = """
from __future__ import annotations
import typing
__all__: list[str] = ['CHUNK', 'Pass', 'f']
class Pass:
    def add(self, g: list, n: typing.SupportsInt | typing.SupportsIndex, gauge: Pass = None) -> tuple:
        ...
    @property
    def like(self) -> typing.Any:
        ...
def f(g: typing.Any, x: typing.SupportsFloat | typing.SupportsIndex = 1.0, state: typing.Any = None) -> None:
    ...
CHUNK: int = 32768
"""
TYPES = {"Tensor": "g Pass.like()", "list[Tensor]": "Pass.add.g", "tuple[int, ...]": "Pass.add()", "Any": "state"}


def lines(types):
    return stubs.typed(RAW, types).removeprefix(stubs._HEAD).splitlines()


def test_vague_types_get_their_entry_and_numbers_are_numbers():
    assert [line.strip() for line in lines(TYPES) if line.strip() not in ("", "...", "@property")] == [
        "CHUNK: int",
        "class Pass:",
        "def add(self, g: list[Tensor], n: int, gauge: Pass | None=None) -> tuple[int, ...]:",
        "def like(self) -> Tensor:",
        "def f(g: Tensor, x: float=1.0, state: Any=None) -> None:",
    ]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("Tensor", r"Pass.like\(\) is typing.Any, f.g is typing.Any"),
        ("tuple[int, ...]", r"no type for .*: Pass.add\(\) is tuple; TYPES expected an entry"),
    ],
)
def test_a_vague_type_without_an_entry_is_named(entry, sentence):
    with pytest.raises(ValueError, match=sentence):
        lines({kind: names for kind, names in TYPES.items() if kind != entry})


@pytest.mark.parametrize("name", ["h", "x", "Pass.add.n", "f()"])
def test_an_entry_that_nothing_needs_is_named(name):
    with pytest.raises(ValueError, match=f"nothing needs: {name}".replace("(", r"\(").replace(")", r"\)")):
        lines({**TYPES, "int": name})
