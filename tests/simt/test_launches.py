"""Around the kernels: numbers that lie on the device, lists of any length, launches that are refused."""

import pytest
import torch
from support.memory import same_bits

from normkern import ops

from . import check_results as judgement
from .backend import Refused
from .calls import SPECIAL
from .check_results import DTYPES


@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_cases_have_the_bits_of_the_cpu(checked, case, dtype):
    judgement.special_as_cpu(checked, case, dtype)


@pytest.mark.parametrize("stats", [None, "tensor"])
def test_what_the_scaler_found_stops_the_step(checked, stats):
    w, g, v = (torch.randn(9000) for _ in range(3))
    before = w.clone(), v.clone()
    with checked.in_place():
        table = ops.sgd_([w], [g], [v], lr=0.1, momentum=0.9, stats=stats, found_inf=torch.ones(1))
    assert same_bits(w, before[0])
    assert same_bits(v, before[1])
    assert table is None or table.isnan().all()


def test_nothing_to_do_launches_nothing(checked):
    with checked.in_place():
        before = checked.launches()
        ops.sgd_([], [], lr=0.1)
        ops.sgd_([torch.ones(0), torch.ones(3, 0)], [torch.ones(0), torch.ones(3, 0)], lr=0.1)
        ops.sgd_([torch.ones(3)], [None], lr=0.1)
        assert checked.launches() == before


def test_a_launch_for_each_table_and_no_more(checked):
    params, grads = ([torch.ones(5) for _ in range(600)] for _ in range(2))
    with checked.in_place():
        before = checked.launches()
        ops.sgd_(params, grads, lr=0.5)
        assert checked.launches() - before <= 3
    assert all((p == 0.5).all() for p in params)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Refused.OUT_OF_RESOURCES, "too many resources requested for launch"),
        (Refused.NO_KERNEL_IMAGE, "no kernel image is available for execution on the device"),
    ],
)
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_refused_launch_is_an_error_with_the_name_of_the_op(checked, error, text, skipped):
    """Each launch is looked at: the step's, and the one that adds up its parts."""
    params, grads = [torch.ones(9000), torch.ones(3)], [torch.ones(9000), None]
    with checked.in_place():
        checked.refuse_launch(error, after=skipped)
        with pytest.raises(RuntimeError, match=rf"sgd_: a kernel could not be launched on cuda:0, .*: {text}"):
            ops.sgd_(params, grads, lr=0.1, stats="tensor")
        ops.sgd_(params, grads, lr=0.1, stats="tensor")  # the error is not left behind


def test_no_device_is_an_error_with_the_name_of_the_op(checked):
    with checked.in_place():
        checked.devices(count=0)
        with pytest.raises(RuntimeError, match=r"sgd_: .*no CUDA-capable device is detected"):
            ops.sgd_([torch.ones(3)], [torch.ones(3)], lr=0.1)


def test_a_device_that_is_not_the_current_one(checked):
    w = torch.ones(3)
    with checked.in_place():
        checked.devices(count=2, current=0, of_tensors=1)
        ops.sgd_([w], [torch.ones(3)], lr=0.5)
        assert checked.current_device() == 0
        checked.devices(count=1, current=0, of_tensors=1)
        with pytest.raises(RuntimeError, match=r"sgd_: .* on cuda:1, .*: invalid device ordinal"):
            ops.sgd_([w], [torch.ones(3)], lr=0.5)
    assert (w == 0.5).all()


def test_tensors_on_two_devices(checked):
    """Each device runs its own; what is measured, and every single tensor with its gradient, is on one."""
    w, g = ([torch.ones(9000) for _ in range(3)] for _ in range(2))
    with checked.in_place():
        checked.devices(count=2)
        for tensor in (w[1], g[1]):
            checked.place(tensor, 1)
        ops.sgd_(w, g, lr=0.5)
        assert checked.current_device() == 0
        assert all((x == 0.5).all() for x in w)
        with pytest.raises(TypeError, match=r"sgd_: params\[1\] .*; expected one device"):
            ops.sgd_(w, g, lr=0.5, stats="tensor")
        checked.place(g[2], 1)
        with pytest.raises(TypeError, match="expected one device"):
            ops.sgd_(w, g, lr=0.5)
        assert all((x == 0.5).all() for x in w)


def test_empty_lists(checked):
    with checked.in_place():
        before = checked.launches()
        assert ops.sgd_([], [], lr=0.1, stats="row").shape == (0, 5)
        assert ops.pair_sums([], []).shape == (0, 4)
        ops.svag_combine_([], [], l=2.0)
        ops.welford_([], [], [], n=1)
        assert checked.launches() == before
