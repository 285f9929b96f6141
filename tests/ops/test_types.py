"""ops.types: dtypes and columns of sums have one list each, which sentences and tables follow."""

import pytest
import torch

import normkern
from normkern import ops


def test_sentences_list_dtypes_in_the_order_of_the_table():
    assert ops.one_of() == "float64, float32, bfloat16 or float16"
    assert ops.one_of(ops.COMPUTE_DTYPES) == "float64 or float32"
    assert ops.one_of((torch.float32,)) == "float32"


@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_kernels_take_each_dtype_and_compute_in_its_compute_dtype(dtype):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
    assert ops.kernel_takes(x)
    mean, _, _ = ops.moments(x)
    assert mean.dtype == ops.compute_dtype(dtype)
    assert (dtype in ops.LOW_PRECISION) == (ops.compute_dtype(dtype) != dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_kernels_take_no_other_dtype(dtype):
    assert not ops.kernel_takes(torch.zeros(2).to(dtype))


def test_columns_are_found_by_name():
    w, a, b = (torch.tensor(x, dtype=torch.float64) for x in ([3.0, 4.0], [1.0, 2.0], [5.0, -1.0]))
    before, mean = w.clone(), (a + b) / 2
    table = ops.sgd_([w], [b], lr=0.5, held=[a], l=0.5)
    expected = {
        "weight_sq": before @ before,
        "grad_sq": mean @ mean,
        "weight_grad_dot": before @ mean,
        "update_sq": (w - before) @ (w - before),
        "weight_update_dot": before @ (w - before),
        "pair_dot": a @ b,
        "pair_difference_sq": (a - b) @ (a - b),
        "first_sq": a @ a,
        "second_sq": b @ b,
    }
    assert tuple(expected) == ops.SUMS + ops.PAIR_SUMS
    pairs = ops.pair_sums([a], [b])
    for name, value in expected.items():
        assert ops.column(table, name).item() == pytest.approx(value.item()), name
        if name in ops.PAIR_SUMS:
            assert ops.column(pairs, name, ops.PAIR_SUMS).item() == pytest.approx(value.item()), name


@pytest.mark.parametrize("name", ops.SUMS)
def test_step_stats_have_an_attribute_for_each_column(name):
    table = torch.arange(2.0 * len(ops.SUMS)).reshape(2, -1)
    stats = normkern.StepStats(table, ["a", "b"], (0, 1), [0.1, 0.1])
    assert torch.equal(getattr(stats, name), table[:, ops.SUMS.index(name)])
