"""Closures, hooks, subclasses, the profiler and autograd around a step of normkern.SGD and SVAG."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import normkern


def test_closure_runs_with_gradients_and_its_value_is_returned():
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SGD([w], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 3
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.8))
    assert opt.step() is None


both = pytest.mark.parametrize("optimizer", [normkern.SGD, normkern.SVAG])


@both
def test_hooks_see_the_step(optimizer):
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = optimizer([w], lr=0.1)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append(w[0].item()))
    opt.register_step_post_hook(lambda *_: seen.append(w[0].item()))
    opt.step()
    assert seen == [1.0, pytest.approx(0.9)]


def test_global_hooks_and_hooks_that_change_the_arguments():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        opt.register_step_pre_hook(lambda o, args, kwargs: ((*args, lambda: seen.append("closure")), kwargs)),
        opt.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    opt.step()
    for handle in handles:
        handle.remove()
    opt.step()
    assert seen == ["global pre", "closure", "post", "global post"]
    assert w[0].item() == pytest.approx(0.8)


def test_hooks_see_all_arguments_of_svag_once():
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SVAG([w], lr=0.1, l=2)
    seen = []
    opt.register_step_pre_hook(lambda _, args, kwargs: seen.append((closure in args, sorted(kwargs))))

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    (first, second), norm = opt.step(closure, closure, max_norm=5.0)
    assert first.item() == second.item() == 3
    assert norm.item() == pytest.approx(12**0.5)
    closure()
    opt.hold()
    closure()
    opt.step()
    assert seen == [(True, ["closure_b", "max_norm"]), (False, [])]


@both
def test_subclass_with_its_own_step_runs_hooks_once(optimizer):
    class Mine(optimizer):
        def step(self, closure=None):
            return super().step(closure)

    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = Mine([w], lr=0.1)
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(1))
    opt.step()
    assert seen == [1]


@both
def test_profiler_sees_the_step(optimizer):
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = optimizer([w], lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    names = [event.name for event in profile.events()]
    assert names.count(f"Optimizer.step#{optimizer.__name__}.step") == 1


def test_version_counters_are_bumped():
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SGD([w], lr=0.1, momentum=0.9)
    w.grad = torch.ones(3)
    opt.step()
    buffer = opt.state[w]["momentum_buffer"]
    versions = w._version, buffer._version
    opt.step()
    assert w._version > versions[0]
    assert buffer._version > versions[1]
    loss = (w * w).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
