"""The judge is judged: kernels broken on purpose, all of which the check build must catch, and their right twins."""

import ctypes

import pytest

from . import build
from .needs import need

SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def planted():
    need(build.missing())
    library = ctypes.CDLL(str(build.library("planted", [build.HERE / "planted.cu"], checked=True)))
    for function in (library.planted_name, library.planted_says, library.planted_run):
        function.restype = ctypes.c_char_p
    library.planted_sum_in_any_order.restype = ctypes.c_float
    return library


def test_every_planted_kernel(planted):
    wrong = []
    for i in range(planted.planted_count()):
        name, says = planted.planted_name(i).decode(), planted.planted_says(i).decode()
        for seed in SEEDS:
            story = planted.planted_run(i, ctypes.c_uint64(seed)).decode()
            if says not in story or bool(says) != bool(story):
                wrong.append(f"{name}, seed {seed}: expected {says!r}, got {story!r}")
    assert planted.planted_count() >= 30
    assert not wrong, "\n".join(wrong)


def test_float_atomics_show_in_the_bits(planted):
    sums = {planted.planted_sum_in_any_order(ctypes.c_uint64(seed)) for seed in range(1, 6)}
    assert len(sums) > 1
    assert max(sums) - min(sums) < 1e-4
