"""The plot: a panel per case, a bar per peer in GB/s, the machine's own limit as a line. The last: SVAG, one case."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from .results import Results, Row, digits, short_reason

OURS, OTHERS, LIMIT, WRONG = "#1b7f5c", "#9aa5b1", "#c2410c", "#b91c1c"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # under a number that the limit's line would cross
JOBS = ("step", "step + statistics")
SVAG_JOBS = ("SVAG step",)


def plot(results: Results, file: Path) -> None:
    """The cases with the tag "plot", two panels a row."""
    groups = [g for g, rows in results.groups.items() if "plot" in next(iter(rows.values())).tags]
    panels: list[tuple[str, str, tuple[str, ...], str]] = [(g, g, JOBS, "five-stream loop") for g in groups]
    of_pairs = [g for g in groups if any(row.job in SVAG_JOBS for row in results.groups[g].values())]
    panels += [(g, f"SVAG, {g}", SVAG_JOBS, "six-stream loop") for g in of_pairs[:1]]
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(13, 5.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for (group, title, jobs, limit), axis in zip(panels, axes.flat, strict=False):
        wanted = {name: row for name, row in results.groups[group].items() if row.job in (*jobs, "limit")}
        out = results.left_out.get(group, {})
        panel(
            axis, title, wanted, {p: why for p, why in out.items() if results.jobs.get(p, JOBS[0]) in jobs}, jobs, limit
        )
    m = results.machine
    where = f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}"
    what = "One optimizer step: bytes that must move / median time (share of the limit); whiskers: quartiles"
    figure.suptitle(f"{what}\n{where}", fontsize=13)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def panel(
    axis: Axes, title: str, rows: dict[str, Row], left_out: dict[str, str], jobs: tuple[str, ...], limit_name: str
) -> None:
    """Bars of each job, fastest on top; the limit where it is in reach, else a remark at the edge."""
    labels: list[str] = []
    longest = max((r.rate for r in rows.values() if r.job != "limit"), default=1.0)
    for job in jobs:
        timed = sorted((r for r in rows.values() if r.job == job), key=lambda r: -r.rate)
        for row in timed:
            spread = [[row.rate - row.rate * row.seconds / row.high], [row.rate * row.seconds / row.low - row.rate]]
            colour = OURS if row.ours else OTHERS
            axis.barh(len(labels), row.rate, color=colour, xerr=spread, error_kw={"lw": 1, "ecolor": "#374151"})
            reach = row.rate * row.seconds / row.low
            axis.text(reach + longest * 0.012, len(labels), told(row), va="center", fontsize=8.5, bbox=PAPER)
            labels.append(row.peer)
        if job != jobs[-1] and timed:
            axis.axhline(len(labels) - 0.5, color="#d1d5db", lw=1)
    for peer, reason in left_out.items():
        if not reason.startswith("not installed"):
            axis.text(longest * 0.012, len(labels), short_reason(reason), va="center", fontsize=8.5, color=WRONG)
            labels.append(peer)
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.set_ylim(len(labels) + 0.3, -0.8)  # downwards; a line more for the limit's name
    axis.set_xlabel("GB/s")
    axis.set_title(title, fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    limit = rows.get(limit_name)
    edge = longest * 1.34
    if limit is not None and limit.rate < 2 * longest:
        edge = max(edge, limit.rate * 1.1)
        axis.axvline(limit.rate, color=LIMIT, ls="--", lw=1.5, zorder=0)
        at, where = limit.rate, "right"
        text = f"limit: {limit_name}, {digits(limit.rate)} GB/s "
    elif limit is not None:
        at, where = edge, "right"
        text = f"limit: {limit_name}, {digits(limit.rate)} GB/s, far to the right →"
    if limit is not None:
        axis.text(at, len(labels) + 0.1, text, color=LIMIT, ha=where, va="bottom", fontsize=8.5)
    axis.set_xlim(0, edge)


def told(row: Row) -> str:
    share = row.fraction
    return digits(row.rate) if share is None or share < 0.1 else f"{digits(row.rate)} ({share:.0%})"
