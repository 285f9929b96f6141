"""python -m instructions [--write] [--json FILE]: fails where a step of a hot path costs 5 % more than it may, or has a new loop.

Compared with budgets.json, or, where it has none for this Python, torch and compiler, with a build of the parent commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from . import budgets, callgrind, compare, parent
from .counts import Counts, count

WRITE = "python -m instructions --write"


def baseline(now: Counts) -> tuple[Counts, str] | None:
    """Return what to compare with and its name, or None; says what it takes and why."""
    budget = budgets.read(now.build)
    reason = budgets.why_not(now, budget)
    if budget is not None and reason is None:
        return budget, "in the budget"
    try:
        revision = parent.commit()
    except parent.NoParent as why:
        print(f"instructions: skipped the comparison: {reason}, and no parent commit: {why}")
        return None
    print(f"instructions: {reason}; building the parent commit {revision[:12]}", flush=True)
    named = all(callgrind.has_names(counts.functions) for counts in now.paths.values())
    with parent.built(revision, named) as tree:
        return count(tree), f"in {revision[:12]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="instructions", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make what is counted now the budget of this build")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was counted")
    given = parser.parse_args(arguments)
    if reason := callgrind.missing():
        print(f"instructions: skipped: {reason}")
        return 0
    now = count()
    print(f"instructions: {now.build}")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(asdict(now), indent=1) + "\n")
    if given.write:
        print(compare.table(now, budgets.read(now.build)))
        budgets.write(now)
        return 0
    found = baseline(now)
    print(compare.table(now, found and found[0]))
    findings = [*compare.too_much(now, *found), *compare.loops(now, *found)] if found else []
    for finding in findings:
        print(f"\n{finding}", file=sys.stderr)
    if findings:
        print(f"\nWhere the cost is meant, {WRITE} makes it the budget; commit it with the change.", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
