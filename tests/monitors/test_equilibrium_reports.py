"""What EquilibriumMonitor tells and draws, and a real network."""

import dataclasses
import math
import re

import pytest
import torch
from support import fresh
from torch import nn

import normkern
from normkern import EquilibriumMonitor
from normkern.monitors import equilibrium_report
from normkern.monitors.step_reader import Hyperparameters

from .equilibrium_runs import net, net_step, train, weights


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
    assert re.match(
        r"after 3 steps: not settled yet: \d of 2, about [\d,]+ more steps\n"
        r"group 0: intrinsic lr 0\.002, 125 steps to equilibrium, time 0\.006\n",
        text,
    )
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


def entry(residual):
    """What a monitor reports where |w|^4 is 1 / (1 + residual) of that at equilibrium, which 100 steps bring e closer."""
    h = Hyperparameters(lr=0.1, momentum=0.0, dampening=0.0, weight_decay=0.025, nesterov=False)
    means = dict.fromkeys(equilibrium_report.COLUMNS, 1.0) | {"cosine_sq": 0.0, "buffer_grad_dot": 0.0}
    means |= {"balance_sq": 1.0 + residual, "grad_sq": 0.0 if residual == -1 else 1.0}
    return equilibrium_report.equilibrium(0, h, list(means.values()), 5, True, 1.0, None)


@pytest.mark.parametrize("residual", [0.0, 0.05, -0.05, 0.11, -0.09])
def test_length_close_to_equilibrium_is_settled(residual):
    assert entry(residual).steps_left == 0
    assert entry(residual).verdict == "settled"


@pytest.mark.parametrize("residual", [0.2, 3.0, 1e4, -0.2, -0.9])
def test_length_away_from_equilibrium_says_how_many_more_steps(residual):
    found = entry(residual)
    away = abs(1 / (1 + residual) - 1)
    assert found.steps_to_equilibrium == pytest.approx(100, rel=0.01)
    assert away * math.exp(-found.steps_left / found.steps_to_equilibrium) == pytest.approx(0.1)
    assert re.fullmatch(r"not yet, about [\d,]+ more steps", found.verdict)
    assert found.to_dict()["steps_left"] == found.steps_left


def test_weights_without_gradient_never_settle():
    assert entry(-1.0).steps_left == math.inf
    assert entry(-1.0).verdict == "not yet, and the weights shrink to zero"


def test_verdict_of_the_report_is_that_of_the_slowest():
    def report(**parameters):
        nothing = dataclasses.replace(entry(0.0), steps_left=None, residual=None)
        return equilibrium_report.EquilibriumReport(
            9, {0: nothing}, parameters, {n: [p] for n, p in parameters.items()}
        )

    assert report(a=entry(0.0), b=entry(0.01)).verdict == "settled: 2 of 2"
    slow = report(a=entry(0.0), b=entry(-0.9), c=entry(-0.5))
    assert slow.verdict == f"not settled yet: 1 of 3, {entry(-0.9).verdict.removeprefix('not yet, ')}"
    assert str(slow).splitlines()[0] == f"after 9 steps: {slow.verdict}"
    assert report().verdict == "no equilibrium: nothing settles"


def test_relaxing_weights_become_settled():
    params = weights(count=1, norm=6.0)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.2, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.9)
    train(opt, params, monitor, 5)
    (first,) = monitor.report().parameters.values()
    assert first.verdict.startswith("not yet, about ")
    train(opt, params, monitor, int(first.steps_left * 1.5) + 100)
    assert monitor.report().verdict == "settled: 1 of 1"


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
    monkeypatch.setattr("normkern.monitors.equilibrium._HISTORY", 8)
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
    done = fresh.python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


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
