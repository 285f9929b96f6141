"""Interleaved timing: the turns of all peers are spread over the same seconds, in an order that is shuffled each round.

A machine's speed drifts by the second. Medians of interleaved turns share the drift, so it cancels in their
ratios.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .arrays import Step
from .cases import Case, dtype_name
from .jobs import JOBS, Job
from .limits import LIMITS, limit_bytes, limit_steps
from .peers import PEERS, Peer

#: Seconds: a turn is steps for at least TURN, after steps for at least SETTLE that fill the caches and let the
#: threads of the one before fall asleep. A step of LONG and more does both by itself.
TURN, SETTLE, LONG = 2e-3, 1e-3, 0.05
#: Turns: a slow peer gets as many as its share of the time allows, yet never fewer than LEAST.
LEAST, MOST = 5, 101

Clock = Callable[[], float]


def plan(costs: dict[str, float], seconds: float, seed: int = 0, least: int = LEAST) -> list[list[str]]:
    """Plan the rounds from {name: seconds of a turn}: the names that have a turn in each, in a shuffled order.

    Each gets the same share of the time, so a slow peer has fewer turns; they are spread evenly over the rounds.
    """
    share = seconds / len(costs)
    turns = {name: max(least, min(MOST, int(share / cost))) for name, cost in costs.items()}
    rounds, shuffle = max(turns.values()), random.Random(seed)
    planned = []
    for r in range(rounds):
        order = [name for name, n in turns.items() if (r + 1) * n // rounds > r * n // rounds]
        shuffle.shuffle(order)
        planned.append(order)
    return planned


def against(plain: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Return quartiles of the seconds of each, and its median over that of `plain`."""
    quartiles = {who: statistics.quantiles(x, n=4) for who, x in samples.items()}
    return {
        "seconds": {who: {"q1": a, "median": b, "q3": c} for who, (a, b, c) in quartiles.items()},
        "times_of_plain": {who: b / quartiles[plain][1] for who, (_, b, _) in quartiles.items()},
    }


def settle(step: Callable[[], object], clock: Clock) -> None:
    begin = clock()
    step()
    while clock() - begin < SETTLE:
        step()


def timed(step: Callable[[], object], repeats: int, clock: Clock) -> float:
    """Return the seconds per step."""
    begin = clock()
    for _ in range(repeats):
        step()
    return (clock() - begin) / repeats


def interleave(
    steps: dict[str, Callable[[], object]], seconds: float, clock: Clock = time.perf_counter, least: int = LEAST
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return name -> seconds per step, a number for each turn; and name -> steps in a turn."""
    costs, repeats, long = {}, {}, set()
    for name, step in steps.items():
        step()  # compiles, allocates
        once = timed(step, 1, clock)
        if once < TURN:  # one step alone says little of a short one
            settle(step, clock)
            once = timed(step, max(1, min(100, int(TURN / 4 / once))), clock)
        if once >= LONG:
            long.add(name)
        repeats[name] = max(1, math.ceil(TURN / once))
        costs[name] = repeats[name] * once + (0 if name in long else max(once, SETTLE))
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for order in plan(costs, seconds, least=least):
            for name in order:
                if name not in long:
                    settle(steps[name], clock)
                times[name].append(timed(steps[name], repeats[name], clock))
    finally:
        if was_enabled:
            gc.enable()
    return times, repeats


@dataclass
class Measured:
    """One case: the times of peers and limits, and why other peers were not timed."""

    case: Case
    samples: dict[str, list[float]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)  # peer -> its job; limits are not in it
    left_out: dict[str, str] = field(default_factory=dict)  # peer -> "wrong: …" or "not installed: …"

    def info(self, name: str) -> dict[str, Any]:
        """Return what pytest-benchmark does not know about one peer or limit."""
        case, median = self.case, statistics.median(self.samples[name])
        about: dict[str, Any] = {
            "case": case.name,
            "dtype": dtype_name(case.dtype),
            "tensors": len(case.shapes),
            "coordinates": case.coordinates,
            "tags": sorted(case.tags),
            "peer": name,
            "steps_per_turn": self.repeats[name],
        }
        if name in LIMITS:
            moved = LIMITS[name][1] * limit_bytes(case.array_bytes)
            return {**about, "job": "limit", "bytes_moved": moved, "gigabytes_per_second": moved / median / 1e9}
        job = self.jobs[name]
        moved = job.streams * case.array_bytes
        about |= {"job": job.name, "bytes_moved": moved, "gigabytes_per_second": moved / median / 1e9}
        if job.limit in self.samples:
            about["fraction_of_limit"] = about["gigabytes_per_second"] / self.info(job.limit)["gigabytes_per_second"]
        if job.anchor in self.samples:
            about["anchor"] = job.anchor
            about["times_of_anchor"] = median / statistics.median(self.samples[job.anchor])
        return about


@functools.cache
def fault(peer: Peer, dtype: torch.dtype) -> str:
    """Return why a peer is not timed on tensors of this dtype, or "". An exception is a reason, too."""
    try:
        return peer.missing() or JOBS[peer.job].fault(peer.make, dtype)
    except Exception as error:
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def competitors(case: Case, peers: Iterable[Peer] = PEERS, quick: bool = False) -> list[Peer]:
    return [p for p in peers if p.job in case.jobs and p.fits(case) and (p.quick(case) or not quick)]


def measure(case: Case, seconds: float, peers: Sequence[Peer] = PEERS, quick: bool = False) -> Measured:
    """Check every peer, then time those with right results and the limits, interleaved."""
    result = Measured(case)
    able = []
    for peer in competitors(case, peers, quick):
        reason = fault(peer, case.dtype)
        if reason:
            result.left_out[peer.name] = reason
        else:
            able.append(peer)
            result.jobs[peer.name] = JOBS[peer.job]
    _forget_compiled()
    data = {prepare: prepare(case.shapes, case.dtype) for prepare in {JOBS[p.job].prepare for p in able}}
    made: dict[str, Step] = {p.name: p.make(data[JOBS[p.job].prepare]) for p in able}
    steps: dict[str, Callable[[], object]] = {**limit_steps(case.array_bytes)}
    steps |= {name: step.run for name, step in made.items()}
    result.samples, result.repeats = interleave(steps, seconds)
    _forget_compiled()
    return result


def _forget_compiled() -> None:
    """Reset torch.compile: it keeps a few versions of a function and then silently gives up."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
