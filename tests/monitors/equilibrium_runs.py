"""Runs whose equilibrium is known, for the tests of EquilibriumMonitor."""

import math

import torch
from torch import nn


def noise_gradient(w, generator, q=1.0):
    xi = torch.randn(w.shape, generator=generator, dtype=torch.float64)
    xi -= (xi * w).sum() / w.square().sum() * w
    return (xi * (math.sqrt(q / (w.numel() - 1)) / w.norm())).to(w.dtype)


def train(opt, params, monitor, steps, *, schedule=None, seed=0, q=1.0):
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        if schedule is not None:
            for group in opt.param_groups:
                group["lr"] = schedule(t)
        for p in params:
            p.grad = noise_gradient(p.detach(), generator, q)
        opt.step()
        assert monitor.update()


def weights(size=400, norm=1.0, count=1, dtype=torch.float64):
    make = torch.Generator().manual_seed(7)
    ws = [torch.randn(size, generator=make, dtype=torch.float64) for _ in range(count)]
    return [nn.Parameter((w * norm / w.norm()).to(dtype)) for w in ws]


def net(seed=0):
    """A batch-normalised one in float64, with the epsilon of its norms out of the way, and a classifier."""
    torch.set_num_threads(1)  # conftest.py sets it back
    torch.manual_seed(seed)
    norms = [nn.BatchNorm1d(n, eps=1e-30, affine=False) for n in (8, 6)]
    return nn.Sequential(nn.Linear(5, 8, bias=False), norms[0], nn.Tanh(), nn.Linear(8, 6, bias=False), norms[1],
                         nn.Tanh(), nn.Linear(6, 3)).double()  # fmt: skip


def net_step(model, opt, t):
    make = torch.Generator().manual_seed(t)
    x = torch.randn(16, 5, generator=make, dtype=torch.float64)
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long() + (x[:, 1] > 1).long()).backward()
    opt.step()
