"""Models that are refused, each with a part of the sentence that says why."""

REFUSED: dict[tuple[str, str], str] = {}
