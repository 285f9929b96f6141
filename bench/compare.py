"""What got slower between two results files: exit code 1 if a step of normkern's did, or stopped being right.

python -m bench.compare old.json new.json [--threshold 0.10] [--across-machines]

Absolute times of two runs say little. A machine has good and bad minutes, and a bad one slows a loop that is limited by
memory differently from one that is limited by arithmetic or Python. So the yardstick are the others, peers and limits,
whose code is the same in both runs. The middle of their new / old ratios on a case is what the machine did; the band
from the lowest to the highest tenth of them is how well that is known. A step has changed if its own ratio, over that
middle, exceeds the threshold and lies outside the band, and the quartiles of its samples, over the middle too, do not
overlap. Changes of the others are reported by the same rule and fail nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .results import Results, load

#: What must agree for two runs to be of one machine; other differences are printed.
IDENTITY = ("cpu", "cores", "threads", "system", "machine")


@dataclass(frozen=True)
class Change:
    """One peer on one case. ratio: new / old over what the machine did; clear: beyond both kinds of spread."""

    group: str
    peer: str
    ours: bool
    ratio: float
    clear: bool
    machine: float
    band: tuple[float, float]

    def verdict(self, threshold: float) -> str:
        if 1 / (1 + threshold) <= self.ratio <= 1 + threshold:
            return "same"
        if not self.clear:
            return "noise"
        return "slower" if self.ratio > 1 else "faster"


def differences(old: Results, new: Results) -> dict[str, tuple[object, object]]:
    """Return the entries of the machine's description that differ."""
    keys = dict.fromkeys([*old.machine, *new.machine])
    pairs = {key: (old.machine.get(key), new.machine.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def changes(old: Results, new: Results) -> Iterator[Change]:
    for group, rows in new.groups.items():
        before = old.groups.get(group, {})
        ratios = {peer: row.seconds / before[peer].seconds for peer, row in rows.items() if peer in before}
        others = [ratio for peer, ratio in ratios.items() if not rows[peer].ours]
        if not others:
            continue
        middle, band = statistics.median(others), tenths(others)
        for peer, ratio in ratios.items():
            row, was = rows[peer], before[peer]
            if row.job == "limit":
                continue
            apart = row.low / middle > was.high or row.high / middle < was.low
            clear = apart and not band[0] <= ratio <= band[1]
            yield Change(group, peer, row.ours, ratio / middle, clear, middle, band)


def tenths(values: list[float]) -> tuple[float, float]:
    """Return the band without the lowest and the highest tenth."""
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def no_longer_right(old: Results, new: Results) -> Iterator[tuple[str, str, str]]:
    """Yield (case, peer, reason) for each peer that the old run timed and the new one found wrong."""
    for group, out in new.left_out.items():
        for peer, reason in out.items():
            if peer in old.groups.get(group, {}) and not reason.startswith("not installed"):
                yield group, peer, reason


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.10, help="a change below it is none (default: 0.10)")
    parser.add_argument("--across-machines", action="store_true", help="compare although the machines differ")
    given = parser.parse_args(arguments)
    old, new = load(given.old), load(given.new)
    console = Console()
    console = console if console.is_terminal else Console(width=120)

    differing = differences(old, new)
    for key, (was, now) in differing.items():
        console.print(f"{key}: {was} -> {now}", style="dim", highlight=False)
    if any(key in differing for key in IDENTITY) and not given.across_machines:
        console.print("These runs are of different machines: nothing is compared without --across-machines.")
        return 2

    found = list(changes(old, new))
    if not found:
        console.print("No peer was timed on one case in both runs: nothing to compare.")
        return 2
    table = Table(title=f"{old.commit} ({old.time}) -> {new.commit} ({new.time})", title_justify="left")
    for column in ("case", "step", "new / old", "the machine", "verdict"):
        table.add_column(column, justify="right" if column in ("new / old", "the machine") else "left", no_wrap=True)
    for change in sorted(found, key=lambda c: -c.ratio):
        verdict = change.verdict(given.threshold)
        if verdict != "same":
            style = {"slower": "red", "faster": "green"}.get(verdict, "dim")
            low, high = change.band
            cells = (
                change.group,
                change.peer,
                f"{change.ratio:.2f}",
                f"{change.machine:.2f} ({low:.2f} - {high:.2f})",
                verdict,
            )
            table.add_row(*cells, style=("bold " if change.ours else "") + style)
    if table.row_count:
        console.print(table)
    wrong = list(no_longer_right(old, new))
    for group, peer, reason in wrong:
        console.print(f"{peer} on {group} was right and is not: {reason}", style="red", highlight=False)
    bad = [c for c in found if c.ours and c.verdict(given.threshold) == "slower"]
    bad_numbers = [peer for _, peer, _ in wrong if peer.startswith("normkern")]
    summary = f"{len(found)} compared, {len(bad)} of normkern's slower by more than {given.threshold:.0%}"
    console.print(summary + (f", {len(bad_numbers)} no longer right." if bad_numbers else "."), highlight=False)
    return 1 if bad or bad_numbers else 0


if __name__ == "__main__":
    sys.exit(main())
