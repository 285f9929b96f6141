"""The kernels over samples in the emulator: see test_simt.py, test_launches.py."""

import pytest
import torch

from normkern import ops

from . import check_sample_results as sample_judgement
from .backend import Refused
from .check_results import DTYPES
from .sample_calls import CALLS

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("name", CALLS)
@dtypes
def test_bits_of_the_cpu_in_any_order_with_nothing_to_object(checked, name, dtype):
    if ops.isa() in ("v2", "portable"):
        pytest.skip("without FMA hardware the CPU back end is outside the bitwise promise")
    sample_judgement.same_as_cpu(checked, name, dtype, seeds=(0, 1, 2))


@pytest.mark.parametrize("name", CALLS)
@dtypes
def test_bytes_of_the_formula_and_no_more(checked, name, dtype):
    sample_judgement.moves_what_it_must(checked, name, dtype)


def test_an_id_that_is_none_shows_in_its_sample_and_nowhere_else(checked):
    """Nobody waits for the device to look at ids; nothing outside the table is read or written."""
    g = torch.randn(4, 3, 5)
    ids = torch.tensor([[0, 1, 1], [1, 7, 0], [0, 0, 0], [-1, 2, 2]])
    right = torch.tensor([[0, 1, 1], [1, 3, 0], [0, 0, 0], [3, 2, 2]])
    expected = ops.embedding_moments(right, g, 4, padding_idx=3, squares=True)
    with checked.in_place():
        total, centred, norms = ops.embedding_moments(ids, g, 3, squares=True)
    assert norms.isnan().tolist() == [False, True, False, True]
    assert torch.equal(norms[[0, 2]], expected[2][[0, 2]])
    assert torch.equal(total, expected[0][:3])
    assert torch.equal(centred, expected[1][:3])


@dtypes
def test_what_floats_cannot_hold_is_summed_in_double(checked, dtype):
    x = torch.randn(20, 300, dtype=torch.float64)
    x[:, :130] *= 1e-4 if dtype == torch.float16 else 1e-25
    x[:, 200:] *= 1e3 if dtype == torch.float16 else 1e25
    x = x.to(dtype)
    totals, exact = (torch.zeros(2, dtype=torch.float64) for _ in range(2))
    mean, centred, norms = ops.moments(x.double(), factor=1e-20, totals=exact)
    with checked.in_place():
        got = ops.moments(x, factor=1e-20, totals=totals)
    torch.testing.assert_close(got[0].double(), mean, rtol=1e-5, atol=1e-5 * mean.abs().min().item())
    torch.testing.assert_close(got[1].double(), centred, rtol=1e-5, atol=3e-45)
    torch.testing.assert_close(got[2], norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(totals, exact, rtol=1e-5, atol=0)


def test_more_matrices_than_a_table_has(checked):
    make = torch.Generator().manual_seed(0)
    x = [torch.randn(3, 1 + 37 * (i % 9), generator=make) for i in range(600)]
    expected = ops.moments(x)
    with checked.in_place():
        before = checked.launches()
        got = ops.moments(x)
        assert checked.launches() - before <= 6
    assert all(torch.equal(a, b) for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True))
    torch.testing.assert_close(got[2], expected[2], rtol=1e-6, atol=0)


def test_more_tiles_than_a_block_adds_up(checked):
    """Lines of more than 1024 tiles are added in two launches."""
    x = torch.ones(1, 1).expand(2, 1030 * 128 + 5)
    with checked.in_place():
        assert ops.row_sq_norms(x).tolist() == [1030 * 128 + 5] * 2


def test_nothing_to_do(checked):
    with checked.in_place():
        before = checked.launches()
        for shape in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
            of_rows = torch.ones(shape[:2])
            for channels in ("last", "first"):
                a, b = ops.norm_sums(torch.ones(shape), torch.ones(shape), of_rows, of_rows, channels=channels)
                assert not a.any()
                assert not b.any()
            total, centred, norms = ops.embedding_moments(
                torch.zeros(shape[:2]).long(), torch.ones(shape), 5, squares=True
            )
            assert not any(x.any() for x in (total, centred, norms))
        assert checked.launches() - before <= 12
        assert ops.row_sq_norms(torch.ones(0, 4)).tolist() == []
        assert ops.row_sq_norms(torch.ones(3, 0)).tolist() == [0, 0, 0]
        totals = torch.ones(2, dtype=torch.float64)
        means, centred, norms = ops.moments([torch.ones(3, 0), torch.ones(3, 2, 0)], totals=totals)
        assert [m.shape for m in means] == [c.shape for c in centred] == [(0,), (2, 0)]
        assert norms.tolist() == [0, 0, 0]
        assert totals.tolist() == [0, 0]
        ops.moments([torch.ones(3, 0)], squares=False, totals=totals)
        assert totals.isnan().tolist() == [False, True]


CASES = {
    "moments": lambda: ops.moments(torch.ones(3, 200)),
    "norm_sums": lambda: ops.norm_sums(
        torch.ones(2, 3, 200), torch.ones(2, 3, 200), None, torch.ones(2, 3), channels="last"
    ),
    "embedding_moments": lambda: ops.embedding_moments(
        torch.zeros(2, 3).long(), torch.ones(2, 3, 200), 4, squares=True
    ),
}


@pytest.mark.parametrize("op", CASES)
def test_a_refused_launch_is_an_error_with_the_name_of_the_op(checked, op):
    with checked.in_place():
        before = checked.launches()
        CASES[op]()
        launches = checked.launches() - before
        assert launches >= 2
        for after in range(launches):
            checked.refuse_launch(Refused.OUT_OF_RESOURCES, after=after)
            with pytest.raises(
                RuntimeError, match=rf"{op}: a kernel could not be launched on cuda:0, .*: too many res"
            ):
                CASES[op]()
        CASES[op]()


@pytest.mark.parametrize("op", CASES)
def test_a_device_that_is_not_the_current_one(checked, op):
    with checked.in_place():
        checked.devices(count=2, current=0, of_tensors=1)
        CASES[op]()
        assert checked.current_device() == 0


def test_more_blocks_than_a_grid_has(checked):
    """A stride of 0 makes any number of samples of one."""
    many = torch.ones(1).expand(2**31 + 5, 1, 5000)
    of_rows = torch.ones(1).expand(2**31 + 5, 1)
    with checked.in_place():
        before = checked.launches()
        with pytest.raises(
            RuntimeError, match="norm_sums: .*: a tensor has more coordinates than a grid of blocks can"
        ):
            checked.binary.norm_sums(
                many, many, None, of_rows, True, torch.ones(1).expand(2**31 + 5, 1), torch.ones(1).expand(2**31 + 5, 1)
            )
        assert checked.launches() == before


def test_tensors_on_two_devices(checked):
    g, x, rstd = torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3)
    with checked.in_place():
        checked.devices(count=2)
        for stray in (x, rstd):
            checked.devices(count=2)
            checked.place(stray, 1)
            with pytest.raises(TypeError, match="norm_sums: .* but g is on cuda:0; expected one device"):
                ops.norm_sums(g, x, None, rstd, channels="last")
        checked.devices(count=2)
        checked.place(x, 1)
        with pytest.raises(TypeError, match=r"moments: x is .* but x is on cuda:0; expected one device"):
            checked.binary.moments([g, x], [g[0], x[0]], None, 1.0, rstd[0], rstd[0], None)
