"""Do more threads make a step faster, or at least not slower?"""

from __future__ import annotations

import statistics
import time

import torch

from .. import ops
from . import machine
from .finding import Check, Finding, failed, note, ok

_ATTEMPTS = 3
_ROUNDS = 40
_SECONDS = 0.6  # an attempt's limit, where something keeps the CPUs busy
_STEPS = 5  # timed per turn
#: N threads are clearly slower than one if they take this many times as long. Where they cannot all run at a time
#: the reason is known and less is asked for.
_SLOWER, _SLOWER_OVERSUBSCRIBED = 1.25, 1.1


def scaling() -> Finding:
    """A step on as many threads as torch has against the same step on one."""
    threads, cpus = torch.get_num_threads(), machine.cpus()
    if threads == 1:
        return ok(f"1 thread on {_cpus(cpus.usable)}: nothing to compare")
    too_many = threads > cpus.usable
    limit = _SLOWER_OVERSUBSCRIBED if too_many else _SLOWER
    for _ in range(_ATTEMPTS):
        times = step_times((1, threads))
        best = {n: min(seconds) for n, seconds in times.items()}
        # Whatever else runs on the machine can only add to the best time. Where the threads stand in each other's way,
        # the best time is a lucky one, and the median tells.
        usual = {n: statistics.median(seconds) for n, seconds in times.items()}
        measure = usual if too_many else best
        if measure[threads] < limit * measure[1]:
            break
    else:
        return failed(_said(threads, cpus.usable, measure), _cure(threads, cpus.usable, too_many))
    if too_many:
        return note(
            f"{_said(threads, cpus.usable, measure)}: not slower, but more threads than CPUs; "
            f"OMP_NUM_THREADS={cpus.usable} suffices"
        )
    return ok(_said(threads, cpus.usable, measure))


def step_times(counts: tuple[int, ...]) -> dict[int, list[float]]:
    """Seconds of each of many steps, per number of threads, which take turns."""
    # In cache, where one thread cannot use up the memory's bandwidth; four chunks for every thread that can run.
    size = ops.CHUNK * 4 * min(max(counts), machine.cpus().usable, 64)
    w, g, v = (torch.ones(size) for _ in range(3))
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    stop = time.perf_counter() + _SECONDS
    for _ in range(_ROUNDS):
        for n in counts:
            torch.set_num_threads(n)
            ops.sgd_([w], [g], [v], lr=1e-6, momentum=0.9)  # wakes the pool
            for _ in range(_STEPS):
                start = time.perf_counter()
                ops.sgd_([w], [g], [v], lr=1e-6, momentum=0.9)
                seconds[n].append(time.perf_counter() - start)
        if time.perf_counter() > stop:
            break
    return seconds


def _said(threads: int, cpus: int, seconds: dict[int, float]) -> str:
    return (
        f"{threads} threads on {_cpus(cpus)}: a step takes {1e6 * seconds[threads]:.0f} us, "
        f"on 1 thread {1e6 * seconds[1]:.0f} us"
    )


def _cpus(count: int) -> str:
    return f"{count} CPU{'s' * (count != 1)}"


def _cure(threads: int, cpus: int, too_many: bool) -> str:
    if too_many:
        return (
            f"more threads than CPUs that the affinity mask and the cgroup quota give: export OMP_NUM_THREADS={cpus}, "
            f"or call torch.set_num_threads({cpus})"
        )
    counts = tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < threads)
    times = {n: min(seconds) for n, seconds in step_times(counts).items()}
    fastest = min(times, key=lambda n: times[n])
    return (
        f"{fastest} was the fastest count: export OMP_NUM_THREADS={fastest}; or end what else runs on these CPUs and "
        "ask again"
    )


def checks() -> list[Check]:
    """The line of the table that is about threads."""
    return [Check("thread scaling", scaling)]
