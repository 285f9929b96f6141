"""A clock that replays recorded durations: how an interleaved run reaches pytest-benchmark through its public API.

pytest-benchmark times one test after the other. Our samples are taken before, in turns; each test then "runs" once per
sample under this clock, and the plugin's statistics, table and JSON are those of the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Tape:
    """Call it at the start and at the end of each round: the difference is the next duration."""

    def __init__(self) -> None:
        self._instants: Iterator[float] = iter(())

    def load(self, durations: Sequence[float]) -> None:
        # Every round starts at 0.0, so that the difference is exactly the duration.
        self._instants = iter([t for duration in durations for t in (0.0, duration)])

    def __call__(self) -> float:
        return next(self._instants)
