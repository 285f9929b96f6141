"""EquilibriumMonitor: against simulations, real buffers and joint vectors; what it says where there is no equilibrium."""

import io
import math
import subprocess
import sys

import pytest
import torch
from noise_model import Invariant
from torch import nn

import normkern
from normkern import EquilibriumMonitor
from normkern.buffer_sums import BufferSums
from normkern.levels import Steps
from normkern.theory import (
    equilibrium_angle,
    equilibrium_residual,
    equilibrium_weight_sq,
    steps_to_equilibrium,
)


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


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.5},
        {"momentum": 0.9, "decay": "exponential", "norm_buffers": []},
        {"momentum": 0.9, "nesterov": True, "decay": "exponential", "norm_buffers": []},
    ],
    ids=lambda o: " ".join(o) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_predictions_come_true_in_noise(options, dtype):
    """Begun at half and at twice the length; both become what the monitor said, and turn by what it said."""
    options = {"weight_decay": 0.01 if "momentum" in options else 0.05, "lr": 0.1, **options}
    own = {k: options.pop(k) for k in ("norm_buffers",) if k in options}
    lr = options["lr"] * (1 - options.get("dampening", 0))
    at = {"lr": lr, "weight_decay": options["weight_decay"], "momentum": options.get("momentum", 0.0)}
    form = {"nesterov": options.get("nesterov", False)}
    length = math.sqrt(equilibrium_weight_sq(**at, **form, unit_grad_sq=1.0))
    steps = round(8 * steps_to_equilibrium(**at)) + 300
    for begin in (length / 1.5, 1.5 * length):
        params = weights(norm=begin, dtype=dtype)
        opt = normkern.SGD([{"params": params, **own}], stats="tensor", **options)
        monitor = EquilibriumMonitor(opt, ema=0.99)
        train(opt, params, monitor, steps)
        told = monitor.report().parameters["0.0"]
        assert told.reason is None
        assert told.steps == steps
        assert told.predicted_angular_update == pytest.approx(
            equilibrium_angle(**at, **form, correlation=told.correlation), rel=0.005
        )
        assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.02)
        assert told.equilibrium_weight_norm == pytest.approx(length, rel=0.03)
        assert told.weight_norm == pytest.approx(told.equilibrium_weight_norm, rel=0.03)
        assert abs(told.residual) < 0.1
        assert abs(told.correlation) < 0.1
        assert told.effective_lr == pytest.approx(options["lr"] / told.weight_norm**2, rel=1e-2)
        assert told.intrinsic_lr == options["lr"] * options["weight_decay"]
        assert told.time == pytest.approx(steps * told.intrinsic_lr)
        assert told.steps_to_equilibrium == pytest.approx(steps_to_equilibrium(**at))


def test_the_residual_has_a_sign():
    for begin, sign in ((1.0, 1), (30.0, -1)):
        params = weights(norm=begin)
        opt = normkern.SGD(params, lr=0.1, weight_decay=0.01, stats="tensor")
        monitor = EquilibriumMonitor(opt, ema=0.5)
        train(opt, params, monitor, 5)
        told = monitor.report().parameters["0.0"]
        assert told.residual * sign > 0.1
        assert told.residual == pytest.approx(
            equilibrium_residual(weight_sq=told.weight_norm**2, grad_sq=told.grad_norm**2, lr=0.1, weight_decay=0.01, momentum=0), rel=1e-9
        )  # fmt: skip


def test_averages_are_weighted_and_without_bias():
    params = weights(norm=2.0)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.01, momentum=0.5, stats="tensor")
    monitor, seen = EquilibriumMonitor(opt, ema=0.9), []
    generator = torch.Generator().manual_seed(0)
    for t in range(7):
        params[0].grad = noise_gradient(params[0].detach(), generator, q=1.0 + t)
        opt.step()
        monitor.update()
        stats = opt.stats()
        seen.append([stats.weight_sq.item(), stats.grad_sq.item(), stats.angular_update.item() ** 2])
    share = torch.tensor([0.9**k for k in range(7)][::-1], dtype=torch.float64)
    mean = (share @ torch.tensor(seen, dtype=torch.float64) / share.sum()).tolist()
    told = monitor.report().parameters["0.0"]
    numbers = (told.weight_norm**2, told.grad_norm**2, told.angular_update**2)
    assert numbers == pytest.approx(mean, rel=1e-12)
    assert told.effective_lr == pytest.approx(0.1 / mean[0], rel=1e-12)
    last = EquilibriumMonitor(opt, ema=0)  # of a step that was before it
    assert last.update()
    told = last.report().parameters["0.0"]
    assert (told.weight_norm**2, told.grad_norm**2, told.angular_update**2) == pytest.approx(seen[-1][:3], rel=1e-12)
    assert told.steps == 1


def test_predictions_follow_a_schedule():
    """What is compared are averages over the same steps: a falling lr makes no difference."""
    params = weights(norm=2.5)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.02, momentum=0.9, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.995)
    lrs = [0.1 * 0.9995**t for t in range(1000)]
    train(opt, params, monitor, 1000, schedule=lrs.__getitem__)
    told = monitor.report().parameters["0.0"]
    now = equilibrium_angle(lr=lrs[-1], weight_decay=0.02, momentum=0.9)
    assert told.predicted_angular_update > 1.03 * now
    assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.03)
    assert told.intrinsic_lr == lrs[-1] * 0.02
    assert told.time == pytest.approx(sum(lrs) * 0.02)


def test_exponential_decay_is_told_as_the_run_with_decay():
    reports = []
    for decay in ("coupled", "exponential"):
        model = net()
        groups = [
            {"params": [model[0].weight, model[3].weight], "weight_decay": 0.02, "norm_buffers": []},
            {"params": model[6].parameters(), "decay": "coupled"},
        ]
        opt = normkern.SGD(groups, lr=0.2, momentum=0.5, stats="row", decay=decay)
        monitor = EquilibriumMonitor(opt)
        for t in range(400):
            net_step(model, opt, t)
            monitor.update()
        reports.append(monitor.to_dict())
    scale = opt.true_scale()
    assert opt.param_groups[0]["gauge"][2] != 0  # rescaled, more than once
    assert scale[0] != 1
    for a, b in zip(reports[0]["parameters"].values(), reports[1]["parameters"].values(), strict=True):
        for quantity, x in a.items():
            assert b[quantity] == (x if x is None or isinstance(x, str) else pytest.approx(x, rel=1e-6, abs=1e-9)), (
                quantity
            )


# --- what the sums tell of momentum buffers ---------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 5])
@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "nesterov": True}, {}],
    ids=["heavy ball", "nesterov", "nesterov .5", "plain"],
)  # fmt: skip
@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_buffers_are_followed_by_the_sums(options, late, stats):
    """<b,g> of every row, parameter and group, against the real buffers; also by one who comes late."""
    model = net()
    params = [model[0].weight, model[3].weight]
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.02, stats=stats, **options)
    steps = Steps(opt, "test")
    follower = None
    for t in range(60):
        opt.param_groups[0]["lr"] = 0.1 + 0.05 * math.sin(t)
        before = [opt.state.get(p, {}).get("momentum_buffer") for p in params]
        before = [torch.zeros_like(p) if b is None else b.clone() for p, b in zip(params, before, strict=True)]
        net_step(model, opt, t)
        step = steps.read()
        if t < late:
            continue
        follower = follower or BufferSums(step.levels.rows, torch.device("cpu"))
        dots = follower.dots(step)
        products = [b * p.grad for b, p in zip(before, params, strict=True)]
        rows = [x.sum(1) for x in products] if stats == "row" else []
        expected = torch.cat([*rows, torch.stack([x.sum() for x in products]), sum(x.sum() for x in products)[None]])
        size = step.sums.grad_sq / (1 - options.get("momentum", 0)) ** 2
        if t == late:
            assert late or torch.equal(dots, torch.zeros_like(dots))
        elif t >= late + (60 if options.get("nesterov") and late else 1) - 30:
            assert ((dots - expected).abs() <= 1e-7 * size).all(), t


def test_a_network_that_pulls_back_is_told_and_allowed_for():
    model = Invariant(rows=8, dim=32, norm=1.0)
    for options in ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
        opt = normkern.SGD([("w", model.first)], lr=0.3, weight_decay=0.05 / 3, stats="tensor", **options)
        monitor = EquilibriumMonitor(opt, ema=0.999)
        for t in range(3000):
            opt.zero_grad()
            model(t).backward()
            opt.step()
            monitor.update()
        told = monitor.report().parameters["w"]
        assert abs(told.correlation) > 0.03
        assert told.weight_norm == pytest.approx(told.equilibrium_weight_norm, rel=0.03)
        assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.03)


# --- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_parameters_and_groups_are_vectors_of_their_own(stats):
    model = net()
    named = dict(model.named_parameters())
    groups = [
        {"params": [("0.weight", named["0.weight"]), ("3.weight", named["3.weight"])], "weight_decay": 0.02},
        {"params": [("6.weight", named["6.weight"]), ("6.bias", named["6.bias"])], "lr": 0.05},
    ]
    opt = normkern.SGD(groups, lr=0.1, momentum=0.9, stats=stats)
    monitor = EquilibriumMonitor(opt, ema=0)
    for t in range(3):
        before = {n: p.detach().clone() for n, p in named.items()}
        net_step(model, opt, t)
        monitor.update()
    report = monitor.report()
    assert list(report.groups) == [0, 1]
    assert list(report.parameters) == list(report.slots) == list(named)
    vectors = {n: (before[n].flatten(), p.detach().flatten(), p.grad.flatten()) for n, p in named.items()}
    joint = [
        tuple(torch.cat(x) for x in zip(*(vectors[n] for n in names), strict=True))
        for names in (list(named)[:2], list(named)[2:])
    ]
    entries = [(report.parameters[n], v) for n, v in vectors.items()] + list(
        zip(report.groups.values(), joint, strict=True)
    )
    if stats == "row":
        assert [len(slots) for slots in report.slots.values()] == [8, 6, 3, 1]
        entries += [
            (slot, (before[n][i], p.detach()[i], p.grad[i]))
            for n, p in named.items() if p.ndim > 1 for i, slot in enumerate(report.slots[n])
        ]  # fmt: skip
    else:
        assert all(slots == [report.parameters[n]] for n, slots in report.slots.items())
    for told, (w, new, g) in entries:
        cosine = (w @ new / w.norm() / new.norm()).clamp(max=1)
        assert told.weight_norm == pytest.approx(w.norm().item(), rel=1e-12)
        assert told.grad_norm == pytest.approx(g.norm().item(), rel=1e-12)
        assert told.angular_update == pytest.approx(cosine.arccos().item(), rel=1e-6)
        assert told.cosine == pytest.approx(((w @ g).abs() / w.norm() / g.norm()).item(), rel=1e-6, abs=1e-12)
    assert report.groups[1].effective_lr == pytest.approx(0.05 / report.groups[1].weight_norm ** 2)
    assert {report.parameters[n].group for n in list(named)[2:]} == {1}


def test_groups_have_their_own_options():
    params = weights(count=3, norm=2.0)
    groups = [
        {"params": [params[0]], "lr": 0.1, "weight_decay": 0.02},
        {"params": [params[1]], "lr": 0.2, "weight_decay": 0.05, "momentum": 0.9, "nesterov": True},
        {"params": [params[2]], "stats": None},
    ]
    opt = normkern.SGD(groups, lr=0.3, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.9)
    train(opt, params, monitor, 200)
    report = monitor.report()
    assert list(report.parameters) == ["0.0", "1.0"]
    assert report.groups[0].predicted_angular_update == pytest.approx(math.sqrt(0.004), rel=1e-9)
    r = report.groups[1].correlation
    angle = equilibrium_angle(lr=0.2, weight_decay=0.05, momentum=0.9, nesterov=True, correlation=r)
    assert report.groups[1].predicted_angular_update == pytest.approx(angle, rel=1e-3)
    assert [g.intrinsic_lr for g in report.groups.values()] == pytest.approx([0.002, 0.01])


def test_parts_that_are_invariant_together_only():
    """Two tensors whose sum is normalised: neither is invariant alone, the group is."""
    a, b = weights(size=30, count=2, norm=1.0)
    opt = normkern.SGD([("a", a), ("b", b)], lr=0.05, weight_decay=0.1, momentum=0.9, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.999)
    for t in range(3000):
        make = torch.Generator().manual_seed(t)
        opt.zero_grad()
        v = torch.cat([a, b])
        xi = torch.randn(v.shape, generator=make, dtype=torch.float64)
        (v @ xi / v.norm()).backward()
        opt.step()
        monitor.update()
    report = monitor.report()
    for name in ("a", "b"):
        assert report.parameters[name].residual is None
        assert report.parameters[name].reason.startswith("not scale-invariant by itself: |<w,g>| is 0.")
    group = report.groups[0]
    assert group.reason is None
    assert group.angular_update == pytest.approx(group.predicted_angular_update, rel=0.03)
    assert group.weight_norm == pytest.approx(group.equilibrium_weight_norm, rel=0.03)


# --- no equilibrium, no measurement -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_decay": 0.0}, "weight_decay is 0: no equilibrium, the norm grows for ever"),
        ({"lr": 0.0}, "lr is 0: nothing moves"),
        ({"lr": 0.0, "weight_decay": 0.0, "momentum": 0.9}, "lr is 0: nothing moves"),
        ({"lr": 1.0, "weight_decay": 2.5}, "equilibrium: lr * weight_decay expected < 2 (1 + momentum) = 2.0, beyond which no length is stable, got 1.0 * 2.5 = 2.5"),
    ],
)  # fmt: skip
def test_where_there_is_no_equilibrium(options, reason):
    params = weights()
    opt = normkern.SGD(params, **{"lr": 0.1, "weight_decay": 0.1, "stats": "tensor", **options})
    monitor = EquilibriumMonitor(opt)
    train(opt, params, monitor, 3)
    told = monitor.report().groups[0]
    assert told.reason == reason
    assert (told.predicted_angular_update, told.residual, told.equilibrium_weight_norm) == (None, None, None)
    assert told.steps_to_equilibrium == math.inf
    assert told.steps == 3
    assert told.weight_norm > 0
    assert reason in str(monitor)


def test_decay_that_begins_later():
    params = weights(norm=3.0)
    opt = normkern.SGD(params, lr=0.1, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.999)
    train(opt, params, monitor, 50)
    assert monitor.report().groups[0].residual is None
    opt.param_groups[0]["weight_decay"] = 0.05
    train(opt, params, monitor, 1, seed=3)
    told = monitor.report().groups[0]
    assert told.reason is None
    assert told.predicted_angular_update == pytest.approx(0.1, rel=1e-9)
    assert told.time == pytest.approx(0.005)


def test_parameters_that_are_not_stepped_and_numbers_that_are_none():
    params = weights(count=4, norm=2.0)
    opt = normkern.SGD([(n, p) for n, p in zip("abcd", params, strict=True)], lr=0.1, weight_decay=0.02, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    generator = torch.Generator().manual_seed(0)
    for t in range(6):
        for i, p in enumerate(params):
            p.grad = None if i == 1 or (i == 2 and t == 5) else noise_gradient(p.detach(), generator)
        if t == 3:
            params[3].grad[0] = math.nan
        opt.step()
        monitor.update()
    report = monitor.report()
    assert [p.steps for p in report.parameters.values()] == [6, 0, 5, 3]
    assert [p.time for p in report.parameters.values()] == pytest.approx([0.012, 0, 0.01, 0.006])
    assert report.parameters["a"].reason is None
    assert report.parameters["b"].reason == "not measured: never stepped with finite numbers"
    assert math.isnan(report.parameters["b"].weight_norm)
    for name in "cd":
        assert report.parameters[name].reason == "not measured in the last step: not stepped, or no finite numbers"
        assert report.parameters[name].residual is not None
    assert report.groups[0].steps == 5  # without the step of the NaN itself
    assert math.isfinite(report.groups[0].weight_norm)


def test_weights_without_gradient_only_decay():
    params = weights(norm=2.0)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.1, momentum=0.9, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    for _ in range(3):
        params[0].grad = torch.zeros_like(params[0])
        opt.step()
        monitor.update()
    told = monitor.report().groups[0]
    assert (told.residual, told.equilibrium_weight_norm, told.cosine) == (-1.0, 0.0, 0.0)
    assert told.predicted_angular_update == pytest.approx(math.sqrt(0.02 / 1.9))
    assert told.angular_update < 1e-7


# --- steps ------------------------------------------------------------------------------------------------------------


def test_every_step_is_taken_in_once():
    params = weights()
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.1, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    assert not monitor.update()  # before a step
    with pytest.raises(RuntimeError, match=r"EquilibriumMonitor.report: expected an update\(\) after a step before it"):
        monitor.report()
    with pytest.raises(RuntimeError, match=r"EquilibriumMonitor.plot: expected an update\(\) after a step before it"):
        monitor.plot("nowhere.png")
    assert str(monitor) == repr(monitor) == "EquilibriumMonitor(ema=0.99, steps=0)"
    train(opt, params, monitor, 1)
    before = monitor.to_dict()
    assert not monitor.update()
    assert monitor.to_dict() == before
    assert monitor.steps == 1


def test_steps_that_a_scaler_skips():
    params = weights(dtype=torch.float32)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.1, stats="tensor", fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monitor, taken = EquilibriumMonitor(opt), []
    for bad in (True, False, True):
        loss = (params[0] * (math.inf if bad else 1.0)).sum()
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        taken.append(monitor.update())
    assert taken == [False, True, False]
    assert monitor.steps == 1


def test_an_update_does_not_synchronise(monkeypatch):
    params = weights(count=2)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=True, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    train(opt, params, monitor, 2)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()

    def refuse(*_):
        raise AssertionError("synchronised")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    opt.param_groups[0]["lr"] = 0.2
    assert monitor.update()


def test_added_parameters_begin_anew():
    params = weights(count=2)
    opt = normkern.SGD([params[0]], lr=0.1, weight_decay=0.1, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    train(opt, params[:1], monitor, 3)
    opt.add_param_group({"params": [params[1]]})
    train(opt, params, monitor, 2)
    assert monitor.steps == 2
    assert [g.steps for g in monitor.report().groups.values()] == [2, 2]


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda p: EquilibriumMonitor(torch.optim.SGD(p, lr=0.1)), TypeError, "EquilibriumMonitor: optimizer expected a normkern.SGD, got SGD"),
        (lambda p: EquilibriumMonitor(None), TypeError, "EquilibriumMonitor: optimizer expected a normkern.SGD, got NoneType"),
        (lambda p: EquilibriumMonitor(normkern.SGD(p)), ValueError, 'EquilibriumMonitor: optimizer expected one with stats="tensor" or "row", got one that measures nothing'),
        (lambda p: EquilibriumMonitor(normkern.SGD(p, stats="row"), ema=1), ValueError, "EquilibriumMonitor: ema expected a number in [0, 1), got 1"),
        (lambda p: EquilibriumMonitor(normkern.SGD(p, stats="row"), ema=-0.1), ValueError, "EquilibriumMonitor: ema expected a number in [0, 1), got -0.1"),
        (lambda p: EquilibriumMonitor(normkern.SGD(p, stats="row"), ema=math.nan), ValueError, "EquilibriumMonitor: ema expected a number in [0, 1), got nan"),
        (lambda p: EquilibriumMonitor(normkern.SGD(p, stats="row"), ema=True), ValueError, "EquilibriumMonitor: ema expected a number in [0, 1), got True"),
        (lambda p: EquilibriumMonitor(normkern.SGD(p, stats="row"), ema="0.9"), ValueError, "EquilibriumMonitor: ema expected a number in [0, 1), got '0.9'"),
    ],
)  # fmt: skip
def test_refusals(make, error, sentence):
    with pytest.raises(error) as caught:
        make(weights())
    assert str(caught.value) == sentence


def test_statistics_that_are_turned_off():
    params = weights()
    opt = normkern.SGD(params, lr=0.1, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    train(opt, params, monitor, 1)
    opt.param_groups[0]["stats"] = None
    opt.step()
    with pytest.raises(ValueError, match="got one that measures nothing"):
        monitor.update()


# --- SVAG -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["fixed", "continuous"])
def test_svag_is_told_as_the_kernel_has_it(scaling):
    params = weights(norm=3.0)
    opt = normkern.SVAG(params, lr=0.8, l=4, momentum=0.6, momentum_scaling=scaling, weight_decay=0.02, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.995)
    generator = torch.Generator().manual_seed(0)
    signal = torch.zeros_like(params[0])
    steps = 1500
    for _ in range(steps):
        for half in range(2):
            params[0].grad = noise_gradient(params[0].detach(), generator) + signal
            if half == 0:
                opt.hold()
        opt.step()
        monitor.update()
    told = monitor.report().groups[0]
    lr, momentum = (0.2, 0.6) if scaling == "fixed" else (0.05, 0.9)
    assert told.intrinsic_lr == pytest.approx(lr * 0.02)
    assert told.predicted_angular_update == pytest.approx(
        equilibrium_angle(lr=lr, weight_decay=0.02, momentum=momentum)
    )
    assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.03)
    assert told.equilibrium_weight_norm**2 == pytest.approx(
        equilibrium_weight_sq(lr=lr, weight_decay=0.02, momentum=momentum, unit_grad_sq=4.0), rel=0.05
    )  # l times the noise
    noise = opt.noise()
    assert told.nsr == pytest.approx(noise.slot_nsr_batch.item(), rel=1e-12)


def test_noise_to_signal_of_groups():
    a, b, c = weights(count=3)
    opt = normkern.SVAG([{"params": [a, b]}, {"params": [c], "stats": None}], lr=0.1, l=2, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    assert opt.param_groups[1]["stats"] is None
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    opt.hold()
    for p, x in zip((a, b, c), (2.0, 3.0, 1.0), strict=True):
        p.grad = torch.full_like(p, x)
    opt.step()
    monitor.update()
    report = monitor.report()
    assert [p.nsr for p in report.parameters.values()] == pytest.approx([0.5 / 2, 2 / 3, 0.0])
    assert report.groups[0].nsr == pytest.approx(2.5 / 5)
    once = normkern.SVAG([a], lr=0.1, stats="tensor")
    monitor = EquilibriumMonitor(once)
    once.step()
    monitor.update()
    assert monitor.report().groups[0].nsr is None  # no pair yet


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_a_loaded_monitor_goes_on(stats):
    runs = []
    for interrupted in (False, True):
        model = net()
        opt = normkern.SGD(
            model.named_parameters(), lr=0.1, weight_decay=0.02, momentum=0.9, nesterov=True, stats=stats
        )
        monitor = EquilibriumMonitor(opt, ema=0.9)
        for t in range(20):
            if interrupted and t == 10:
                file = io.BytesIO()
                torch.save([opt.state_dict(), monitor.state_dict()], file)
                file.seek(0)
                saved = torch.load(file)
                opt = normkern.SGD(model.named_parameters(), lr=9, stats=stats)
                opt.load_state_dict(saved[0])
                monitor = EquilibriumMonitor(opt, ema=0.5)
                monitor.load_state_dict(saved[1])
                assert monitor.ema == 0.9
                assert monitor.report().steps == 10
            net_step(model, opt, t)
            monitor.update()
        runs.append((monitor.to_dict(), [k for k, _ in monitor.state_dict()["history"]]))
    assert repr(runs[0]) == repr(runs[1])


def test_a_step_is_not_taken_in_twice_after_loading():
    params = weights()
    opt = normkern.SGD(params, lr=0.1, stats="tensor")
    monitor, other = EquilibriumMonitor(opt), EquilibriumMonitor(opt)
    train(opt, params, monitor, 3)
    other.load_state_dict(monitor.state_dict())
    assert not other.update()
    assert other.to_dict() == monitor.to_dict()


def test_an_empty_state_is_loaded_too():
    params = weights()
    opt = normkern.SGD(params, lr=0.1, stats="tensor")
    monitor, other = EquilibriumMonitor(opt), EquilibriumMonitor(opt, ema=0.3)
    train(opt, params, monitor, 1)
    monitor.load_state_dict(other.state_dict())
    assert (monitor.steps, monitor.ema) == (0, 0.3)


def test_states_that_do_not_fit():
    params = weights(count=2)
    opt = normkern.SGD(params, lr=0.1, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    train(opt, params, monitor, 1)
    state = monitor.state_dict()
    where = "EquilibriumMonitor.load_state_dict: "
    one = normkern.SGD(params[:1], lr=0.1, stats="tensor")
    for target, broken, sentence in [
        (monitor, None, "state_dict expected what state_dict() returned, got NoneType"),
        (monitor, {"steps": 1}, "state_dict expected what state_dict() returned, got ['steps']"),
        (monitor, {**state, "ema": 1.0}, "ema expected a number in [0, 1), got 1.0"),
        (monitor, {**state, "steps": -1}, "steps expected an integer >= 0, got -1"),
        (monitor, {**state, "mean": state["mean"][:1]}, "mean expected shape (3, 10), got (1, 10)"),
        (monitor, {k: v for k, v in state.items() if k != "time"}, f"state_dict expected 'time', got {sorted(set(state) - {'time'})}"),
        (EquilibriumMonitor(one), state, "layout expected 1 parameters with 1 slots in group 0, got 2 parameters with 2 slots in group 0"),
    ]:  # fmt: skip
        before = target.state_dict()["steps"]
        with pytest.raises(ValueError) as caught:
            target.load_state_dict(broken)
        assert str(caught.value) == where + sentence
        assert target.state_dict()["steps"] == before


# --- text and pictures ------------------------------------------------------------------------------------------------


def test_text_and_plain_numbers():
    model = net()
    invariant = [(n, p) for n, p in model.named_parameters() if n in ("0.weight", "3.weight")]
    rest = [(n, p) for n, p in model.named_parameters() if n.startswith("6")]
    opt = normkern.SGD([{"params": invariant, "weight_decay": 0.02}, {"params": rest}], lr=0.1, stats="row")
    monitor = EquilibriumMonitor(opt)
    for t in range(3):
        net_step(model, opt, t)
        monitor.update()
    text = str(monitor.report())
    assert text == str(monitor)
    assert text.startswith("after 3 steps\ngroup 0: intrinsic lr 0.002, 125 steps to equilibrium, time 0.006\n")
    lines = text.splitlines()
    assert len(lines) == 3 + 1 + 2 + 4
    assert [line.split()[0] for line in lines[4:]] == ["group", "0.weight", "3.weight", "group", "6.weight", "6.bias"]
    assert "(8 rows)" in text
    assert lines[7].endswith("weight_decay is 0: no equilibrium, the norm grows for ever")
    assert len({line.index("|w|") for line in lines[3:4]}) == 1
    told = monitor.to_dict()
    assert list(told) == ["steps", "groups", "parameters", "rows"]
    assert list(told["groups"]) == ["0", "1"]
    assert len(told["rows"]["0.weight"]["angular_update"]) == 8
    assert "6.bias" not in told["rows"]

    def plain(x):
        if isinstance(x, dict):
            return all(isinstance(k, str) and plain(v) for k, v in x.items())
        return all(map(plain, x)) if isinstance(x, list) else x is None or type(x) in (int, float, str)

    assert plain(told)


def test_pictures(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    params = weights(count=2, norm=2.0)
    opt = normkern.SGD(
        [{"params": [params[0]]}, {"params": [params[1]], "weight_decay": 0.0}],
        lr=0.1,
        weight_decay=0.02,
        momentum=0.9,
        stats="tensor",
    )
    monitor = EquilibriumMonitor(opt, ema=0.95)
    train(opt, params, monitor, 100)
    axes = monitor.plot(tmp_path / "equilibrium.png")
    assert (tmp_path / "equilibrium.png").stat().st_size > 5000
    assert len(axes) == 2
    measured, predicted = axes[0].get_lines()  # of the group that has an equilibrium
    assert len(measured.get_xdata()) == 100
    told = monitor.report().parameters["0.0"]
    assert measured.get_ydata()[-1] == pytest.approx(told.angular_update)
    assert predicted.get_ydata()[-1] == pytest.approx(told.predicted_angular_update)
    assert measured.get_xdata()[-1] == pytest.approx(told.time)
    length = axes[1].get_lines()[0].get_ydata()[-1]
    assert length == pytest.approx((1 + told.residual) ** -0.25)
    own = figures.Figure().subplots(2)
    assert monitor.plot(own) == list(own)
    assert len(own[1].get_lines()) == 2
    one = figures.Figure().subplots()
    assert monitor.plot(one) == [one]
    for wrong in (None, 3, [one, one, one], []):
        with pytest.raises(TypeError, match="EquilibriumMonitor.plot: to expected a path or one or two Axes, got"):
            monitor.plot(wrong)


def test_the_history_is_thinned_out(monkeypatch):
    monkeypatch.setattr("normkern.equilibrium._HISTORY", 8)
    params = weights()
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.02, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    for count, kept in (
        (7, [1, 2, 3, 4, 5, 6, 7]),
        (8, [2, 4, 6, 8]),
        (16, [4, 8, 12, 16]),
        (100, [16, 32, 48, 64, 80, 96]),
    ):
        train(opt, params, monitor, count - monitor.steps)
        assert [k for k, _ in monitor.state_dict()["history"]] == kept


def test_no_plot_no_matplotlib():
    code = """
import sys, torch, normkern
w = torch.nn.Parameter(torch.ones(3)); w.grad = torch.tensor([1.0, -1.0, 0.0])
opt = normkern.SGD([w], lr=0.1, weight_decay=0.1, stats="tensor"); monitor = normkern.EquilibriumMonitor(opt)
opt.step(); monitor.update(); print(monitor.report()); print("matplotlib" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# --- a real network ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_a_network_with_batch_norm_turns_and_settles_as_predicted(momentum, nesterov, stats, tmp_path):
    """After 10/(lr wd) steps at a constant lr: every layer's angle, and its length, within 5 % of the prediction."""
    datasets, model_selection = pytest.importorskip("sklearn.datasets"), pytest.importorskip("matplotlib")
    assert model_selection
    torch.set_num_threads(1)
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    sizes = [(1, 8, 1), (8, 16, 2), (16, 16, 2)]
    layers = [
        [nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.SiLU()] for a, b, stride in sizes
    ]
    model = nn.Sequential(*(x for layer in layers for x in layer), nn.Flatten(), nn.Linear(64, 10))
    invariant = [(n, p) for n, p in model.named_parameters() if p.ndim == 4]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim != 4]
    lr, weight_decay = 0.1, 0.01
    groups = [{"params": invariant, "weight_decay": weight_decay}, {"params": rest, "lr": 0.01}]
    opt = normkern.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, stats=stats)
    monitor = EquilibriumMonitor(opt, ema=0.999)
    generator = torch.Generator().manual_seed(1)
    for _ in range(round(10 / (lr * weight_decay))):
        batch = torch.randint(len(images), (32,), generator=generator)
        noisy = torch.where(
            torch.rand(32, generator=generator) < 0.1, torch.randint(10, (32,), generator=generator), labels[batch]
        )
        opt.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), noisy).backward()
        opt.step()
        monitor.update()
    report = monitor.report()
    assert report.groups[0].time == pytest.approx(10, rel=1e-6)
    for name, _ in invariant:
        for told in [report.parameters[name], *(report.slots[name] if stats == "row" else [])]:
            assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.05), name
            assert told.weight_norm == pytest.approx(told.equilibrium_weight_norm, rel=0.05), name
    monitor.plot(tmp_path / "equilibrium.png")
    assert (tmp_path / "equilibrium.png").stat().st_size > 5000
