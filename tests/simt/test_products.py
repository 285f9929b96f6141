"""The kernels that own dW in the emulator: see test_simt.py, test_launches.py."""

import pytest
import torch
from torch import nn

import normkern
from normkern import ops

from . import check_product_results as product_judgement
from .backend import Refused
from .check_results import DTYPES
from .product_calls import Conv, Outer, every_call, parts

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("call", every_call(), ids=str)
@dtypes
def test_bits_of_the_cpu_in_any_order_with_nothing_to_object(checked, call, dtype):
    if ops.isa() in ("v2", "portable"):
        pytest.skip("without FMA hardware the CPU back end is outside the bitwise promise")
    product_judgement.same_as_cpu(checked, call, dtype, seeds=(0, 1, 2))


@pytest.mark.parametrize("call", every_call(), ids=str)
@dtypes
def test_bytes_of_the_tiles_and_no_more(checked, call, dtype):
    checked.forget()
    product_judgement.moves_what_it_must(checked, call, dtype)


@dtypes
def test_packs_where_there_are_whole_ones(checked, dtype):
    for shape in ((2, 16, 64, 64), (3, 21, 128, 72)):
        product_judgement.moves_in_packs(checked, Outer(shape), dtype)


def test_calls_have_one_part_and_several():
    counts = {str(call): parts(call, len(call.tensors(torch.float32)[0]), torch.float32) for call in every_call()}
    for kind in ("outer", "conv"):
        of_kind = [n for name, n in counts.items() if name.startswith(kind)]
        assert min(of_kind) == 1
        assert max(of_kind) >= 2


def test_a_context_runs_the_kernels_of_its_device(checked):
    """Convolution, norms, an embedding and linear layers with one step and with many: the CPU's numbers."""
    torch.manual_seed(0)
    layers = {
        "text": ((2, 7), nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.Flatten(), nn.Linear(35, 3))),
        "image": ((2, 3, 6, 6), nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3))),
    }  # fmt: skip
    for name, (shape, model) in layers.items():
        x = torch.randint(11, shape) if name == "text" else torch.randn(shape)

        def result(model=model, x=x):
            with normkern.GradientNoise(model, stats=("nsr", "variance")) as noise:
                model(x).square().sum(1).mean().backward()
            return noise.result()

        expected = result()
        with checked.in_place():
            before = checked.launches()
            got = result()
            assert checked.launches() > before + 5
        torch.testing.assert_close(got.variance, expected.variance, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(got.trace_sigma, expected.trace_sigma, rtol=1e-4, atol=1e-9)


CALLS = {"outer_moments": Outer((70, 7, 20, 65)), "conv_moments": Conv("long")}


@pytest.mark.parametrize("op", CALLS)
def test_a_refused_launch_is_an_error_with_the_name_of_the_op(checked, op):
    call = CALLS[op]
    tensors = call.tensors(torch.float32)
    with checked.in_place():
        before = checked.launches()
        call(*tensors)
        launches = checked.launches() - before
        assert launches == 3
        for after in range(launches):
            checked.refuse_launch(Refused.OUT_OF_RESOURCES, after=after)
            with pytest.raises(
                RuntimeError, match=rf"{op}: a kernel could not be launched on cuda:0, .*: too many resources"
            ):
                call(*tensors)
        call(*tensors)


@pytest.mark.parametrize("op", CALLS)
def test_a_device_that_is_not_the_current_one(checked, op):
    with checked.in_place():
        checked.devices(count=2, current=0, of_tensors=1)
        CALLS[op](*CALLS[op].tensors(torch.float32))
        assert checked.current_device() == 0


def test_more_than_a_grid_or_a_part_takes(checked):
    """A stride of 0 makes any number of steps of one."""
    one = torch.ones(1, 1, 1)
    norms = torch.ones(2**20, dtype=torch.float64)
    with checked.in_place():
        before = checked.launches()
        for shape, said in (
            ((1, 2**29 + 1, 1), "a sample has more than 2\\^29 steps"),
            ((2**20, 2**20, 1), "there are more steps than a grid of blocks takes"),
        ):
            x = one.expand(shape)
            with pytest.raises(RuntimeError, match=f"outer_moments: .*: {said}"):
                checked.binary.outer_moments(x, x, one[0], None, norms[: shape[0]], None)
        one = torch.ones(1, 1, 1, 1)
        far = one.expand(1, 1, 2**28 + 1, 1)
        layer = checked.binary.ConvNumbers((1, 1), (1, 1), (0, 0), (1, 1), 1)
        with pytest.raises(RuntimeError, match="conv_moments: .*: a space dimension has more than 2\\^28 positions"):
            checked.binary.conv_moments(far, one, layer, one, None, norms[:1], ops.scratch_beside(one))
        assert checked.launches() == before
