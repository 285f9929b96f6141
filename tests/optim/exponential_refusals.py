"""Optimizers with exponential decay, and that nothing changes where they refuse."""

import copy

import torch
from support.invariant_nets import gradient_of_direction
from support.memory import same_bits
from torch import nn

import normkern
from normkern import ops

BUFFER = "momentum_buffer"


def weights(count=2, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(4, 5, generator=make, dtype=torch.float64).to(dtype)) for _ in range(count)]


def give(*lists, t=0, size=0.05):
    """Gradients of directions, the same for all lists."""
    make = torch.Generator().manual_seed(100 + t)
    for entries in zip(*lists, strict=True):
        n = size * torch.randn(entries[0].shape, generator=make, dtype=torch.float64)
        for w in entries:
            w.grad = gradient_of_direction(w, n).to(w.dtype)


def exponential(params, lr=0.5, weight_decay=0.1, **options):
    group = {"params": params, "norm_buffers": [], "followers": []}
    return normkern.SGD([group], lr=lr, weight_decay=weight_decay, decay="exponential", **options)


class Unchanged:
    """Weights, momentum buffers and param groups are afterwards as before."""

    def __init__(self, opt):
        self.opt = opt

    @staticmethod
    def _tensors(opt):
        params = [p for group in opt.param_groups for p in group["params"]]
        buffers = [opt.state[p][BUFFER] for p in params if BUFFER in opt.state.get(p, {})]
        return [t.detach().clone() for t in (*params, *buffers)], [t._version for t in (*params, *buffers)]

    @staticmethod
    def _groups(opt):
        return [
            {k: v for k, v in group.items() if k not in ("params", "norm_buffers", "followers")}
            for group in opt.param_groups
        ]

    def __enter__(self):
        self.tensors, self.versions = self._tensors(self.opt)
        self.groups, self.state = copy.deepcopy(self._groups(self.opt)), len(self.opt.state)

    def __exit__(self, *_):
        tensors, versions = self._tensors(self.opt)
        assert versions == self.versions
        assert all(same_bits(a, b) for a, b in zip(tensors, self.tensors, strict=True))
        assert self._groups(self.opt) == self.groups
        assert len(self.opt.state) == self.state


def stepped(steps=3, **options):
    params = weights()
    opt = exponential(params, **options)
    for t in range(steps):
        give(params, t=t)
        opt.step()
    give(params, t=steps)
    return params, opt


def assert_follows(ours, theirs, params, twins, steps=5, tolerance=1e-12, start=50):
    """Both runs are one, and stay so."""
    for t in range(start, start + steps):
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            scale = group.get("gauge", ops.NEW_GAUGE)[0]
            for p, q in zip(group["params"], other["params"], strict=True):
                torch.testing.assert_close(scale * p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
        give(params, twins, t=t)
        ours.step()
        theirs.step()


def plain(params):
    """Gradients of a loss that sees the scale."""
    for p in params:
        p.grad = p.detach().clone() + 0.1
