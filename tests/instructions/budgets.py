"""The budgets: what a step of each path may cost, for each build that was counted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from .counts import Counts, PathCounts
from .paths import YARDSTICK

FILE = Path(__file__).with_name("budgets.json")
#: By how much the interpreter itself may differ: more is another build of the same version of Python.
SAME_INTERPRETER = 0.02


def read(build: str, file: Path = FILE) -> Counts | None:
    """Return the budget of a build, or None."""
    found = json.loads(file.read_text()).get(build) if file.exists() else None
    return found and Counts(build, {path: PathCounts(**counts) for path, counts in found.items()})


def write(counts: Counts, file: Path = FILE) -> None:
    """Replace the budget of one build; those of others stay. Each path is a line, so that a change of one is seen."""
    all_ = json.loads(file.read_text()) if file.exists() else {}
    all_[counts.build] = {path: asdict(c.folded()) for path, c in counts.paths.items()}
    builds = (
        f"{json.dumps(build)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in paths.items()) + "\n}"
        for build, paths in sorted(all_.items())
    )
    file.write_text("{\n" + ",\n".join(builds) + "\n}\n")


def why_not(counts: Counts, budget: Counts | None) -> str | None:
    """Return why a budget says nothing about these counts, or None."""
    if budget is None:
        return f"no budget for {counts.build}"
    now, then = (c.paths[YARDSTICK].instructions for c in (counts, budget))
    if abs(now / then - 1) > SAME_INTERPRETER:
        return (
            f"the budget for {counts.build} is of another interpreter: {now:,} instructions for what took it {then:,}"
        )
    return None
