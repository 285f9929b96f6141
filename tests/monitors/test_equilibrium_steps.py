"""EquilibriumMonitor fed by optimizers, SVAG among them, and through checkpoints."""

import io
import math

import pytest
import torch

import normkern
from normkern import EquilibriumMonitor
from normkern.theory import equilibrium_angle, equilibrium_weight_sq

from .equilibrium_runs import net, net_step, noise_gradient, train, weights


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
        (lambda p: EquilibriumMonitor(torch.optim.SGD(p, lr=0.1)), TypeError, 'EquilibriumMonitor: optimizer expected a normkern.SGD, AdamW or SVAG, constructed with stats="tensor" or "row", got torch.optim.SGD'),
        (lambda p: EquilibriumMonitor(None), TypeError, 'EquilibriumMonitor: optimizer expected a normkern.SGD, AdamW or SVAG, constructed with stats="tensor" or "row", got NoneType'),
        (lambda p: EquilibriumMonitor(normkern.SGD(p)), ValueError, 'EquilibriumMonitor: optimizer expected one with stats="tensor" or "row", got one that measures nothing; pass stats="tensor" to the optimizer'),
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
