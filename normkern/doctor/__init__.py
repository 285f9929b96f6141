"""Is normkern right on this machine: `python -m normkern doctor`."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import ops
from . import environment, machine, numbers, samples, threads
from .finding import Check, Finding, failed
from .info import console, info

__all__ = ["Check", "Finding", "checks", "examine", "import_modules", "show"]


def import_modules(names: Sequence[str]) -> dict[str, str]:
    """Import modules of the user's; the OpenMP runtimes that they loaded: file -> module.

    Raises:
        ImportError: a module cannot be imported, for whatever reason.
    """
    brought_by: dict[str, str] = {}
    for name in names:
        before = machine.openmp_runtimes() or []
        _import(name)
        brought_by |= {file: name for file in machine.openmp_runtimes() or [] if file not in before}
    return brought_by


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ImportError(
            f"expected a module that can be imported, got {name!r} ({type(error).__name__}: {error})"
        ) from error


def checks(brought_by: dict[str, str] | None = None) -> list[Check]:
    """Every line of the table, in order."""
    return [*environment.checks(brought_by or {}), *threads.checks(), *numbers.checks(), *samples.checks()]


def examine(
    lines: Sequence[Check], before: Callable[[Check], object] = lambda check: None
) -> Iterator[tuple[Check, Finding]]:
    """Run the checks one after the other, each with the ISA level and threads that were selected; `before` is told.

    A check that raises has failed.
    """
    for check in lines:
        before(check)
        with _as_it_was():
            try:
                finding = check.examine()
            except Exception as error:
                sentence = " ".join(str(error).split())
                finding = failed(
                    f"{type(error).__name__}: {sentence}",
                    "the check itself broke: report it with what `python -m normkern doctor --json` prints",
                )
        yield check, finding


@contextmanager
def _as_it_was() -> Iterator[None]:
    isa, count = ops.isa(), torch.get_num_threads()
    try:
        yield
    finally:
        ops.select_isa(isa)
        torch.set_num_threads(count)


def show(brought_by: dict[str, str], as_json: bool) -> bool:
    """Examine, and print a table, or JSON, which needs no rich. True if nothing failed."""
    start = time.perf_counter()
    if as_json:
        findings = list(examine(checks(brought_by)))
        passed = not any(f.verdict == "failed" for _, f in findings)
        result: dict[str, Any] = {"passed": passed, "seconds": round(time.perf_counter() - start, 3)}
        result["checks"] = [
            {"name": c.name, "verdict": f.verdict, "measured": f.measured, "cure": f.cure} for c, f in findings
        ]
        print(json.dumps(result | {"info": info()}, indent=2))
        return passed
    return _show_table(brought_by, start)


def _show_table(brought_by: dict[str, str], start: float) -> bool:
    from rich.table import Table
    from rich.text import Text

    output = console()
    table = Table(pad_edge=False, box=None)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("measured", overflow="fold")
    colours = {"ok": "green", "note": "yellow", "skipped": "dim", "failed": "bold red"}
    findings = []
    with output.status("") as status:  # says nothing where there is no terminal
        for check, f in examine(checks(brought_by), lambda check: status.update(check.name)):
            findings.append((check, f))
            table.add_row(check.name, Text(f.verdict, style=colours[f.verdict]), Text(f.measured))
    output.print(table)
    broken: dict[str, list[str]] = {}  # cure -> whom it would help
    for check, f in findings:
        if f.cure is not None:
            broken.setdefault(f.cure, []).append(check.name)
    for cure, names in broken.items():
        output.print(Text(f"\n{', '.join(names)}: {cure}"), soft_wrap=True)
    counts = {v: sum(f.verdict == v for _, f in findings) for v in colours}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    output.print(f"\n{said}, in {time.perf_counter() - start:.1f} s")
    return not broken
