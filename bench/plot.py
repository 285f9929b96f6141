"""Draw a panel per case: one bar per peer in GB/s, and the limit of the machine as a line. The last panel is SVAG."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from .results import Results, Row, digits, short_reason

OURS, OTHERS, LIMIT, WRONG = "#1b7f5c", "#9aa5b1", "#c2410c", "#b91c1c"
JOBS = ("step", "step + statistics")
SVAG_JOBS = ("SVAG step",)


#: The height of a bar, and what title and axis of a panel need, in inches.
BAR, AROUND = 0.27, 1.15


def plot(results: Results, file: Path) -> None:
    """The cases with the tag "plot", one below the other, so that a page can show them in full width."""
    groups = [g for g, rows in results.groups.items() if "plot" in next(iter(rows.values())).tags]
    panels: list[tuple[str, str, tuple[str, ...], str]] = [(g, g, JOBS, "five-stream loop") for g in groups]
    of_pairs = [g for g in groups if any(row.job in SVAG_JOBS for row in results.groups[g].values())]
    panels += [(g, f"SVAG, {g}", SVAG_JOBS, "six-stream loop") for g in of_pairs[:1]]
    contents = []
    for group, _, jobs, _ in panels:
        rows = {name: row for name, row in results.groups[group].items() if row.job in (*jobs, "limit")}
        out = {p: why for p, why in results.left_out.get(group, {}).items() if results.jobs.get(p, JOBS[0]) in jobs}
        out = {p: why for p, why in out.items() if not why.startswith("not installed")}
        contents.append((rows, out))
    heights = [BAR * (sum(r.job != "limit" for r in rows.values()) + len(out)) + AROUND for rows, out in contents]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, sum(heights) + 0.8), squeeze=False, layout="constrained", height_ratios=heights
    )
    figure.get_layout_engine().set(w_pad=0.12)
    for (_, title, jobs, limit), (rows, out), axis in zip(panels, contents, axes.flat, strict=True):
        panel(axis, title, rows, out, jobs, limit)
    m = results.machine
    where = f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}"
    what = "Speed of one optimizer step: bytes that must move, over the median time"
    figure.suptitle(f"{what}\nin brackets: share of the limit; whiskers: quartiles\n{where}", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def panel(
    axis: Axes, title: str, rows: dict[str, Row], left_out: dict[str, str], jobs: tuple[str, ...], limit_name: str
) -> None:
    """Bars of each job, the fastest on top, numbers at the right edge; the limit as a line, or as a remark."""
    labels: list[str] = []
    edge = 1.05 * max((r.rate for r in rows.values() if r.job != "limit"), default=1.0)
    limit = rows.get(limit_name)
    if limit is not None and limit.rate < 2 * edge:
        edge = max(edge, limit.rate * 1.05)
        axis.axvline(limit.rate, color=LIMIT, ls="--", lw=1.5, zorder=3)
    at_edge = axis.get_yaxis_transform()
    for job in jobs:
        timed = sorted((r for r in rows.values() if r.job == job), key=lambda r: -r.rate)
        for row in timed:
            spread = [[row.rate - row.rate * row.seconds / row.high], [row.rate * row.seconds / row.low - row.rate]]
            colour = OURS if row.ours else OTHERS
            axis.barh(len(labels), row.rate, color=colour, xerr=spread, error_kw={"lw": 1, "ecolor": "#374151"})
            axis.text(1.01, len(labels), told(row), va="center", fontsize=9, transform=at_edge)
            labels.append(row.peer)
        if job != jobs[-1] and timed:
            axis.axhline(len(labels) - 0.5, color="#d1d5db", lw=1)
    for peer, reason in left_out.items():
        axis.text(edge * 0.012, len(labels), short_reason(reason), va="center", fontsize=9, color=WRONG)
        labels.append(peer)
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.set_ylim(len(labels) - 0.4, -0.6)  # downwards
    axis.set_xlabel("GB/s")
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    if limit is not None:
        far = "" if limit.rate <= edge else ", far to the right"
        text = f"{'limit' if far else 'dashed'}: {limit_name}"
        axis.set_title(f"{text}, {digits(limit.rate)} GB/s{far}", color=LIMIT, loc="right", fontsize=9)
    axis.set_xlim(0, edge)


def told(row: Row) -> str:
    share = row.fraction
    return digits(row.rate) if share is None or share < 0.1 else f"{digits(row.rate)} ({share:.0%})"
