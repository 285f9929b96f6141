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


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("size", [3, 300])
def test_parameters_that_a_conversion_moved_are_stepped_where_they_are(swap, size):
    """No kernel takes a float64 parameter with its momentum in float32; the parameter's old memory is freed."""
    runs = []
    for cls in (normkern.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, size), nn.Tanh(), nn.Linear(size, 2))
        opt = cls(model.parameters(), lr=0.05, momentum=0.9)
        for t in range(6):
            if t == 3:
                torch.__future__.set_swap_module_params_on_conversion(swap)
                try:
                    model.double()
                finally:
                    torch.__future__.set_swap_module_params_on_conversion(False)
            opt.zero_grad()
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(t)).to(model[0].weight.dtype)
            model(x).square().mean().backward()
            opt.step()
        runs.append(model)
    for p, q in zip(*(m.parameters() for m in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
