"""Compares counts, and names the functions that grew."""

from __future__ import annotations

from .counts import Counts, PathCounts
from .paths import KINDS, SIZES, YARDSTICK, name_of

#: By which part a step may grow.
ALLOWED = 0.05
#: Functions that are named, of each language.
NAMED = 4
#: A function with less than this part of the growth is not named.
TELLING = 0.05


def growth(now: dict[str, int], then: dict[str, int]) -> list[tuple[str, int, int]]:
    """Return the functions that grew the most: name, before, now."""
    grown = [(name, then.get(name, 0), n) for name, n in now.items() if n > then.get(name, 0)]
    total = sum(n - before for _, before, n in grown)
    grown.sort(key=lambda row: (row[1] - row[2], row[0]))
    return [row for row in grown[:NAMED] if row[2] - row[1] >= TELLING * total]


def _lines(what: str, now: dict[str, int], then: dict[str, int]) -> list[str]:
    rows = growth(now, then)
    if not rows:
        return [f"  {what}: none grew"]
    return [
        f"  {what}:",
        *(
            f"    {n - before:+10,}  {name[:100]} ({f'{before:,} -> {n:,}' if before else 'new'})"
            for name, before, n in rows
        ),
    ]


def explain(path: str, now: PathCounts, then: PathCounts, against: str) -> str:
    """Return the sentences about a path that costs too much."""
    part = now.instructions / then.instructions - 1
    now, then = now.folded(), then.folded()
    return "\n".join(
        [
            f"{path}: {now.instructions:,} instructions a step, {then.instructions:,} {against}: {part:+.1%}, "
            f"expected at most {ALLOWED:+.0%}",
            *_lines("Python functions that execute more bytecodes", now.bytecodes, then.bytecodes),
            *_lines("C functions that execute more instructions", now.functions, then.functions),
        ]
    )


def table(now: Counts, then: Counts | None) -> str:
    """Return every path with what it costs, and the difference where there is something to compare with."""
    rows = []
    for path, counts in now.paths.items():
        before = then.paths.get(path) if then else None
        change = f"{counts.instructions / before.instructions - 1:+8.2%}" if before else "     new"
        rows.append(f"{path:30} {counts.instructions:12,} {sum(counts.bytecodes.values()):8,} {change if then else ''}")
    return "\n".join([f"{'a step of':30} {'instructions':>12} {'bytecodes':>9}", *rows])


def too_much(now: Counts, then: Counts, against: str) -> list[str]:
    """Return a message for each path that grew beyond what is allowed."""
    return [
        explain(path, counts, then.paths[path], against)
        for path, counts in now.paths.items()
        if path != YARDSTICK
        and path in then.paths
        and counts.instructions > (1 + ALLOWED) * then.paths[path].instructions
    ]


def per_tensor(counts: Counts, kind: str) -> dict[str, float] | None:
    """Return the bytecodes that each Python function executes for one more tensor; None where not both sizes are counted."""
    few, many = (counts.paths.get(name_of(kind, n)) for n in SIZES)
    if few is None or many is None:
        return None
    less, more = few.bytecodes, many.bytecodes
    return {name: (more.get(name, 0) - less.get(name, 0)) / (SIZES[1] - SIZES[0]) for name in {*less, *more}}


def loops(now: Counts, then: Counts, against: str) -> list[str]:
    """Return a message for each kind of step in which Python does more per tensor.

    Bytecodes repeat exactly, so that a loop is seen here even where its cost is less than what a step may grow by.
    """
    found = []
    for kind in KINDS:
        here, before = per_tensor(now, kind), per_tensor(then, kind)
        if here is None or before is None:
            continue
        n, allowed = sum(here.values()), (1 + ALLOWED) * sum(before.values())
        if n <= allowed + 1e-9:
            continue
        name = max(here, key=lambda name: here[name] - before.get(name, 0))
        found.append(
            f"{kind}: Python executes {n:.1f} bytecodes for each tensor, {sum(before.values()):.1f} {against}: a loop over "
            f"the parameters?\n  {here[name] - before.get(name, 0):+.1f}  {name}"
        )
    return found
