"""`Paper`: runs, a judge of their results, and the command line that every paper's file has."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

import normkern

from . import report
from .claims import Claim
from .figures import Figures
from .runs import Results, Run, run_all

ROOT = Path(__file__).parents[2]
FULL, QUICK = ROOT / "experiments" / "papers" / "results", ROOT / "build" / "papers"


class Scale(NamedTuple):
    """How much to run, and on which data."""

    quick: bool = False
    data: str | None = None

    def pick(self, quick: Any, full: Any) -> Any:
        """Return one of the two."""
        return quick if self.quick else full


class Table(NamedTuple):
    """A table of the report: its title, what to know about it, and rows of text, the first with the heads."""

    title: str
    note: str
    rows: list[tuple[str, ...]]


def _no_tables(results: Results) -> list[Table]:
    return []


@dataclass(frozen=True)
class Paper:
    """One of the papers.

    Attributes:
        name: of its module, and of its files.
        doc: the module's: the claims, and where they stand in the paper.
        runs: what is to be run.
        judge: claims from results, with figures.
        tables: further tables for the report, from results.
    """

    arxiv: str
    name: str
    title: str
    authors: str
    doc: str
    runs: Callable[[Scale], list[Run]]
    judge: Callable[[Results, Figures], list[Claim]]
    tables: Callable[[Results], list[Table]] = _no_tables


def options(description: str) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a minute each, into build/papers")
    parser.add_argument("--data", metavar="FOLDER", help="CIFAR-10 in torchvision's layout; default: the digits")
    parser.add_argument("--out", type=Path, help=f"default: {FULL.relative_to(ROOT)}, or build/papers with --quick")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each; 0: in this one")
    return parser.parse_args()


def reproduce(papers: Sequence[Paper], given: argparse.Namespace) -> bool:
    """Run what has not been run yet, print each claim's line, and write JSON, figures and report.

    Returns:
        Whether all claims passed.
    """
    scale = Scale(given.quick, given.data)
    out: Path = given.out or (QUICK if given.quick else FULL)
    out.mkdir(parents=True, exist_ok=True)
    console, passed = Console(), True
    for paper in papers:
        begin = time.monotonic()
        results = run_all(
            paper.runs(scale), out / f"{paper.name}.jsonl", workers=given.workers, title=paper.name, console=console
        )
        claims = paper.judge(results, Figures(out, paper.name))
        for claim in claims:
            print(claim, flush=True)
            passed &= claim.passed
        document = {
            "arxiv": paper.arxiv, "title": paper.title, "authors": paper.authors, "doc": paper.doc,
            "quick": scale.quick, "data": "CIFAR-10" if scale.data else "scikit-learn's digits",
            "runs": len(results.records),
            "compute_seconds": round(results.seconds), "wall_seconds": round(time.monotonic() - begin),
            "versions": versions(), "claims": [claim.to_dict() for claim in claims],
            "tables": [table._asdict() for table in paper.tables(results)],
        }  # fmt: skip
        (out / f"{paper.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    for path in report.write(out):
        console.print(f"wrote {path}")
    return passed


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on, without the name of the machine."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "normkern": normkern.__version__}
    found |= {name: version(name) for name in ("numpy", "scipy", "scikit-learn", "matplotlib")}
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        found["commit"] = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "-"
    return found | {"processor": platform.machine(), "system": sys.platform}


def main(name: str) -> None:
    """Reproduce one paper, for its file as a script. A claim that fails is a result, not an error.

    The module is imported once more by its name, because the functions of a script have other names than those that
    `make papers` runs.
    """
    paper: Paper = import_module(f"{__package__}.{name}").PAPER
    reproduce([paper], options(paper.title))
