"""The kernel of streams that are stored differently: the CPU's bits, whatever the order, with nothing to object."""

import pytest
import torch

from normkern import ops

from . import check_results as judgement
from .mixed_calls import calls


@pytest.mark.parametrize("call", list(calls()), ids=str)
def test_bits_of_the_cpu_in_any_order_with_nothing_to_object(checked, call):
    if ops.isa() in ("v2", "portable"):
        pytest.skip("without FMA hardware the CPU back end is outside the bitwise promise")
    judgement.same_as_cpu(checked, call, torch.bfloat16, seeds=(0, 1))


def test_what_the_scaler_found_stops_the_step(checked):
    w, g, v, m = (torch.randn(9000) for _ in range(4))
    tensors = [w.bfloat16(), g.bfloat16(), v, m]
    before = [x.clone() for x in tensors]
    with checked.in_place():
        for more in ({"rounding": ops.Rounding(1, 2)}, {"masters": [m]}):
            ops.sgd_(*([x] for x in tensors[:3]), lr=0.1, momentum=0.9, found_inf=torch.ones(1), **more)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
