"""A test per case and peer. A case is measured once, interleaved; each test hands its peer's samples to the plugin."""

from __future__ import annotations

import functools

import pytest

from .cases import CASES
from .conftest import LEFT_OUT, seconds_of_a_case
from .limits import LIMITS, compiler
from .measure import Measured, competitors, measure
from .tape import Tape

TAPE = Tape()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    tests = [
        pytest.param(
            case.key,
            name,
            marks=pytest.mark.benchmark(group=case.key, timer=TAPE),
            id=f"{case.key}-{name}".replace(", ", "-").replace(" ", "_"),  # words that -k takes
        )
        for case in CASES.values()
        if "quick" in case.tags or not quick
        for name in [*LIMITS, *(p.name for p in competitors(case, quick=quick))]
    ]
    metafunc.parametrize(("case", "peer"), tests)


# No fixture of a wider scope: the tests of a case follow each other, and the next case needs the memory of this one.
@functools.lru_cache(maxsize=1)
def measure_once(case: str, seconds: float, quick: bool) -> Measured:
    return measure(CASES[case], seconds, quick=quick)


@pytest.fixture
def measured(case: str, pytestconfig: pytest.Config) -> Measured:
    result = measure_once(case, seconds_of_a_case(pytestconfig), pytestconfig.getoption("quick"))
    pytestconfig.stash[LEFT_OUT][case] = result.left_out
    return result


def test_step(measured: Measured, peer: str, benchmark) -> None:
    if peer in LIMITS and compiler() is None:
        pytest.skip("not installed: a C++ compiler")
    if peer in measured.left_out:
        pytest.skip(measured.left_out[peer])
    samples = measured.samples[peer]
    TAPE.load(samples)
    benchmark.extra_info.update(measured.info(peer))
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
