"""Choices from a string of bytes. Where it has ended, every choice is the first: short strings are plain calls."""

from collections.abc import Sequence
from typing import TypeVar

Entry = TypeVar("Entry")


class Choices:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1, of at most 256."""
        byte = self.data[self.at] if self.at < len(self.data) else 0
        self.at += 1
        return byte % n

    def of(self, entries: Sequence[Entry]) -> Entry:
        return entries[self.below(len(entries))]

    def rarely(self, one_in: int = 8) -> bool:
        return self.below(one_in) == one_in - 1
