"""A claim of a paper beside what was measured, and the line that says so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One claim and its verdict.

    Attributes:
        arxiv, number: of the paper, and of the claim in its file.
        where: in the paper.
        paper: what it says, in short.
        here: what was measured, with its confidence interval.
        criterion: what `passed` means, chosen before the runs.
        passed: whether the numbers meet it.
        seeds: how many independent networks, or runs where there is no chance in them, each number is from.
        differs: how the set-up is not the paper's, and what would decide.
        numbers: all that the verdict is from.
        figures: names of the files that show it.
    """

    arxiv: str
    number: int
    where: str
    paper: str
    here: str
    criterion: str
    passed: bool
    seeds: int
    differs: str
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return "PASS" if self.passed else "FAIL"

    def __str__(self) -> str:
        return f"CLAIM {self.arxiv} {self.number}: paper {self.paper} | here {self.here} | {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the verdict."""
        return asdict(self) | {"passed": bool(self.passed), "verdict": self.verdict}
