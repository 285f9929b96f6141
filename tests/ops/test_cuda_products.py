"""The kernels that own dW on a GPU: the CPU's bits, nothing waited for, in a graph. See also the suites of both ops."""

import pytest
import torch
from support.memory import same_bits
from support.twins import DTYPES

from normkern import ops

from .test_cuda import no_waiting, on

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

#: One part, and several.
BATCHES = (3, 60)


def products(a, g, x, y):
    options = {"stride": (1, 2), "padding": (1, 0), "dilation": (1, 1), "groups": 2, "squares": True}
    return [*ops.outer_moments(a, g, squares=True), *ops.conv_moments(x, y, (3, 2), **options)]


def operands(device, batch, dtype):
    shapes = [(batch, 9, 500), (batch, 9, 130), (batch, 12, 5, 16), (batch, 70, 5, 8)]
    return on(device, shapes, dtype, seed=batch)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_the_cpu(dtype, batch):
    given, exact = operands("cuda", batch, dtype), products(*operands("cpu", batch, dtype))
    products(*given)  # the device has the code of every kernel
    with no_waiting():
        got = products(*given)
    assert all(x.is_cuda for x in got)
    assert all(same_bits(a, b) for a, b in zip(products(*given), got, strict=True))
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        near = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(a.cpu(), b, rtol=near, atol=near * b.abs().amax().item())
        if batch == BATCHES[0] and i % 3 < 2 and ops.isa() not in ("v2", "portable"):
            assert same_bits(a.cpu(), b)


@pytest.mark.parametrize("batch", BATCHES)
def test_in_a_graph(batch):
    given = operands("cuda", batch, torch.float32)
    expected = products(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = products(*given)
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
