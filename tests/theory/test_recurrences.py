"""theory.recurrences: against torch.optim.SGD in float64, step by step; and what scale invariance says of gradients."""

import itertools
import math

import pytest
import torch
from support.noise_model import Invariant

import normkern
from normkern.theory import (
    Norms,
    effective_lr,
    mean_log_secant,
    next_effective_lr,
    next_norms,
    next_weight_sq,
    step_angle,
    unit_grad_sq_from_growth,
)

STEPS = 250
CLOSE = 1e-12
RUNS = {
    "plain": {},
    "heavy ball": {"momentum": 0.9},
    "decay": {"momentum": 0.9, "weight_decay": 0.02},
    "dampening": {"momentum": 0.8, "weight_decay": 0.02, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.02, "nesterov": True},
    "nesterov, no decay": {"momentum": 0.5, "nesterov": True},
}


def schedule(t):
    return 0.1 * (1 + math.cos(math.pi * t / STEPS)) / 2 + 0.01


def run(options, loss=None, lr=schedule):
    """Yields lr, w, b, g before each step of torch's SGD, and w, b after it."""
    model = Invariant()
    loss = loss or model
    opt = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    for t in range(STEPS):
        opt.param_groups[0]["lr"] = lr(t)
        opt.zero_grad()
        (model(t) if loss is model else loss(model.first)).backward()
        w, g = model.first.detach().clone(), model.first.grad.clone()
        entry = opt.state.get(model.first, {})
        b = entry.get("momentum_buffer")
        b = torch.zeros_like(w) if b is None else b.clone()
        opt.step()
        after = opt.state[model.first].get("momentum_buffer")
        yield lr(t), w, b, g, model.first.detach(), torch.zeros_like(w) if after is None else after


def dot(a, b):
    return (a * b).sum().item()


@pytest.mark.parametrize("options", [RUNS["plain"], {"weight_decay": 0.3}], ids=["plain", "decay"])
def test_next_weight_sq_is_that_of_torch(options):
    n = None
    for lr, w, _, g, new, _ in run(options):
        n = dot(w, w) if n is None else n  # followed for the whole run
        n = next_weight_sq(weight_sq=n, grad_sq=dot(g, g), lr=lr, **options)
        assert n == pytest.approx(dot(new, new), rel=CLOSE)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_next_norms_are_those_of_torch(options):
    """n, c and q are followed for 250 steps from |g|^2 and <b,g> alone."""
    numbers = {"momentum": 0.0, **options}
    norms = None
    for lr, w, b, g, new, after in run(options):
        if norms is None:
            norms, first = Norms(dot(w, w), 0.0, 0.0), {"dampening": 0.0}
        norms = next_norms(
            **norms._asdict(), grad_sq=dot(g, g), buffer_grad_dot=dot(b, g), lr=lr, **{**numbers, **first}
        )
        first = {}
        assert norms.weight_sq == pytest.approx(dot(new, new), rel=CLOSE)
        if numbers["momentum"]:
            assert norms.buffer_sq == pytest.approx(dot(after, after), rel=CLOSE)
            size = math.sqrt(norms.weight_sq * norms.buffer_sq)
            assert norms.weight_buffer_dot == pytest.approx(dot(new, after), rel=CLOSE, abs=CLOSE * size)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_norms_of_a_loss_that_is_not_invariant(options):
    """With <w,g> they are exact for any loss."""
    a = torch.linspace(0.5, 2, 48, dtype=torch.float64).view(4, 12)
    numbers, first = {"momentum": 0.0, **options}, {"dampening": 0.0}
    for lr, w, b, g, new, after in itertools.islice(run(options, lambda w: (a * (w - 1).square()).sum()), 20):
        sums = {"grad_sq": dot(g, g), "weight_grad_dot": dot(w, g)}
        norms = next_norms(
            weight_sq=dot(w, w), weight_buffer_dot=dot(w, b), buffer_sq=dot(b, b), buffer_grad_dot=dot(b, g), lr=lr,
            **sums, **{**numbers, **first},
        )  # fmt: skip
        assert norms.weight_sq == pytest.approx(dot(new, new), rel=CLOSE)
        if numbers["momentum"]:
            assert norms[1:] == pytest.approx((dot(new, after), dot(after, after)), rel=CLOSE, abs=CLOSE)
        else:
            decay = options.get("weight_decay", 0.0)
            plain = next_weight_sq(weight_sq=dot(w, w), lr=lr, weight_decay=decay, **sums)
            assert plain == pytest.approx(norms.weight_sq, rel=CLOSE)
        first = {}


def test_next_norms_of_the_doctest_by_vectors():
    w = torch.tensor([2.0, 0, 0, 0], dtype=torch.float64)
    b = torch.tensor([-0.5, 0.5, math.sqrt(3.5), 0], dtype=torch.float64)
    g = torch.tensor([0, 1.0, 0, 0], dtype=torch.float64)
    after = 0.5 * b + g + 0.5 * w
    new = w - 0.5 * after
    assert (dot(w, b), dot(b, b), dot(b, g)) == pytest.approx((-1.0, 4.0, 0.5))
    assert (dot(new, new), dot(new, after), dot(after, after)) == pytest.approx((3.25, 0.0, 3.0))


@pytest.mark.parametrize("lr", [0.01, 0.3, 3, 30])
def test_effective_lr_follows_itself(lr):
    """And the squared unit gradient is what the growth of the norm says."""
    decay = 0.02 / lr
    e = None
    for _, w, _, g, new, _ in run({"weight_decay": decay}, lr=lambda t: lr):
        n, unit = dot(w, w), dot(w, w) * dot(g, g)
        e = effective_lr(lr=lr, weight_sq=n) if e is None else e
        e = next_effective_lr(effective_lr=e, intrinsic_lr=lr * decay, unit_grad_sq=unit)
        assert e == pytest.approx(effective_lr(lr=lr, weight_sq=dot(new, new)), rel=CLOSE)
        grown = dot(new, new) + (1 - (1 - lr * decay) ** 2) * n  # what it were without decay
        assert unit_grad_sq_from_growth(weight_sq=n, next_weight_sq=grown, lr=lr) == pytest.approx(unit, rel=1e-6)


def test_effective_lr_may_leave_the_range():
    assert next_effective_lr(effective_lr=0.5, intrinsic_lr=1.0, unit_grad_sq=0.0) == math.inf


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_angles_are_those_of_torch(decay):
    sums, first = 0.0, None
    for lr, w, _, g, new, _ in run({"weight_decay": decay}, lr=lambda t: 0.1):
        cosine = dot(w, new) / math.sqrt(dot(w, w) * dot(new, new))
        theta = step_angle(weight_sq=dot(w, w), grad_sq=dot(g, g), lr=lr, weight_decay=decay)
        assert math.cos(theta) == pytest.approx(cosine, rel=CLOSE)
        cross = math.sqrt(max(0.0, (w - new * dot(w, new) / dot(new, new)).square().sum().item()))
        assert math.sin(theta) == pytest.approx(cross / w.norm().item(), rel=1e-9)
        first = first or dot(w, w)
        sums -= math.log(cosine)
    told = mean_log_secant(first_weight_sq=first, last_weight_sq=dot(new, new), steps=STEPS, lr=0.1, weight_decay=decay)
    assert told == pytest.approx(sums / STEPS, rel=1e-11)


def test_weight_decay_pins_the_angles_of_any_loss():
    """Full batch or not: the mean of -ln cos is ln 1/(1 - lr wd), up to the change of a norm that is bounded."""
    options = {"weight_decay": 0.5}
    for batch in (lambda t: 0, lambda t: t):
        model = Invariant()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, **options)
        logs = []
        for t in range(2000):
            opt.zero_grad()
            model(batch(t)).backward()
            w = model.first.detach().clone()
            opt.step()
            new = model.first.detach()
            logs.append(-math.log(dot(w, new) / math.sqrt(dot(w, w) * dot(new, new))))
        assert sum(logs[500:]) / 1500 == pytest.approx(-math.log1p(-0.05), rel=0.01)


# --- what scale invariance says of gradients (T2.1, T2.3) ------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 1e-6)])
@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_gradients_are_orthogonal_to_weights(dtype, bound, stats):
    model = Invariant().to(dtype)
    opt = normkern.SGD([("w", model.first)], lr=0.1, stats=stats)
    for t in range(20):
        make = torch.Generator().manual_seed(t)
        x = torch.randn(16, 12, generator=make, dtype=dtype)
        opt.zero_grad()
        h = torch.tanh(2 * x @ (model.first / model.first.norm(dim=1, keepdim=True)).T)
        (h @ model.last - torch.tanh(x @ model.teacher)).square().mean().backward()
        opt.step()
        assert opt.stats().cosine.abs().max() < 8 * bound * math.sqrt(12)


def test_the_hessian_turns_the_weights_into_the_gradient():
    """H w = -g, by a Hessian-vector product, per row and for all rows jointly."""
    model = Invariant(norm=3.0)
    (g,) = torch.autograd.grad(model(1), model.first, create_graph=True)
    (hw,) = torch.autograd.grad(g, model.first, model.first.detach(), retain_graph=True)
    torch.testing.assert_close(hw, -g.detach(), rtol=1e-9, atol=1e-12)
    for row in range(4):
        v = torch.zeros_like(model.first)
        v[row] = model.first.detach()[row]
        (hv,) = torch.autograd.grad(g, model.first, v, retain_graph=True)
        torch.testing.assert_close(hv[row], -g.detach()[row], rtol=1e-9, atol=1e-12)
        assert (hv * v).sum().abs() < 1e-14  # no Hessian of such a loss is positive definite
    assert g.detach().abs().max() > 1e-3
