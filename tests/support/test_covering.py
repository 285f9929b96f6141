"""Covering choices hold every pair, and are small."""

import re
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest

from .covering import leave_rest_to_slow, pairwise


def pairs(rows):
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@pytest.mark.parametrize(("sizes", "most"), [((2, 2, 2), 4), ((3, 3, 3, 3), 12), ((8, 4, 3, 2), 34), ((5, 1, 4), 20)])
def test_every_pair_is_there_in_few_rows(sizes, most):
    rows = list(product(*map(range, sizes)))
    chosen = pairwise(rows)
    assert pairs([rows[i] for i in chosen]) == pairs(rows)
    assert len(chosen) <= most
    assert chosen == pairwise(rows) == sorted(set(chosen))


def test_of_combinations_that_do_not_exist_none_is_asked_for():
    rows = [row for row in product(range(3), repeat=3) if sum(row) != 3]
    chosen = [rows[i] for i in pairwise(rows)]
    assert pairs(chosen) == pairs(rows)
    assert len(chosen) < len(rows)


def test_no_rows_and_no_pairs():
    assert pairwise([]) == []
    assert pairwise([(1,), (2,)]) == []


class Item:
    """As much of a collected test as is asked for."""

    def __init__(self, name, marks, **params):
        self.nodeid, self.marks = f"{name}[{params}]", set(marks)
        self.callspec = SimpleNamespace(params=params)

    def get_closest_marker(self, name):
        return name in self.marks or None

    def add_marker(self, mark):
        self.marks.add(mark.name)


def items(name, *marks, **axes):
    return [Item(name, marks, **dict(zip(axes, row, strict=True))) for row in product(*map(range, axes.values()))]


def test_what_is_left_out_is_slow():
    covered = items("covered", "pairwise", isa=2, dtype=3, n=2)
    for item in covered:
        if item.callspec.params["dtype"] == 1:
            item.marks.add("slow")
    whole = items("whole", isa=2, dtype=3, n=2)
    leave_rest_to_slow([*covered, *whole])
    quick = [tuple(item.callspec.params.values()) for item in covered if "slow" not in item.marks]
    assert pairs(quick) == pairs(product(range(2), (0, 2), range(2)))
    assert len(quick) == 4
    assert not any(item.marks for item in whole)


def test_the_longest_files_exist():
    folder = Path(__file__).parents[1]
    listed = re.search(r"^LONGEST = \((.*?)\n\)", (folder / "conftest.py").read_text(), re.MULTILINE | re.DOTALL)[1]
    names = re.findall(r'"(.*?)"', listed)
    assert len(names) > 5
    assert [name for name in names if not (folder / name).exists()] == []


def test_two_parameters_are_no_case_for_it():
    with pytest.raises(AssertionError, match="two.*: pairs of two parameters are all there is"):
        leave_rest_to_slow(items("two", "pairwise", isa=2, dtype=3))
