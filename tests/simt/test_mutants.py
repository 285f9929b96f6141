"""The judge is judged once more: the shipped kernels with one mistake each, all of which must be caught."""

import pytest

from . import build
from .mutants import FAMILIES, KINDS, MUTANTS
from .needs import need


def judge(mutants):
    need(build.missing())
    build.binding(checked=True)  # what they all share
    verdicts = [mutant.verdict() for mutant in mutants]
    alive = [m.name for m, verdict in zip(mutants, verdicts, strict=True) if not verdict]
    assert not alive, "these broken kernels pass every check"
    unexpected = [(m.name, m.says, v) for m, v in zip(mutants, verdicts, strict=True) if m.says not in v]
    assert not unexpected, "\n".join(f"{name}: expected {says!r}, got {v!r}" for name, says, v in unexpected)


def test_mutants_are_caught():
    judge([m for m in MUTANTS if m.always])


@pytest.mark.slow
def test_the_other_mutants_are_caught():
    judge([m for m in MUTANTS if not m.always])


def test_make_test_has_each_family_and_each_kind():
    chosen = [m for m in MUTANTS if m.always]
    assert {m.family for m in chosen} == FAMILIES.keys()
    assert [kind for kind in KINDS if not any(kind in m.says for m in chosen)] == []


def test_every_mutant_has_a_name_of_its_own():
    names = [m.name for m in MUTANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_still_apply(mutant):
    assert mutant.sources(), "no unit of its family has the edit"
