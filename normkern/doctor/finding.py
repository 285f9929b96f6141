"""What a check of the doctor finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "skipped", "failed"]


@dataclass(frozen=True)
class Finding:
    """`measured` says what was found; a failure has a `cure`, one sentence. A note is worth reading and no failure."""

    verdict: Verdict
    measured: str
    cure: str | None = None


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table. `examine` may raise: that is a failure too."""

    name: str
    examine: Callable[[], Finding]


def ok(measured: str) -> Finding:
    """As it should be."""
    return Finding("ok", measured)


def note(measured: str) -> Finding:
    """Nothing is broken, but the user should know."""
    return Finding("note", measured)


def skipped(reason: str) -> Finding:
    """Could not be looked at here."""
    return Finding("skipped", reason)


def failed(measured: str, cure: str) -> Finding:
    """Broken, and what to do about it."""
    return Finding("failed", measured, cure)
