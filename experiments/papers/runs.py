"""Runs, one after another or in parallel. Each result is appended to a file, so that no run is repeated."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Run:
    """A function of plain arguments that returns plain numbers, as JSON can hold them.

    Attributes:
        function: at the top of a module, so that another process finds it.
        arguments: everything that the result depends on, seeds included.
        cost: relative to other runs; for the remaining time, and to begin with the longest.
    """

    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]
    cost: float = 1.0

    @cached_property
    def key(self) -> str:
        """The run and a digest of its source: results of other source are not reused."""
        given = json.dumps(self.arguments, sort_keys=True)
        return f"{self.function.__name__}({given}) {source_digest(self.function)}"


class Results:
    """Results by function and arguments."""

    def __init__(self, records: Sequence[tuple[Run, dict[str, Any]]]) -> None:
        self.records = list(records)

    def of(self, function: Callable[..., Any], **wanted: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield (arguments, result) of the function's runs that have these arguments, in the order of the runs."""
        for run, record in self.records:
            if run.function is function and all(run.arguments[k] == v for k, v in wanted.items()):
                yield run.arguments, record["result"]

    def one(self, function: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
        """Return the result of the only such run."""
        ((_, result),) = self.of(function, **wanted)
        return result

    @property
    def seconds(self) -> float:
        """The seconds of computing, of all runs together."""
        return float(sum(record["seconds"] for _, record in self.records))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return key -> record. A last line that a killed run left unfinished is no result."""
    records: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return records
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["key"]] = record
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """Append the record as a line of its own, also after an unfinished line; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def run_all(runs: Sequence[Run], path: Path, *, workers: int, title: str = "", console: Console) -> Results:
    """Make the runs whose results are not in the file yet, and return the results of all.

    Args:
        workers: processes, each with one thread: for small networks faster than one process with as many threads. 0:
            here.
    """
    known = read(path)
    todo = sorted((r for r in runs if r.key not in known), key=lambda r: -r.cost)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("passed, remaining"),
               TimeRemainingColumn())  # fmt: skip
    done = len(runs) - len(todo)
    if done:
        console.print(f"{title}: {done} of {len(runs)} runs are in {path}")
    total = sum(r.cost for r in todo)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=3600) as progress:
        task = progress.add_task(title, total=total or 1)
        for run, seconds, result in _made(todo, workers):
            finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            record = {"key": run.key, "seconds": seconds, "finished": finished, "result": result}
            append(path, record)
            known[run.key] = record
            progress.advance(task, run.cost)
            done += 1
            progress.update(task, description=f"{title}, {done} of {len(runs)} runs")
            if not console.is_terminal:
                left = sum(r.cost for r in todo if r.key not in known) / total
                rate = (time.monotonic() - (progress.tasks[0].start_time or 0)) / max(1 - left, 1e-9)
                console.print(
                    f"{title}: {run.function.__name__} in {seconds:.0f} s; {left:.0%} left, {left * rate:.0f} s"
                )
    return Results([(run, known[run.key]) for run in runs])


def _made(runs: Sequence[Run], workers: int) -> Iterator[tuple[Run, float, dict[str, Any]]]:
    if workers == 0 or not runs:
        for run in runs:
            yield run, *_timed(run)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
    )
    with pool:
        futures = {pool.submit(_timed, run): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _timed(run: Run) -> tuple[float, dict[str, Any]]:
    begin = time.perf_counter()
    result = run.function(**run.arguments)
    return time.perf_counter() - begin, result


def _start_worker(parent: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this worker when its parent is gone: a killed parent does not end it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def source_digest(function: Callable[..., Any]) -> str:
    """Return a digest of the function's source, and of everything of this package that it uses, directly or not.

    It does not depend on what the package is called.
    """
    parts: dict[str, str] = {}
    _collect(function, parts)
    return hashlib.sha256("".join(parts[name] for name in sorted(parts)).encode()).hexdigest()[:12]


def _collect(x: Any, parts: dict[str, str]) -> None:
    name = f"{_module(x)}.{x.__qualname__}"
    if name in parts:
        return
    parts[name] = inspect.getsource(x)
    functions = [x] if isinstance(x, FunctionType) else [f for f in vars(x).values() if isinstance(f, FunctionType)]
    for f in map(inspect.unwrap, functions):
        for used in _names(f.__code__):
            value = f.__globals__.get(used)
            if isinstance(value, (FunctionType, type)):
                if value.__module__.startswith(PACKAGE):
                    _collect(value, parts)
            elif isinstance(value, (int, float, str, tuple, list, dict)):
                parts[f"{_module(f)}.{used}"] = f"{used} = {value!r}"


def _module(x: Any) -> str:
    """Return the name of x's module, relative to this package if it lies in it: then it begins with a dot."""
    return str(x.__module__).removeprefix(PACKAGE)


def _names(code: CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*(_names(c) for c in inner))
