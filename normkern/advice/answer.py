"""`Answer`: one answer of the advisor, with its interval and what is missing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .intervals import Interval

#: The answer where the interval decides nothing.
UNKNOWN = "unknown, average longer"


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        question: what was asked.
        answer: the answer in words; "unknown, average longer" where the interval decides nothing.
        known: whether there is an answer.
        estimate, low, high: the number and the ends of its confidence interval; None for what the measurements do not
            bound, or where there is no number.
        unit: of these.
        more: about how many more measurements would decide, if means and variability stay; 0 if it is known, None if
            the measurements say nothing about that.
        note: what to know about it, "" for nothing.
    """

    question: str
    answer: str
    known: bool
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    more: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, as JSON can hold them."""
        return asdict(self)

    @property
    def interval(self) -> str:
        """The interval in words."""
        if self.low is None and self.high is None:
            return "-"
        low = "-inf" if self.low is None else f"{self.low:.3g}"
        return f"[{low}, {'inf' if self.high is None else f'{self.high:.3g}'}]"


def ends(interval: Interval) -> dict[str, Any]:
    """Return the fields of an `Answer` for an interval: None for what is not finite."""
    return {name: x if math.isfinite(x) else None for name, x in interval._asdict().items()}


def is_sharp(interval: Interval, span: float) -> bool:
    """Return whether the ends of an interval of positive numbers differ by a factor of `span` at most."""
    return 0 < interval.high < math.inf and interval.high <= span * interval.low


def missing(more: int | None, what: str = "measurements") -> str:
    """Return in words how many more measurements are needed."""
    what = what.removesuffix("s") if more == 1 else what
    return "" if more is None else f"about {more:,} more {what} would decide"
