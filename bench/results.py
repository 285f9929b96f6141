"""Reads a results file into plain rows. Only this file knows the layout of the JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One peer, or one limit (job "limit"), on one case. Seconds are of one step."""

    group: str
    job: str
    peer: str
    seconds: float
    low: float
    high: float
    rate: float | None  # GB/s, where a step must move a certain number of bytes
    fraction: float | None
    anchor: str | None
    times: float | None
    samples: int
    peak: float | None  # megabytes
    tensors: int
    coordinates: int
    dtype: str
    tags: tuple[str, ...]

    @property
    def ours(self) -> bool:
        return self.peer.startswith("normkern")


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    commit: str
    time: str
    quick: bool
    build: dict[str, Any]
    groups: dict[str, dict[str, Row]]
    left_out: dict[str, dict[str, str]]
    jobs: dict[str, str]  # peer -> job; a file may lack those of peers that were left out


def load(path: Path) -> Results:
    document = json.loads(path.read_text())
    groups: dict[str, dict[str, Row]] = {}
    left_out: dict[str, dict[str, str]] = {}
    for entry in document["benchmarks"]:
        row = read_row(entry)
        groups.setdefault(row.group, {})[row.peer] = row
    for entry in document["normkern"]["left_out"]:
        left_out.setdefault(entry["group"], {})[entry["peer"]] = entry["reason"]
    jobs = {entry["peer"]: entry["job"] for entry in document["normkern"]["left_out"] if "job" in entry}
    jobs |= {row.peer: row.job for rows in groups.values() for row in rows.values()}
    commit = document["commit_info"]["id"][:10] + (" + changes" if document["commit_info"]["dirty"] else "")
    more = document["normkern"]
    return Results(
        document["machine_info"],
        commit,
        document["datetime"][:10],
        more["quick"],
        more.get("build", {}),
        groups,
        left_out,
        jobs,
    )


def read_row(entry: dict[str, Any]) -> Row:
    stats, info = entry["stats"], entry["extra_info"]
    return Row(
        group=entry["group"],
        job=info["job"],
        peer=info["peer"],
        seconds=stats["median"],
        low=stats["q1"],
        high=stats["q3"],
        rate=info.get("gigabytes_per_second"),
        fraction=info.get("fraction_of_limit"),
        anchor=info.get("anchor"),
        times=info.get("times_of_anchor"),
        samples=stats["rounds"],
        peak=info.get("peak_megabytes"),
        tensors=info["tensors"],
        coordinates=info["coordinates"],
        dtype=info["dtype"],
        tags=tuple(info["tags"]),
    )


def digits(x: float) -> str:
    """Return x with three significant digits, which is as exact as any run: 0.440, 7.80, 318, 1290."""
    return f"{x:#.3g}".rstrip(".") if 0 < x < 999.5 else f"{x:.0f}"


def short_reason(reason: str) -> str:
    """Return the reason's first words, for a table's cell: "wrong", "fails" or "not installed"."""
    return reason.split(":")[0]
