"""`Finding`: the result of a check of the doctor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "skipped", "failed"]


@dataclass(frozen=True)
class Finding:
    """`measured` describes what was found; a failure also has a `cure`, one sentence. A note is no failure."""

    verdict: Verdict
    measured: str
    cure: str | None = None


@dataclass(frozen=True)
class Check:
    """One check. `examine` may raise: that is a failure too. The checks of a `group` share a line, unless verbose."""

    name: str
    examine: Callable[[], Finding]
    group: str | None = None


def ok(measured: str) -> Finding:
    """Report that all is as it should be."""
    return Finding("ok", measured)


def note(measured: str) -> Finding:
    """Report what the user should know, though nothing is broken."""
    return Finding("note", measured)


def skipped(reason: str) -> Finding:
    """Report that the check cannot run here."""
    return Finding("skipped", reason)


def failed(measured: str, cure: str) -> Finding:
    """Report what is broken, and what to do about it."""
    return Finding("failed", measured, cure)
