"""References that stay: torch.utils.swap_tensors takes parameters and gradients after any number of steps."""

import weakref

import pytest
import torch
from torch import nn

import normkern


@pytest.mark.parametrize("cls", [normkern.SGD, normkern.SVAG])
@pytest.mark.parametrize("keep", [True, False])
def test_modules_convert_by_swapping_after_steps(cls, keep):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    opt = cls(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        opt.zero_grad(set_to_none=not keep)
        model(torch.randn(6, 4)).square().mean().backward()
        if cls is normkern.SVAG:
            opt.hold(copy=True)
            model(torch.randn(6, 4)).square().mean().backward()
        opt.step()
    assert not any(weakref.getweakrefcount(x) for p in model.parameters() for x in (p, p.grad))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p.dtype == p.grad.dtype == torch.float64 for p in model.parameters())
