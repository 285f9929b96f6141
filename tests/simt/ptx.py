"""PTX, the assembly that nvcc writes for any device: parsed into kernels of instructions."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from .names import readable


class Instruction(NamedTuple):
    predicate: tuple[str, bool] | None  # register, and whether it is negated
    opcode: tuple[str, ...]
    operands: list[str]
    text: str


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]]  # name: (offset, alignment)
    parameter_size: int
    shared: dict[str, tuple[int, int]]  # name: (alignment, size)
    instructions: list[Instruction]
    labels: dict[str, int]


def _split(text: str) -> list[str]:
    """At commas that no bracket encloses."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append(text[begin:i].strip())
            begin = i + 1
    rest = text[begin:].strip()
    return [*parts, rest] if rest else parts


def _parameters(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    found, offset = {}, 0
    for declared in _split(text):
        pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.\w(\d+)\s+([\w$]+)(?:\[(\d+)\])?"
        align, bits, name, count = re.match(pattern, declared).groups()
        size = int(count) if count else int(bits) // 8
        alignment = int(align) if align else size
        offset = -(-offset // alignment) * alignment
        found[name] = (offset, alignment)
        offset += size
    return found, offset


def _statement(text: str) -> Instruction:
    predicate, whole = None, text
    if text.startswith("@"):
        guard, text = text.split(None, 1)
        predicate = (guard.lstrip("@!"), "!" in guard)
    opcode, _, operands = text.partition(" ")
    return Instruction(predicate, tuple(opcode.split(".")), _split(operands), whole)


def parse(text: str) -> list[Kernel]:
    """Every kernel of a file, by its readable name.

    Raises:
        ValueError: there is something in it that no kernel of ours needs: local memory, a function, a global.
    """
    text = re.sub(r"//[^\n]*", "", text)
    if unknown := re.search(r"^\s*(\.visible\s+|\.weak\s+)?\.(local|func|global|const)\s[^\n]*", text, re.MULTILINE):
        raise ValueError(f"not supported: {unknown[0].strip()}")
    kernels = []
    for found in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{(.*?)\n\}", text, re.DOTALL):
        name, parameters, body = found.groups()
        shared = {
            m[3]: (int(m[1]), int(m[2]) // 8 * int(m[4] or 1))
            for m in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.\w(\d+)\s+([\w$]+)(?:\[(\d+)\])?\s*;", body)
        }
        instructions, labels = [], {}
        body = re.sub(r"([\w$]+):(?!:)", r"\1:;", body)
        for statement in body.split(";"):
            # Braces of their own lines are the scopes of inline assembly.
            statement = " ".join(re.sub(r"^\s*[{}]\s*$", "", statement, flags=re.MULTILINE).split())
            if statement.startswith("{") and not statement.endswith("}"):
                statement = statement[1:].strip()
            if statement.startswith("}"):
                statement = statement[1:].strip()
            if not statement or statement.startswith("."):
                continue
            if statement.endswith(":"):
                labels[statement[:-1]] = len(instructions)
            else:
                instructions.append(_statement(statement))
        kernels.append(Kernel(name, *_parameters(parameters), shared, instructions, labels))
    for kernel, name in zip(kernels, readable(k.name for k in kernels), strict=True):
        kernel.name = name
    return kernels
