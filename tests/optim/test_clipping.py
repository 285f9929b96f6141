"""step(max_norm=...): torch.nn.utils.clip_grad_norm_ and a step, in two passes that write no gradient."""

import contextlib
import math

import pytest
import torch
from support.memory import same_bits
from support.twins import DTYPES, assert_follow, give_gradients, parameters
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import normkern
from normkern import reference


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


FEW = [(33,), (16, 3), (8, 4, 3, 3)]


def groups(params, **more):
    return [
        {"params": params[:2], "lr": 0.01, **more},
        {"params": params[2:4], "momentum": 0.0, "weight_decay": 0.5},
        {"params": params[4:], "nesterov": True},
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 3.0, 1e6])
def test_follows_torch(dtype, max_norm):
    """Groups of different options; gradients that come late; none is written."""
    exact = torch.float64 if dtype in (torch.bfloat16, torch.float16) else dtype
    ours = parameters(dtype=dtype)
    theirs = [nn.Parameter(p.detach().to(exact, copy=True)) for p in ours]
    a = normkern.SGD(groups(ours), lr=0.1, momentum=0.9, stats="row")
    b = torch.optim.SGD(groups(theirs), lr=0.1, momentum=0.9, foreach=False)
    for t, skip in enumerate([(0, 6), (3,), ()]):
        give_gradients(ours, seed=t, skip=skip)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.to(exact, copy=True)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in ours if p.grad is not None]
        norm = a.step(max_norm=max_norm)
        expected = clip_grad_norm_(theirs, max_norm)
        b.step()
        assert (norm.shape, norm.dtype) == ((), torch.float64)
        rtol = 1e-6 if exact == torch.float32 else 1e-12
        torch.testing.assert_close(norm, expected.double(), rtol=rtol, atol=0)
        torch.testing.assert_close(a.stats().grad_sq.nansum().sqrt(), norm, rtol=1e-12, atol=0)
        assert all(same_bits(g, copy) and g._version == version for g, copy, version in before)
        assert all(g is p.grad for (g, *_), p in zip(before, [p for p in ours if p.grad is not None], strict=True))
        assert_follow(ours, theirs, dtype, steps=t + 2)


def test_within_the_norm_it_is_a_step_to_the_bit():
    ours, theirs = parameters(), parameters()
    a, b = (normkern.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, stats="tensor") for p in (ours, theirs))
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.step(max_norm=math.inf if t else 1e9)
        assert b.step() is None
        assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))
        assert same_bits(a.stats().update_sq, b.stats().update_sq)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_no_number_goes_where_torch_sends_it(bad):
    ours, theirs = parameters(FEW), parameters(FEW)
    a, b = normkern.SGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1, foreach=False)
    give_gradients(ours, theirs, seed=0)
    ours[0].grad[3] = theirs[0].grad[3] = bad
    norm, expected = a.step(max_norm=1.0), clip_grad_norm_(theirs, 1.0)
    b.step()
    torch.testing.assert_close(norm, expected.double(), equal_nan=True)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


def test_no_gradient_has_norm_0():
    opt = normkern.SGD([{"params": parameters(FEW)}, {"params": []}], lr=0.1)
    norm = opt.step(max_norm=1.0)
    assert (norm.item(), norm.dtype, norm.shape) == (0.0, torch.float64, ())


@pytest.mark.parametrize("kind", ["sparse", "complex", "both paths", "watched", "differentiable"])
def test_torchs_own_loop_clips_too(kind):
    def made():
        params = parameters(FEW, torch.float64)
        if kind == "complex":
            params = [nn.Parameter(torch.complex(p.detach(), p.detach() + 1)) for p in params]
        return params

    ours, theirs = made(), made()
    if kind == "differentiable":
        ours = [p.detach() for p in ours]  # leaves that require a gradient cannot be written in sight of autograd
    multipliers = [0.5, 2.0, 1.0]
    more = {"differentiable": True} if kind == "differentiable" else {}
    stats = "tensor" if kind in ("sparse", "both paths") else None
    a = normkern.SGD([{"params": ours, "lr_multipliers": multipliers}], lr=0.1, momentum=0.9, stats=stats, **more)
    b = torch.optim.SGD(
        [{"params": [p], "lr": 0.1 * m} for p, m in zip(theirs, multipliers, strict=True)], momentum=0.9
    )
    for t in range(2):
        give_gradients(ours, seed=t)
        give_gradients(theirs, seed=t)  # which clip_grad_norm_ writes
        if kind == "complex":
            for p, q in zip(ours, theirs, strict=True):
                p.grad, q.grad = torch.complex(p.grad.real, p.grad.real), torch.complex(q.grad.real, q.grad.real)
        expected = clip_grad_norm_(theirs, 1.5)
        b.step()
        if kind in ("sparse", "both paths"):
            for p in ours if kind == "sparse" else ours[1:2]:
                p.grad = p.grad.to_sparse()
        with Watcher() if kind == "watched" else contextlib.nullcontext():
            norm = a.step(max_norm=1.5)
        torch.testing.assert_close(norm, expected.double())
        if stats:
            torch.testing.assert_close(a.stats().grad_sq.sum().sqrt(), norm)
            torch.testing.assert_close(
                a.stats().effective_lr * a.stats().weight_sq, 0.1 * torch.tensor(multipliers).double()
            )
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)


def test_closures():
    w = nn.Parameter(torch.full((4,), 2.0))
    opt = normkern.SGD([w], lr=1.0)

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss, norm = opt.step(closure, max_norm=4.0)
    assert (loss.item(), norm.item()) == (16.0, 8.0)
    torch.testing.assert_close(w.detach(), torch.full((4,), 2 - 4 * 0.5))


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("kind", [normkern.SGD, normkern.SVAG])
def test_grad_scaler(fused, unscale_first, kind):
    ours, theirs = parameters(FEW), parameters(FEW)
    a = kind(ours, lr=0.1, momentum=0.9, fused=fused, stats="tensor")
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for t in range(4):
        give_gradients(ours, theirs, seed=t)
        scaler.scale(torch.ones(()))
        for p in ours:
            p.grad.mul_(scaler.get_scale())
        bad = t in (0, 2)
        if bad:
            ours[0].grad[0] = torch.inf
        if unscale_first:
            scaler.unscale_(a)
        norm = scaler.step(a, max_norm=2.0)
        scaler.update()
        if bad:
            assert norm is None or (norm.isnan() and norm.dtype == torch.float64)
        else:
            torch.testing.assert_close(norm, clip_grad_norm_(theirs, 2.0).double(), rtol=1e-6, atol=0)
            torch.testing.assert_close(a.stats().grad_sq.sum().sqrt(), norm, rtol=1e-6, atol=0)
            b.step()
        assert_follow(ours, theirs, steps=t + 1)


def test_hooks_and_schedulers_let_it_through():
    ours, theirs = parameters(FEW), parameters(FEW)
    a, b = normkern.SGD(ours, lr=0.1), normkern.SGD(theirs, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(a, 1)
    seen = []
    a.register_step_pre_hook(lambda opt, args, kwargs: seen.append((args[1:], kwargs)))
    give_gradients(ours, theirs, seed=0)
    norm = a.step(max_norm=1.0)
    schedule.step()
    assert seen == [((), {"max_norm": 1.0})]
    assert torch.equal(norm, b.step(max_norm=1.0))
    loss, norm = a.step(lambda: 5.0, max_norm=1.0)
    assert (loss, norm.shape) == (5.0, ())

    class Mine(normkern.SGD):
        def step(self, closure=None, *, max_norm=None):
            return super().step(closure, max_norm=max_norm)

    mine = Mine(theirs, lr=0.1)
    mine.register_step_post_hook(lambda *_: None)
    assert torch.equal(mine.step(max_norm=1.0), norm)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step(backend):
    ours, theirs = parameters(FEW), parameters(FEW)
    a, b = normkern.SGD(ours, lr=0.1), normkern.SGD(theirs, lr=0.1)
    give_gradients(ours, theirs, seed=0)
    norm = torch.compile(a.step, backend=backend)(max_norm=1.0)
    assert torch.equal(norm, b.step(max_norm=1.0))
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))


def test_the_same_bits_with_any_number_of_threads():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = parameters([(300001,), (7,), (64, 33), (40000,)])
        give_gradients(params, seed=0)
        opt = normkern.SGD(params, lr=0.1, momentum=0.9, stats="tensor")
        results.append([opt.step(max_norm=1.0), *params, opt.stats().update_sq])
    for other in results[1:]:
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", [normkern.SGD, normkern.SVAG])
@pytest.mark.parametrize(
    ("max_norm", "error"), [(-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError), ([], TypeError), (torch.ones(2), TypeError)]
)  # fmt: skip
def test_refusals(max_norm, error, kind):
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = kind([w], lr=0.1)
    called = []
    with pytest.raises(error, match=rf"{kind.__name__}.step: max_norm expected a number of at least 0, got "):
        opt.step(lambda: called.append(1), max_norm=max_norm)
    assert not called
    assert w.detach().tolist() == [1, 1, 1]
    assert opt.step(max_norm=torch.tensor(1.0)).item() == pytest.approx(3**0.5)


def test_exponential_decay_clips_as_the_run_with_decay():
    torch.manual_seed(3)
    start = torch.randn(6, 5, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = {"params": [ours], "decay": "exponential", "scale_invariant": True, "norm_buffers": [], "followers": []}
    a = normkern.SGD([own], lr=0.5, momentum=0.5, weight_decay=0.1)
    b = normkern.SGD([theirs], lr=0.5, momentum=0.5, weight_decay=0.1)
    target = torch.randn(6, 5, dtype=torch.float64)
    clipped = 0
    for _ in range(12):
        for w in (ours, theirs):
            w.grad = None
            (10 * (w / w.norm() - target).square().sum()).backward()
        norms = a.step(max_norm=2.0), b.step(max_norm=2.0)
        torch.testing.assert_close(*norms)
        clipped += int(norms[0] > 2)
        torch.testing.assert_close(ours.detach() * a.true_scale()[0], theirs.detach())
    assert clipped
    assert a.param_groups[0]["gauge"][2] > 0, "no power of two was taken out"


def test_svag_clips_the_combination():
    ours, theirs = parameters(FEW, torch.float64), parameters(FEW, torch.float64)
    a = normkern.SVAG(ours, lr=0.4, l=4, momentum=0.9)
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.hold()
        first = [p.grad for p in theirs]
        give_gradients(ours, theirs, seed=t + 10)
        for p, g in zip(theirs, first, strict=True):
            p.grad = reference.svag_combination(g, p.grad, 4)
        norm = a.step(max_norm=1.0)
        torch.testing.assert_close(norm, clip_grad_norm_(theirs, 1.0))
        b.step()
        assert_follow(ours, theirs, torch.float64, steps=t + 4)
    assert a.noise().trace_sigma > 0


def test_svag_with_two_closures():
    w = nn.Parameter(torch.ones(2))
    opt = normkern.SVAG([w], lr=0.1, l=2)

    def closure(x):
        def run():
            opt.zero_grad()
            w.grad = torch.full((2,), x)
            return x

        return run

    losses, norm = opt.step(closure(1.0), closure(3.0), max_norm=0.1)
    assert losses == (1.0, 3.0)
    torch.testing.assert_close(norm, torch.full((2,), 2 - 3**0.5).double().norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(w.detach(), torch.full((2,), 1 - 0.05 * 0.1 / 2**0.5))


def test_monitors_see_the_gradient_that_moved_the_weights():
    """A clipped step is that of the clipped gradient: the same report as of gradients that come clipped."""
    reports = []
    for clips in (True, False):
        w = nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64))
        opt = normkern.SGD([w], lr=0.1, momentum=0.5, weight_decay=0.1, stats="tensor")
        monitor = normkern.EquilibriumMonitor(opt)
        for t in range(8):
            w.grad = torch.sin(w.detach() + t)
            if not clips:
                clip_grad_norm_([w], 0.5)
            opt.step(max_norm=0.5 if clips else None)
            monitor.update()
        reports.append(str(monitor.report()))
    assert reports[0] == reports[1]
