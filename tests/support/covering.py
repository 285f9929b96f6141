"""A few of many combinations, in which every two values of different parameters still meet."""

from itertools import combinations

import pytest


def pairwise(rows):
    """Return the places of some rows which hold every pair of values that all rows hold.

    Values pair with those of other columns. Greedily: the row with the most pairs that are missing, the first of several. The
    same rows, the same choice.
    """
    pairs = [frozenset(combinations(enumerate(row), 2)) for row in rows]
    missing, chosen = frozenset().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda i: (len(pairs[i] & missing), -i))
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen)


def leave_rest_to_slow(items):
    """Mark tests as slow: of a test marked as ``pairwise``, all combinations of its parameters but a covering choice."""
    tests = {}
    for item in items:
        if item.get_closest_marker("pairwise") and not any(map(item.get_closest_marker, ("slow", "cuda"))):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_one in tests.values():
        # A value is the same object wherever it is used.
        rows = [tuple(id(value) for _, value in sorted(item.callspec.params.items())) for item in of_one]
        assert len(rows[0]) > 2, f"{of_one[0].nodeid}: pairs of two parameters are all there is"
        for i in set(range(len(rows))).difference(pairwise(rows)):
            of_one[i].add_marker(pytest.mark.slow)
