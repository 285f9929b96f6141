"""nvcc's own code of every kernel, executed in numpy: the same bits as the same source compiled by g++."""

import dataclasses

import pytest
import torch
from support.memory import same_bits

from . import build, mixed_calls, nvcc, product_calls, ptx, ptxrun, sample_calls
from .calls import SPECIAL, every_call, random_lists
from .check_results import DTYPES, lay_out
from .needs import need
from .sample_calls import CALLS, Near

pytestmark = pytest.mark.nvcc
SHAPES = [(0,), (7,), (33,), (257,), (8195,), (40, 51), (161, 51), (5, 2047), (2, 9000), (12, 5, 7), (12, 5, 8)]
SOURCES = sorted((build.CSRC / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def kernels():
    """Of compute capability 7.5: {name: kernel}."""
    need(nvcc.missing())
    return {kernel.name: kernel for text in nvcc.ptx(SOURCES, 75) for kernel in ptx.parse(text)}


@pytest.fixture(scope="module")
def executed():
    return set()


@pytest.fixture
def in_ptx(emulated, kernels, executed):
    """Where the emulated binary launches PTX."""

    def run(name, grid, block, parameters):
        executed.add(name)
        memory = ptxrun.Memory(emulated.allowed())
        ptxrun.Grid(kernels[name], grid, block, parameters, memory, emulated.fma).run()

    with emulated.in_place():
        yield lambda: emulated.launches_run_by(run)


def assert_same(got, expected, table, expected_table):
    """Every tensor of the lists, and the sums, to the bit."""
    for name, ours, theirs in zip("wgvh", got, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert same_bits(a, b), f"{name} of shape {tuple(a.shape)}"
    assert (table is None) == (expected_table is None)
    assert table is None or same_bits(table, expected_table), "sums"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", every_call(), ids=str)
def test_bits_of_the_emulator(in_ptx, call, dtype):
    call = dataclasses.replace(call, stats="row")
    expected, got = (random_lists(SHAPES, dtype, lay_out=lay_out) for _ in range(2))
    expected_table = call(*expected)
    with in_ptx():
        table = call(*got)
    assert_same(got, expected, table, expected_table)


@pytest.mark.parametrize("call", list(mixed_calls.calls()), ids=str)
def test_mixed_streams_have_the_bits_of_the_emulator(in_ptx, call):
    expected, got = (random_lists(SHAPES, torch.bfloat16, lay_out=lay_out) for _ in range(2))
    expected_table = call(*expected)
    with in_ptx():
        table = call(*got)
    assert_same(got, expected, table, expected_table)


@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_cases_have_the_bits_of_the_emulator(in_ptx, case, dtype):
    expected = case(dtype, on_device=True)
    with in_ptx():
        got = case(dtype, on_device=True)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_over_samples_have_the_bits_of_the_emulator(in_ptx, name, dtype):
    expected = sample_calls.run(name, dtype)
    with in_ptx():
        got = sample_calls.run(name, dtype)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = (x.tensor if isinstance(x, Near) else x for x in (a, b))
        assert same_bits(a, b), f"result {i}, of shape {tuple(a.shape)}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", product_calls.every_call(), ids=str)
def test_bits_of_the_emulator_of_products(in_ptx, call, dtype):
    tensors = call.tensors(dtype)
    expected = call(*tensors)
    with in_ptx():
        got = call(*tensors)
    assert all(a is b is None or same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_every_kernel_was_executed(kernels, executed):
    if len(executed) < 100:
        pytest.skip("runs after all of the tests above")
    assert set(kernels) == executed
