"""Optimizers under a GradScaler: a skipped step leaves no trace, and gradients are not written."""

import copy

import pytest
import torch
from support.memory import same_bits
from support.twins import assert_follow, give_gradients, parameters
from torch import nn

import normkern


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize(("kind", "options"), [("SGD", {"lr": 0.1, "momentum": 0.9}), ("AdamW", {"lr": 0.02})])
def test_grad_scaler(kind, options, fused, unscale_first):
    ours, theirs = parameters(), parameters()
    a = getattr(normkern, kind)(ours, **options, fused=fused, stats="tensor")
    b = getattr(torch.optim, kind)(theirs, **options, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for t in range(6):
        give_gradients(ours, theirs, seed=t)
        scale = scaler.get_scale()
        scaler.scale(torch.ones(()))
        bad = t in (0, 3)  # the very first step, and a later one
        for i, p in enumerate(ours):
            p.grad.mul_(scale)
            if bad and i == 6:
                p.grad[0] = torch.inf
        before = [p.detach().clone() for p in ours], copy.deepcopy(a.state_dict())
        scaled = [p.grad.clone() for p in ours]
        if unscale_first:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if bad:
            assert all(same_bits(p, q) for p, q in zip(ours, before[0], strict=True))
            state = a.state_dict()["state"]
            assert before[1]["state"].keys() == state.keys(), "a skipped step made a buffer"
            for key, entries in state.items():
                assert all(torch.equal(x, before[1]["state"][key][name]) for name, x in entries.items())
        else:
            b.step()
            torch.testing.assert_close(a.stats().grad_sq, torch.stack([p.grad.double().square().sum() for p in theirs]))
        if fused and not unscale_first:
            assert all(torch.equal(p.grad, g) for p, g in zip(ours, scaled, strict=True)), "the gradients were written"
        assert_follow(ours, theirs, steps=t + 1)
    assert not hasattr(a, "found_inf")


def test_skipped_first_step_leaves_no_statistics():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], fused=True, stats="tensor")
    opt.found_inf = torch.ones(1)
    opt.step()
    with pytest.raises(RuntimeError, match="expected a step before it"):
        opt.stats()
