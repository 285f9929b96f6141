"""All checks of the doctor, and how they are run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .. import ops
from . import environment, machine, numbers, samples, threads, torch_sgd
from .finding import Check, Finding, failed


def import_modules(names: Sequence[str]) -> dict[str, str]:
    """Import modules of the user; return the OpenMP runtimes that they loaded: file -> module.

    Raises:
        ImportError: a module cannot be imported, for whatever reason.
    """
    brought_by: dict[str, str] = {}
    for name in names:
        before = machine.openmp_runtimes() or []
        _import(name)
        brought_by |= {file: name for file in machine.openmp_runtimes() or [] if file not in before}
    return brought_by


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ImportError(
            f"expected a module that can be imported, got {name!r} ({type(error).__name__}: {error})"
        ) from error


def checks(brought_by: dict[str, str]) -> list[Check]:
    """Return all checks, in the order of the output: those of a group stand side by side."""
    return [
        *environment.checks(brought_by),
        *numbers.checks(),
        *samples.checks(),
        *numbers.bits(),
        *threads.checks(),
        *torch_sgd.checks(),
    ]


def examine(lines: Sequence[Check]) -> Iterator[tuple[Check, Finding]]:
    """Run the checks one after the other, each with the ISA level and threads that were selected.

    A check that raises has failed.
    """
    for check in lines:
        with _restored():
            try:
                finding = check.examine()
            except Exception as error:
                sentence = " ".join(str(error).split())
                finding = failed(
                    f"{type(error).__name__}: {sentence}",
                    "the check itself broke: report it with the output of `python -m normkern doctor --json`",
                )
        yield check, finding


@contextmanager
def _restored() -> Iterator[None]:
    """Restore the ISA level and the number of threads at the end."""
    isa, count = ops.isa(), torch.get_num_threads()
    try:
        yield
    finally:
        ops.select_isa(isa)
        torch.set_num_threads(count)
