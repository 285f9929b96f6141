"""Shows a results file: as tables on the terminal, as the tables of docs/benchmarks.md, and as a plot.

python -m bench.report bench/results/bench.json --readme docs/benchmarks.md --plot docs/bench.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .results import Results, Row, digits, load, short_reason

MARKS = "<!-- bench:begin -->", "<!-- bench:end -->"
ADAMW_MARKS = "<!-- bench-adamw:begin -->", "<!-- bench-adamw:end -->"
SVAG_MARKS = "<!-- bench-svag:begin -->", "<!-- bench-svag:end -->"
NOISE_MARKS = "<!-- bench-noise:begin -->", "<!-- bench-noise:end -->"

#: Columns on the terminal, for steps over tensors and for networks.
STEP_COLUMNS = ("GB/s", "of the limit", "x anchor")
NET_COLUMNS = ("peak MB", "x plain")

#: Columns of the table in docs/benchmarks.md after the time of normkern: peer -> heading.
COLUMNS = {
    "normkern tensor": "stats tensor",
    "normkern row": "stats row",
    "normkern exponential": "exponential decay",
    "torch fused": "torch fused",
    "torch compile": "torch compile",
    "torch default": "torch default",
    "reference": "eager",
    "torch fused + norms": "torch fused + norms",
    "torch compile + norms": "torch compile + norms",
    "five-stream loop": "five-stream loop",
}
#: The same for the table whose rows are the cases with AdamW steps.
ADAMW_COLUMNS = {
    "normkern AdamW tensor": "stats tensor",
    "torch AdamW fused": "torch fused",
    "torch AdamW compile": "torch compile",
    "torch AdamW foreach": "torch foreach",
    "seven-stream loop": "seven-stream loop",
}
#: The same for the table whose rows are the cases with SVAG steps.
SVAG_COLUMNS = {
    "combine + torch fused + sums": "combine, torch fused, sums",
    "lerp + torch fused + sums": "lerp, torch fused, sums",
    "combine + torch compile + sums": "the first, compiled",
    "torch compile by hand + sums": "all by hand, compiled",
    "six-stream loop": "six-stream loop",
}
#: The same for the table whose rows are networks.
NOISE_COLUMNS = {
    "normkern nsr": "nsr",
    "normkern norms": "norms",
    "normkern norms + variance": "norms + variance",
    "Opacus ghost": "Opacus ghost, norms",
    "BackPACK L2": "BackPACK, norms",
    "BackPACK L2 + Variance": "BackPACK, both",
    "Opacus hooks": "Opacus hooks, both",
    "torch.func": "torch.func, both",
}


def scaled(seconds: float) -> str:
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if seconds * f >= 1 or u == "us")
    return f"{digits(seconds * factor)} {unit}"


def show(console: Console, results: Results) -> None:
    """Print one table per case: limits, then the peers of each job, fastest first, then those left out and why."""
    for group in dict.fromkeys([*results.groups, *results.left_out]):
        rows = results.groups.get(group, {})
        some = next(iter(rows.values()), None)
        size = f": {some.tensors} tensor{'s' * (some.tensors > 1)}, {some.coordinates:,} coordinates" if some else ""
        table = Table(title=f"{group}{size}", title_justify="left")
        table.add_column("step", no_wrap=True)
        of_net = bool(some and some.rate is None)
        for column in ("median", "quartiles", "turns", *(NET_COLUMNS if of_net else STEP_COLUMNS)):
            table.add_column(column, justify="right", no_wrap=True)
        job = ""
        for row in sorted(rows.values(), key=lambda r: (r.job != "limit", r.job, r.seconds)):
            if row.job != job:
                table.add_section()
                job = row.job
            table.add_row(*cells(row), style="bold" if row.ours else None)
        table.add_section()
        for peer, reason in results.left_out.get(group, {}).items():
            table.add_row(peer, f"[red]{short_reason(reason)}[/]")
        console.print(table)
    reasons = {f"{peer}, {group}: {why}" for group, out in results.left_out.items() for peer, why in out.items()}
    for line in sorted(reasons):
        console.print(line, style="dim", highlight=False)
    if results.build:
        console.print(results.build)


def cells(row: Row) -> list[str]:
    times = "" if row.times is None else f"{row.times:.2f}"
    spread = f"{scaled(row.low)} - {scaled(row.high)}"
    first = [row.peer, scaled(row.seconds), spread, str(row.samples)]
    if row.rate is None:
        return [*first, "" if row.peak is None else digits(row.peak), times]
    fraction = "" if row.fraction is None else f"{row.fraction:.0%}" if row.fraction >= 0.01 else "< 1%"
    return [*first, digits(row.rate), fraction, times]


def readme_table(results: Results) -> str:
    """Return the cases as Markdown: time and rate of normkern, and multiples of it for peers. Empty without cases."""
    lines = table_head("case", "normkern", "GB/s", *COLUMNS.values())
    without_rows = len(lines)
    for group, rows in results.groups.items():
        if ours := rows.get("normkern"):
            rate = digits(ours.rate or 0.0)
            lines.append(table_row(group, scaled(ours.seconds), rate, *times(results, ours, COLUMNS)))
    legend = f"After GB/s: times normkern's step. -: not measured. {where(results)}"
    return "\n".join([*lines, "", legend]) if len(lines) > without_rows else ""


def adamw_table(results: Results) -> str:
    """Return the AdamW steps as Markdown: time of normkern, and multiples of it for peers. Empty without cases."""
    lines = table_head("case", "normkern AdamW", *ADAMW_COLUMNS.values())
    without_rows = len(lines)
    for group, rows in results.groups.items():
        if ours := rows.get("normkern AdamW"):
            lines.append(table_row(group, scaled(ours.seconds), *times(results, ours, ADAMW_COLUMNS)))
    legend = f"After its time: times normkern's AdamW. {where(results)}"
    return "\n".join([*lines, "", legend]) if len(lines) > without_rows else ""


def svag_table(results: Results) -> str:
    """Return the SVAG steps as Markdown: time of normkern, also over that of its plain step, and of the peers over it.

    Empty without cases.
    """
    lines = table_head("case", "normkern SVAG", "x SGD step", *SVAG_COLUMNS.values())
    without_rows = len(lines)
    for group, rows in results.groups.items():
        if ours := rows.get("normkern SVAG"):
            plain = digits(ours.seconds / rows["normkern"].seconds) if "normkern" in rows else "-"
            lines.append(table_row(group, scaled(ours.seconds), plain, *times(results, ours, SVAG_COLUMNS)))
    legend = f"x SGD step: times normkern's step from one gradient; after it: times normkern's SVAG. {where(results)}"
    return "\n".join([*lines, "", legend]) if len(lines) > without_rows else ""


def noise_table(results: Results) -> str:
    """Return the per-sample statistics as Markdown: multiples of a plain forward and backward, and peak megabytes.

    Empty without cases.
    """
    lines = table_head("network", "forward + backward", *NOISE_COLUMNS.values())
    without_rows = len(lines)
    for group, rows in results.groups.items():
        if plain := rows.get("plain"):
            theirs = zip(times(results, plain, NOISE_COLUMNS), NOISE_COLUMNS, strict=True)
            cells = [f"{ratio}{peak_of(rows.get(peer))}" for ratio, peer in theirs]
            lines.append(table_row(group, scaled(plain.seconds) + peak_of(plain), *cells))
    legend = f"Times a plain forward and backward; peak memory beyond model and batch. {where(results)}"
    return "\n".join([*lines, "", legend]) if len(lines) > without_rows else ""


def peak_of(row: Row | None) -> str:
    return "" if row is None or row.peak is None else f" ({digits(row.peak)} MB)"


def table_head(*columns: str) -> list[str]:
    return [table_row(*columns), "|---|" + "--:|" * (len(columns) - 1)]


def table_row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def times(results: Results, ours: Row, peers: Iterable[str]) -> list[str]:
    """Return how many times longer than `ours` each peer took on the same case, or why that is not known."""
    rows, out = results.groups[ours.group], results.left_out.get(ours.group, {})
    return [
        digits(rows[peer].seconds / ours.seconds) if peer in rows else short_reason(out.get(peer, "")) or "-"
        for peer in peers
    ]


def where(results: Results) -> str:
    m = results.machine
    return f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}, commit {results.commit}."


def write_between_marks(file: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    begin, end = marks
    before = file.read_text()
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ValueError(f"{file}: expected one {begin} and after it one {end}")
    head, rest = before.split(begin)
    file.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def publish(document: object, text: str, marks: tuple[str, str], file: Path | None, page: Path | None) -> None:
    """Write results as JSON into a file, and their table into a page between its marks."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n")
    if page:
        write_between_marks(page, text, marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("results", type=Path, help="JSON of a run")
    parser.add_argument("--readme", type=Path, help="write the short tables into this file, between its marks")
    parser.add_argument("--plot", type=Path, help="write the plot there")
    arguments = parser.parse_args()
    results = load(arguments.results)
    console = Console()
    # When the output is a file, rich would cut the tables at 80 columns.
    show(console if console.is_terminal else Console(width=120), results)
    if arguments.readme:
        # A results file with a part of the benchmarks leaves the other tables as they are.
        tables = (
            (readme_table, MARKS), (adamw_table, ADAMW_MARKS), (svag_table, SVAG_MARKS), (noise_table, NOISE_MARKS)
        )  # fmt: skip
        for table, marks in ((make(results), marks) for make, marks in tables):
            if table and any(mark in arguments.readme.read_text() for mark in marks):
                write_between_marks(arguments.readme, table, marks)
    if arguments.plot:
        from .plot import plot

        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
