"""Auto rate tuning: the identity, the bound and what they say, on networks and toys; PowerDecayLR."""

import io
import math

import pytest
import torch
from support.noise_model import start, tangential
from torch import nn

import normkern
from normkern import AutoRateMonitor, PowerDecayLR, SvagSchedule
from normkern.theory import power_decay_weight_sq


def batch_norm_net(seed=0, unit=False):
    torch.set_num_threads(1)  # conftest.py sets it back
    torch.manual_seed(seed)
    norms = [nn.BatchNorm1d(n, eps=1e-30) for n in (16, 8)]
    model = nn.Sequential(nn.Linear(6, 16, bias=False), norms[0], nn.Tanh(), nn.Linear(16, 8, bias=False), norms[1],
                          nn.Tanh(), nn.Linear(8, 1)).double()  # fmt: skip
    invariant = {n: p for n, p in model.named_parameters() if p.ndim == 2 and n != "6.weight"}
    if unit:
        with torch.no_grad():
            for p in invariant.values():
                p.div_(p.norm())
    return model, list(invariant.items()), [(n, p) for n, p in model.named_parameters() if n not in invariant]


def backward(model, seed, size=32):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=make, dtype=torch.float64)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.item()


# --- the identity and the bound (T4.1) --------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize("lr", [0.01, 0.3, 3, 30])
@pytest.mark.parametrize("full", [True, False], ids=["descent", "stochastic"])
def test_the_identity_at_any_lr(lr, full, stats):
    model, invariant, rest = batch_norm_net()
    opt = normkern.SGD([{"params": invariant, "lr": lr}, {"params": rest, "lr": 0.01}], stats=stats)
    monitor = AutoRateMonitor(opt)
    sums, least, norms = dict.fromkeys(dict(invariant), 0.0), dict.fromkeys(dict(invariant), math.inf), {}
    for t in range(200):
        backward(model, 0 if full else t)
        for n, p in invariant:
            unit = (p.detach().square().sum() * p.grad.square().sum()).item()
            sums[n], least[n] = sums[n] + unit, min(least[n], math.sqrt(unit))
            norms.setdefault(n, p.detach().norm().item())
        opt.step()
        assert monitor.update()
    report = monitor.report()
    # An update is stored rounded beside the weights: relative to its own length, which is lr |g|, that counts.
    rounding = 1e-12 if lr >= 0.3 else 1e-10
    for n, p in invariant:
        told = report.parameters[n]
        assert told.reason is None
        assert told.unit_grad_sq_sum == pytest.approx(sums[n], rel=1e-12)
        assert abs(told.mismatch) < rounding
        assert told.least_unit_grad == pytest.approx(least[n], rel=1e-12)
        assert told.least_unit_grad <= told.bound
        assert (told.first_weight_norm, told.last_weight_norm) == pytest.approx(
            (norms[n], p.detach().norm().item()), rel=1e-12
        )
        assert told.bound == pytest.approx(
            math.sqrt(told.last_weight_norm**2 * (told.last_weight_norm**2 - norms[n] ** 2) / (200 * lr**2)), rel=1e-6
        )
        if stats == "row":
            assert all(
                abs(row.mismatch) < 10 * rounding and row.least_unit_grad <= row.bound for row in report.slots[n]
            )
    assert abs(report.groups[0].mismatch) < rounding
    joint = math.sqrt(sum(p.detach().square().sum().item() for _, p in invariant))
    assert report.groups[0].last_weight_norm == pytest.approx(joint, rel=1e-12)
    assert report.groups[0].steps == 200
    assert abs(report.groups[1].mismatch) > 1e-3  # not scale-invariant


def test_norms_are_the_sum_of_squares():
    """n_T^2 = n_0^2 + 2 sum eta^2 |g_v|^2 + sum eta^4 |g_v|^4/n^2, and without the last term for small angles."""
    model, invariant, _ = batch_norm_net()
    opt = normkern.SGD(invariant, lr=0.5, stats="tensor")
    first = square = fourth = 0.0
    for t in range(300):
        backward(model, t)
        opt.step()
        stats = opt.stats()
        n, unit = stats.weight_sq, stats.weight_sq * stats.grad_sq
        first = n.square() if t == 0 else first
        square, fourth = square + 0.25 * unit, fourth + 0.0625 * unit.square() / n.square()
    torch.testing.assert_close(opt.stats().next_weight_sq, (first + 2 * square + fourth).sqrt(), rtol=1e-12, atol=0)


def test_the_sums_of_a_schedule():
    model, invariant, rest = batch_norm_net()
    opt = normkern.SGD([{"params": invariant, "lr": 0.5}, {"params": rest, "lr": 0.05}], stats="tensor")
    schedule, monitor = PowerDecayLR(opt, exponent=[0.25, 0.5]), AutoRateMonitor(opt)
    for t in range(100):
        backward(model, t)
        opt.step()
        monitor.update()
        schedule.step()
    told = monitor.report().groups[0]
    assert abs(told.mismatch) < 1e-12
    n0, n1 = told.first_weight_norm**2, told.last_weight_norm**2
    squares = sum(0.25 * (t + 1) ** -0.5 for t in range(100))
    assert told.bound == pytest.approx(math.sqrt(n1 * (n1 - n0) / squares), rel=1e-9)
    assert told.least_unit_grad <= told.bound


# --- auto-tuning (T4.2, T4.3, T4.5) -----------------------------------------------------------------------------------


def test_gradient_descent_tunes_its_own_rate():
    """Full batches, weights begun on the unit sphere: thirty times the lr, and the same effective lr in the end."""
    torch.set_num_threads(1)
    ends = {}
    for lr in (0.1, 0.3, 3.0):
        torch.manual_seed(1)
        x = torch.randn(64, 8, dtype=torch.float64)
        y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
        norm = nn.BatchNorm1d(32, eps=1e-30, affine=False)
        model = nn.Sequential(nn.Linear(8, 32, bias=False), norm, nn.Tanh(), nn.Linear(32, 1)).double()
        w = model[0].weight
        with torch.no_grad():
            w.div_(w.norm())
        opt = normkern.SGD([{"params": [w], "lr": lr}, {"params": model[3].parameters(), "lr": 0.02}], stats="tensor")
        monitor = AutoRateMonitor(opt)
        for _ in range(1500):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
            monitor.update()
        ends[lr] = monitor.report().groups[0]
        assert abs(ends[lr].mismatch) < 1e-12
        assert ends[lr].least_unit_grad <= ends[lr].bound
        assert loss < 0.05
    tuned = [end.effective_lr for end in ends.values()]
    assert max(tuned) < 1.1 * min(tuned)
    assert ends[3.0].last_weight_norm > 4 * ends[0.1].last_weight_norm


def rayleigh(dim=16):
    return torch.linspace(0.0, 1.0, dim, dtype=torch.float64)


@pytest.mark.parametrize("lr", [0.1, 1.0, 10.0])
def test_gradient_descent_converges_at_any_rate(lr):
    """min |g_v| falls at least as T^-1/2, on v^T A v: on every stretch of 4."""
    a = rayleigh()
    w, _ = start(1, 16, 1.0, seed=3)
    least, seen = math.inf, {}
    for t in range(1, 4097):
        n = w.square().sum()
        g = 2 * (a * w - (a * w * w).sum() / n * w) / n
        least = min(least, (n.sqrt() * g.norm()).item())
        seen[t] = least
        w = w - lr * g
    slopes = [math.log(seen[4 * t] / seen[t]) / math.log(4) for t in (64, 256, 1024) if seen[4 * t] > 1e-12]
    assert all(slope < -0.45 for slope in slopes)
    assert seen[4096] < 1e-3


@pytest.mark.parametrize("a", [0.0, 0.25])
def test_stochastic_descent_converges_at_the_rate_of_theory(a):
    """|grad L(v)| of v^T A v with tangential noise falls as T^-1/4, whatever the schedule."""
    spectrum, logs = rayleigh(), []
    w, generator = start(256, 16, 1.0, seed=0)
    steps = [2**k for k in range(8, 14)]
    for t in range(steps[-1] + 1):
        n = w.square().sum(1, keepdim=True)
        g = 2 * (spectrum * w - (spectrum * w * w).sum(1, keepdim=True) / n * w)  # at w/|w|, times |w|
        if t in steps:
            logs.append((math.log(t), (g / n.sqrt()).square().sum(1).mean().log().item() / 2))
        noise, _ = tangential(w, 1.0, generator)
        w = w - 1.0 * (t + 1) ** -a * (g / n + noise)
    x, y = (torch.tensor(column) for column in zip(*logs, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(-0.25, abs=0.05)


def test_the_norm_of_the_schedule_in_the_optimizer():
    """PowerDecayLR and the closed formula, in noise."""
    (w,), generator = start(1, 400, 1.0, seed=0)
    p = nn.Parameter(w)
    opt = normkern.SGD([p], lr=0.3, stats="tensor")
    schedule, monitor = PowerDecayLR(opt, 0.25), AutoRateMonitor(opt)
    for _ in range(1000):
        p.grad = tangential(p.detach()[None], 1.0, generator)[0][0]
        opt.step()
        monitor.update()
        schedule.step()
    told = monitor.report().groups[0]
    n = power_decay_weight_sq(weight_sq=1.0, steps=1000, lr=0.3, exponent=0.25, unit_grad_sq=1.0)
    assert told.last_weight_norm**2 == pytest.approx(n, rel=0.01)
    assert abs(told.mismatch) < 1e-12


# --- what the monitor cannot tell -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"momentum": 0.9}, "momentum was 0.9: steps are not their own gradients alone"),
        ({"weight_decay": 0.1}, "weight_decay was 0.1: the norm does not grow by gradients alone"),
        ({"lr": 0.0}, "not measured: never stepped with finite numbers and lr > 0"),
    ],
)
def test_reasons(options, reason):
    model, invariant, _ = batch_norm_net()
    opt = normkern.SGD(invariant, **{"lr": 0.1, "stats": "tensor", **options})
    monitor = AutoRateMonitor(opt)
    backward(model, 0)
    opt.step()
    monitor.update()
    told = monitor.report().groups[0]
    assert told.reason == reason
    assert (told.mismatch, told.bound) == (None, None)
    assert reason in str(monitor)


def test_a_step_with_decay_is_remembered():
    model, invariant, _ = batch_norm_net()
    opt = normkern.SGD(invariant, lr=0.1, weight_decay=0.1, stats="tensor")
    monitor = AutoRateMonitor(opt)
    for t in range(3):
        backward(model, t)
        opt.step()
        monitor.update()
        opt.param_groups[0]["weight_decay"] = 0.0
    assert monitor.report().groups[0].reason.startswith("weight_decay was 0.1")


def test_a_norm_that_falls():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = normkern.SGD([w], lr=0.1, stats="tensor")
    monitor = AutoRateMonitor(opt)
    w.grad = w.detach().clone()
    opt.step()
    monitor.update()
    told = monitor.report().groups[0]
    assert told.reason == "not scale-invariant: the norm fell"
    assert told.bound is None
    assert told.mismatch < -1


def test_numbers_that_are_none_are_left_out():
    a, b = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    opt = normkern.SGD([("a", a), ("b", b)], lr=0.5, stats="tensor")
    monitor = AutoRateMonitor(opt)
    for x in (1.0, math.nan):
        a.grad, b.grad = torch.tensor([4.0, -3.0]) * x, None
        opt.step()
        monitor.update()
    report = monitor.report()
    assert (report.parameters["a"].steps, report.parameters["b"].steps, report.groups[0].steps) == (1, 0, 1)
    assert report.parameters["a"].unit_grad_sq_sum == 625
    assert math.isnan(report.parameters["b"].unit_grad_sq_sum)


def test_steps_text_and_plain_numbers():
    model, invariant, rest = batch_norm_net()
    opt = normkern.SGD([{"params": invariant}, {"params": rest, "momentum": 0.5}], lr=0.1, stats="row")
    monitor = AutoRateMonitor(opt)
    assert not monitor.update()
    with pytest.raises(RuntimeError, match=r"AutoRateMonitor.report: expected an update\(\) after a step before it"):
        monitor.report()
    assert str(monitor) == "AutoRateMonitor(steps=0)"
    backward(model, 0)
    opt.step()
    assert monitor.update()
    assert not monitor.update()
    lines = str(monitor.report()).splitlines()
    assert lines[0] == "after 1 steps"
    assert [line.split()[0] for line in lines[2:5]] == ["group", "0.weight", "3.weight"]
    told = monitor.to_dict()
    assert list(told) == ["steps", "groups", "parameters", "rows"]
    assert len(told["rows"]["0.weight"]["mismatch"]) == 16


def test_refusals():
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(
        TypeError, match="AutoRateMonitor: optimizer expected a normkern.SGD or SVAG, .* got torch.optim.SGD"
    ):
        AutoRateMonitor(torch.optim.SGD(params))
    with pytest.raises(ValueError, match="AutoRateMonitor: optimizer expected one with stats="):
        AutoRateMonitor(normkern.SGD(params))
    where = "AutoRateMonitor.load_state_dict: "
    monitor = AutoRateMonitor(normkern.SGD(params, stats="tensor"))
    for state, sentence in [
        (3, "state_dict expected what state_dict() returned, got int"),
        ({"steps": 1, "layout": ((0, (1, 1)),)}, "layout expected 1 parameters with 1 slots in group 0, got 2 parameters with 2 slots in group 0"),
        ({"steps": 1, "layout": ((0, (1,)),), "reasons": [None], "columns": 1}, "columns expected shape (2, 8), got 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as caught:
            monitor.load_state_dict(state)
        assert str(caught.value) == where + sentence


def test_a_loaded_monitor_goes_on():
    told = []
    for interrupted in (False, True):
        model, invariant, _ = batch_norm_net()
        opt = normkern.SGD(invariant, lr=0.3, stats="row")
        monitor = AutoRateMonitor(opt)
        for t in range(10):
            if interrupted and t == 5:
                file = io.BytesIO()
                torch.save(monitor.state_dict(), file)
                file.seek(0)
                monitor = AutoRateMonitor(opt)
                monitor.load_state_dict(torch.load(file))
                assert monitor.steps == 5
                assert not monitor.update()
            backward(model, t)
            opt.step()
            monitor.update()
        told.append(monitor.to_dict())
    assert told[0] == told[1]


# --- the schedule -----------------------------------------------------------------------------------------------------


def groups(lrs=(0.3, 0.1)):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


@pytest.mark.parametrize("exponent", [0.5, [0.0, 0.5], (0.25, 2)])
def test_power_decay_of_every_group(exponent):
    opt = groups()
    schedule = PowerDecayLR(opt, exponent)
    a, b = exponent if isinstance(exponent, (list, tuple)) else (exponent, exponent)
    for t in range(50):
        expected = [0.3 * (t + 1) ** -a, 0.1 * (t + 1) ** -b]
        assert [group["lr"] for group in opt.param_groups] == pytest.approx(expected, rel=1e-15)
        assert schedule.get_last_lr() == [group["lr"] for group in opt.param_groups]
        opt.step()
        schedule.step()


def test_power_decay_goes_on_from_a_checkpoint():
    opt = groups()
    schedule = PowerDecayLR(opt, [0.25, 0.5])
    for _ in range(7):
        opt.step()
        schedule.step()
    file = io.BytesIO()
    torch.save([opt.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    saved, again = torch.load(file), groups((5.0, 5.0))
    loaded = PowerDecayLR(again, 1.0)
    again.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    for _ in range(3):
        for o, s in ((opt, schedule), (again, loaded)):
            o.step()
            s.step()
        assert loaded.get_last_lr() == schedule.get_last_lr()
    resumed = PowerDecayLR(again, [0.25, 0.5], last_epoch=9)
    assert resumed.get_last_lr() == pytest.approx([0.3 * 11**-0.25, 0.1 * 11**-0.5])


def test_power_decay_at_the_pace_of_svag_and_of_tensors():
    opt = groups()
    schedule = SvagSchedule(PowerDecayLR(opt, 0.5), l=2)
    for k in range(8):
        assert opt.param_groups[0]["lr"] == pytest.approx(0.3 * (k // 2 + 1) ** -0.5)
        opt.step()
        schedule.step()
    w = nn.Parameter(torch.ones(2))
    opt = normkern.SGD([w], lr=torch.tensor(0.4), stats="tensor")
    schedule = PowerDecayLR(opt, 0.5)
    w.grad = torch.ones(2)
    for _ in range(3):
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["lr"].item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("exponent", "sentence"),
    [
        (-0.1, "exponent expected a finite number >= 0, got -0.1"),
        (math.nan, "exponent expected a finite number >= 0, got nan"),
        (math.inf, "exponent expected a finite number >= 0, got inf"),
        (True, "exponent expected a finite number >= 0, got True"),
        ("0.5", "exponent expected a finite number >= 0, got '0.5'"),
        ([0.5], "exponent expected one number, or a list of 2, one per param group, got a list of 1"),
        ([0.5, None], "exponent[1] expected a finite number >= 0, got None"),
    ],
)
def test_power_decay_refuses(exponent, sentence):
    with pytest.raises(ValueError) as caught:
        PowerDecayLR(groups(), exponent)
    assert str(caught.value) == f"PowerDecayLR: {sentence}"
    with pytest.raises(TypeError, match="PowerDecayLR: optimizer expected an Optimizer, got int"):
        PowerDecayLR(3)
