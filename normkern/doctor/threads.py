"""The check that more threads make a step faster, or at least not slower."""

from __future__ import annotations

import statistics
import time

import torch

from .. import ops
from . import machine
from .finding import Check, Finding, failed, note, ok

_ATTEMPTS = 3
_ROUNDS = 40
_SECONDS = 0.6  # the limit of an attempt, where other programs keep the CPUs busy
_STEPS = 5  # timed per turn
#: N threads are clearly slower than one if they take this many times as long. The factor is smaller where there are
#: more threads than CPUs, so that the reason is known.
_SLOWER, _SLOWER_OVERSUBSCRIBED = 1.25, 1.1
#: Other programs that use so many CPUs explain why threads are slow.
_BUSY = 0.3


def scaling() -> Finding:
    """Compare a step on as many threads as torch has with the same step on one."""
    threads, cpus = torch.get_num_threads(), machine.cpus()
    if threads == 1:
        return ok(f"1 thread on {_cpus(cpus.usable)}: nothing to compare")
    too_many = threads > cpus.usable
    limit = _SLOWER_OVERSUBSCRIBED if too_many else _SLOWER
    load = _Load()
    for _ in range(_ATTEMPTS):
        times = step_times((1, threads))
        best = {n: min(seconds) for n, seconds in times.items()}
        # Other programs can only add to the best time. Where threads share a CPU, the best time is a lucky one, and the
        # median is the better measure.
        usual = {n: statistics.median(seconds) for n, seconds in times.items()}
        measure = usual if too_many else best
        if measure[threads] < limit * measure[1]:
            break
    else:
        text, others = _text(threads, cpus.usable, measure), load.of_others()
        if not too_many and others > _BUSY:
            return note(
                f"{text}, while other programs used {others:.1f} CPUs; export OMP_NUM_THREADS=1 if that is usual here, "
                "or repeat the check without them"
            )
        return failed(text, _cure(threads, cpus.usable, too_many))
    if too_many:
        return note(
            f"{_text(threads, cpus.usable, measure)}: not slower, but more threads than CPUs; "
            f"OMP_NUM_THREADS={cpus.usable} suffices"
        )
    return ok(_text(threads, cpus.usable, measure))


class _Load:
    """The CPUs that other programs use, from the construction on."""

    def __init__(self) -> None:
        self._before = time.perf_counter(), machine.busy_seconds(), time.process_time()

    def of_others(self) -> float:
        """Return the mean number of CPUs so far; 0 where the system does not count it."""
        (start, busy, own), now = self._before, machine.busy_seconds()
        if busy is None or now is None:
            return 0.0
        return (now - busy - (time.process_time() - own)) / (time.perf_counter() - start)


def step_times(counts: tuple[int, ...]) -> dict[int, list[float]]:
    """Return the seconds of each of many steps, per number of threads; the numbers take turns."""
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


def _text(threads: int, cpus: int, seconds: dict[int, float]) -> str:
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
        f"{fastest} was the fastest count: export OMP_NUM_THREADS={fastest}; or end the other programs on "
        "these CPUs and repeat the check"
    )


def checks() -> list[Check]:
    """Return the check of the threads."""
    return [Check("thread scaling", scaling)]
