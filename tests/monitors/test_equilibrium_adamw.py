"""EquilibriumMonitor of AdamW: its predictions come true in noise, also where steps are correlated."""

import math

import pytest
import torch
from support.noise_model import tangential
from torch import nn

import normkern
from normkern import EquilibriumMonitor
from normkern.theory import adamw_equilibrium_angle, adamw_equilibrium_weight_sq

from .equilibrium_runs import noise_gradient, train, weights

AT = {"lr": 0.01, "weight_decay": 0.5}


def run(opt, params, monitor, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in params:
            p.grad = noise_gradient(p.detach(), generator)
        opt.step()
        monitor.update()


@pytest.mark.parametrize(("beta1", "times"), [(0.0, 0.7), (0.9, 1.5), (0.95, 0.7)])
def test_predictions_come_true_in_noise(beta1, times):
    """Begun too short and too long; both become what the monitor said, and turn by what it said."""
    length = math.sqrt(adamw_equilibrium_weight_sq(**AT, beta1=beta1, size=400))
    params = weights(norm=times * length)
    opt = normkern.AdamW(params, betas=(beta1, 0.99), eps=0.0, stats="tensor", **AT)
    monitor = EquilibriumMonitor(opt, ema=0.995)
    run(opt, params, monitor, 1000)
    told = monitor.report().parameters["0.0"]
    assert told.reason is None
    assert told.predicted_angular_update == pytest.approx(adamw_equilibrium_angle(**AT, beta1=beta1), rel=1e-6)
    assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.02)
    assert told.weight_norm == pytest.approx(told.equilibrium_weight_norm, rel=0.02)
    assert told.equilibrium_weight_norm == pytest.approx(length, rel=0.03)
    assert told.verdict == "settled"
    assert told.effective_lr == pytest.approx(0.01 / told.weight_norm)
    assert told.intrinsic_lr == 0.005
    assert told.time == pytest.approx(5.0)
    assert told.steps_to_equilibrium == pytest.approx(-0.5 / math.log(0.995))
    assert told.correlation == 0.0


def test_length_is_right_where_gradients_are_correlated():
    """The measured size of the steps has the correlation in it; the formula for independent coordinates has not."""
    w = weights(norm=4.0)[0]
    opt = normkern.AdamW([w], betas=(0.9, 0.999), eps=0.0, stats="tensor", **AT)
    monitor = EquilibriumMonitor(opt, ema=0.995)
    generator, xi = torch.Generator().manual_seed(0), None
    for _ in range(1500):
        g, xi = tangential(w.detach()[None], 1.0, generator, xi, 0.9)
        w.grad = g[0]
        opt.step()
        monitor.update()
    told = monitor.report().groups[0]
    assert told.weight_norm == pytest.approx(told.equilibrium_weight_norm, rel=0.03)
    assert told.weight_norm**2 > 1.1 * adamw_equilibrium_weight_sq(**AT, beta1=0.9, size=400)
    assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.04)


def test_the_residual_has_a_sign_and_says_how_many_more_steps():
    length = math.sqrt(adamw_equilibrium_weight_sq(**AT, beta1=0.9, size=400))
    for times, sign in ((0.5, 1), (2.0, -1)):
        params = weights(norm=times * length)
        opt = normkern.AdamW(params, betas=(0.9, 0.999), eps=0.0, stats="tensor", **AT)
        monitor = EquilibriumMonitor(opt, ema=0.9)
        run(opt, params, monitor, 50)
        told = monitor.report().groups[0]
        assert told.residual * sign > 0.3
        assert told.residual == pytest.approx((told.equilibrium_weight_norm / told.weight_norm) ** 4 - 1, rel=1e-6)
        assert 100 < told.steps_left < 500


@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_rows_and_groups_with_other_options(stats):
    params = [nn.Parameter(w.detach().view(2, 200)) for w in weights(norm=3.0, count=2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.25, "betas": (0.5, 0.99)}]
    opt = normkern.AdamW(groups, betas=(0.9, 0.99), stats=stats, **AT)
    monitor, generator = EquilibriumMonitor(opt), torch.Generator().manual_seed(0)
    for _ in range(30):
        for p in params:
            p.grad = torch.stack([noise_gradient(row, generator) for row in p.detach()])
        opt.step()
        monitor.update()
    report, rows = monitor.report(), monitor.to_dict()["rows"]
    expected = [adamw_equilibrium_angle(lr=0.01, weight_decay=d, beta1=b) for d, b in ((0.5, 0.9), (0.25, 0.5))]
    assert [g.predicted_angular_update for g in report.groups.values()] == pytest.approx(expected)
    if stats == "row":
        told = [rows[name]["predicted_angular_update"] for name in ("0.0", "1.0")]
        assert told == [pytest.approx([x, x]) for x in expected]


def test_svag_is_told_as_the_kernel_has_it():
    params = weights(norm=2.0)
    opt = normkern.SVAGAdamW(params, l=2, betas=(0.8, 0.96), stats="tensor", lr=0.02, weight_decay=0.4)
    monitor = EquilibriumMonitor(opt)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for half in range(2):
            params[0].grad = noise_gradient(params[0].detach(), generator)
            if half == 0:
                opt.hold()
        opt.step()
        monitor.update()
    told = monitor.report().groups[0]
    assert told.intrinsic_lr == pytest.approx(0.01 * 0.2)
    assert told.predicted_angular_update == pytest.approx(
        adamw_equilibrium_angle(lr=0.01, weight_decay=0.2, beta1=0.95)
    )
    assert told.nsr == pytest.approx(opt.noise().slot_nsr_batch.item(), rel=1e-12)


def test_corrected_decay_falls_with_the_rate():
    params = weights(norm=2.0)
    opt = normkern.AdamW(params, stats="tensor", decay="corrected", **AT)
    opt.param_groups[0].update(max_lr=0.01, lr=0.005)
    monitor = EquilibriumMonitor(opt)
    train(opt, params, monitor, 1)
    assert monitor.report().groups[0].intrinsic_lr == pytest.approx(0.005 * 0.25)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: normkern.AdamW(p, weight_decay=0.0, stats="tensor"), "weight_decay is 0: no equilibrium, the norm"),
        (lambda p: normkern.Adam(p, stats="tensor"), "weight_decay is 0: no equilibrium, the norm grows for ever"),
        (lambda p: normkern.AdamW(p, lr=0.0, stats="tensor"), "lr is 0: nothing moves"),
        (lambda p: normkern.Adam(p, weight_decay=0.1, stats="tensor"), "weight_decay of Adam is part of the gradient: no"),
        (lambda p: normkern.AdamW(p, lr=2.0, weight_decay=0.5, stats="tensor"), "equilibrium: lr * weight_decay expected < 1"),
    ],
)  # fmt: skip
def test_where_there_is_no_equilibrium(make, reason):
    params = weights()
    opt = make(params)
    monitor = EquilibriumMonitor(opt)
    train(opt, params, monitor, 3)
    told = monitor.report().groups[0]
    assert told.reason.startswith(reason)
    assert (told.predicted_angular_update, told.residual, told.equilibrium_weight_norm) == (None, None, None)
    assert told.steps == 3
    assert told.steps_to_equilibrium == math.inf


def test_a_loaded_monitor_goes_on():
    params = weights(norm=3.0)
    opt = normkern.AdamW(params, stats="tensor", **AT)
    monitor = EquilibriumMonitor(opt)
    train(opt, params, monitor, 5)
    other = EquilibriumMonitor(opt)
    other.load_state_dict(monitor.state_dict())
    assert other.to_dict() == monitor.to_dict()


def test_others_do_not_take_it():
    opt = normkern.AdamW(weights(), stats="tensor")
    with pytest.raises(TypeError, match="AutoRateMonitor: optimizer expected a normkern.SGD or SVAG"):
        normkern.AutoRateMonitor(opt)
