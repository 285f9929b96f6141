"""The output of the doctor: a line per check or group of checks as they finish, then cures and counts; or JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any, get_args

from . import examination
from .finding import Check, Finding, Verdict, skipped
from .info import info

#: ANSI codes of the verdicts, for terminals.
_COLOURS = {"ok": "32", "note": "33", "skipped": "2", "failed": "1;31"}
_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
#: After so many seconds the checks that share a line are skipped, unless each is to have its own.
_SECONDS = 10.0


def show(brought_by: dict[str, str], as_json: bool, verbose: bool = False) -> bool:
    """Run all checks and print what they find. True if nothing failed.

    `brought_by`: see `import_modules`. `verbose` prints a line for every check.
    """
    start = time.perf_counter()
    lines = examination.checks(brought_by)
    findings = _examined_for_json(lines, start) if as_json else _print_lines(lines, verbose)
    if not as_json:
        _print_cures(findings)
        counts = {v: sum(f.verdict == v for _, f in findings) for v in _VERDICTS}
        text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        more = "" if verbose else " (-v prints every check)"
        print(f"\n{len(findings)} checks: {text}, in {time.perf_counter() - start:.1f} s{more}")
    return not any(f.verdict == "failed" for _, f in findings)


def _examined_for_json(lines: Sequence[Check], start: float) -> list[tuple[Check, Finding]]:
    findings = list(examination.examine(lines))
    passed = not any(f.verdict == "failed" for _, f in findings)
    result: dict[str, Any] = {"passed": passed, "seconds": round(time.perf_counter() - start, 3)}
    result["checks"] = [
        {"name": c.name, "verdict": f.verdict, "measured": f.measured, "cure": f.cure} for c, f in findings
    ]
    print(json.dumps(result | {"info": info()}, indent=2))
    return findings


def _print_lines(lines: Sequence[Check], verbose: bool) -> list[tuple[Check, Finding]]:
    """Run the checks, and print the lines of the table; each begins with its name before the check runs."""

    deadline = time.perf_counter() + _SECONDS

    def title(check: Check) -> str:
        return check.name if verbose else check.group or check.name

    width = max(len(title(check)) for check in lines)
    findings = []
    for name, members in groupby(lines, title):
        print(f"{name:{width}}  ", end="", flush=True)
        found = [(check, _examined(check, math.inf if verbose else deadline)) for check in members]
        findings += found
        if len(found) == 1:
            _print_finding(found[0][1], width + 2)
            continue
        _print_finding(_summary([f for _, f in found]), width + 2)
        for check, f in found:
            if f.verdict in ("note", "failed"):
                print(f"  {check.name}  ", end="")
                _print_finding(f, len(check.name) + 4)
    return findings


def _examined(check: Check, deadline: float) -> Finding:
    if check.group and time.perf_counter() > deadline:
        return skipped("out of time")
    ((_, finding),) = examination.examine([check])
    return finding


def _summary(findings: Sequence[Finding]) -> Finding:
    """Return what the line of a group says."""
    worst = max((f.verdict for f in findings), key=_VERDICTS.index)
    right, total = sum(f.verdict == "ok" for f in findings), len(findings)
    text = f"all {total} checks are right" if right == total else f"{right} of {total} checks are right"
    if late := sum(f == skipped("out of time") for f in findings):
        text += f", {late} skipped because the machine is busy (-v takes the time)"
    return Finding(worst, text)


def _print_finding(finding: Finding, column: int) -> None:
    """Print verdict and measurement behind a name, from `column` on; on a terminal no line is cut within a word."""
    verdict, text = f"{finding.verdict:7}", finding.measured
    if sys.stdout.isatty():
        indent = column + len(verdict) + 2
        room = max(40, shutil.get_terminal_size().columns - indent)
        text = ("\n" + " " * indent).join(textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False))
        if "NO_COLOR" not in os.environ:
            verdict = f"\x1b[{_COLOURS[finding.verdict]}m{verdict}\x1b[0m"
    print(f"{verdict}  {text}", flush=True)


def _print_cures(findings: Sequence[tuple[Check, Finding]]) -> None:
    """Print each cure once, with the names of the checks that it may repair."""
    broken: dict[str, list[str]] = {}
    for check, f in findings:
        if f.cure is not None:
            broken.setdefault(f.cure, []).append(check.name)
    for cure, names in broken.items():
        print(f"\n{', '.join(names)}: {cure}")
