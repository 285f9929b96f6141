"""Whether a run has settled: reports of a monitor on weights whose gradients are noise."""

import functools
import math

import pytest
import torch
from torch import nn

import normkern
from normkern import advise
from normkern.advice.intervals import Mean

LR, DECAY, SIZE = 0.1, 0.05, 400
LOG = {"trace_sigma": [1.0, 2.0] * 10, "grad_sq_norm_unbiased": [1.0, 2.0] * 10}


@functools.cache
def run(steps, start, begin=0, every=10, weights=1):
    """Reports of a run from `start` times the norm of equilibrium, from step `begin` on."""
    generator = torch.Generator().manual_seed(0)
    at = normkern.theory.equilibrium_weight_sq(lr=LR, weight_decay=DECAY, momentum=0.0, unit_grad_sq=1.0) ** 0.5
    params = [nn.Parameter(torch.randn(SIZE, generator=generator)) for _ in range(weights)]
    with torch.no_grad():
        for w in params:
            w *= start * at / w.norm()
    optimizer = normkern.SGD([(f"w{i}", w) for i, w in enumerate(params)], lr=LR, weight_decay=DECAY, stats="tensor")
    monitor, reports = normkern.EquilibriumMonitor(optimizer, ema=0.9), []
    for step in range(1, steps + 1):
        for w in params:
            g = torch.randn(SIZE, generator=generator)
            v = w.detach()
            g -= (g @ v) / (v @ v) * v
            w.grad = g / (math.sqrt(SIZE - 1) * v.norm())
        optimizer.step()
        monitor.update()
        if step > begin and step % every == 0:
            reports.append(monitor.report())
    return reports


def answer(reports):
    return advise(LOG, gradient_samples=8, batch_size=8, optimizer="sgd", equilibrium=reports)


def test_settled_run_is_known_to_be():
    advice = answer(run(1200, 1.0, begin=200, weights=3))
    assert advice.equilibrium.answer == "settled: 3 of 3"
    assert advice.equilibrium.known
    assert (advice.equilibrium.low, advice.equilibrium.high) == (0, 0)
    assert [x.name for x in advice.lengths] == ["w0", "w1", "w2"]
    for x in advice.lengths:
        assert 0.9 < x.ratio.low < x.ratio.estimate < x.ratio.high < 1.1
    assert not any("Whether the criterion applies" in s for s in advice.cannot_say)
    assert advice.equilibrium.note == ""


@pytest.mark.parametrize("start", [0.5, 3.0])
def test_moving_run_is_known_to_move_and_says_for_how_long(start):
    """1 / (4 lr wd) = 50 steps bring |w|^4 e times closer."""
    reports = run(20, start, every=1)
    advice = answer(reports)
    assert advice.equilibrium.known
    assert advice.equilibrium.answer.startswith("not yet: 1 of 1 move, about ")
    assert 0 < advice.equilibrium.low <= advice.equilibrium.estimate <= advice.equilibrium.high < math.inf
    expected = 50 * math.log(abs(start**4 - 1) / 0.1)
    assert advice.equilibrium.low < expected < 1.5 * advice.equilibrium.high
    assert any("Whether the criterion applies yet" in s for s in advice.cannot_say)
    assert "reports span 0.4 relaxation times, better 10" in advice.equilibrium.note


def test_intervals_of_norms_cover_as_often_as_they_say():
    """At equilibrium the mean of ln(|w|_*^4/|w|^4) is 0: chains of the noise model, over 10 relaxation times."""
    generator = torch.Generator().manual_seed(0)
    x, chains = LR * DECAY, 200
    n = torch.full((chains,), math.sqrt(LR / (DECAY * (2 - x))), dtype=torch.float64)
    weight, grad, rows = n, 1 / n, []
    for step in range(200 + int(10 / (4 * x))):
        g = torch.randn(chains, SIZE // 10, generator=generator, dtype=torch.float64).square().mean(1) / n
        weight, grad = 0.9 * weight + 0.1 * n, 0.9 * grad + 0.1 * g
        n = (1 - x) ** 2 * n + LR * LR * g
        if step >= 200 and step % 10 == 0:
            rows.append((LR * grad / (DECAY * (2 - x)) / weight).log())
    series = torch.stack(rows, 1)
    intervals = [Mean.of_series(row).interval(0.95) for row in series]
    assert sum(i.low <= 0 <= i.high for i in intervals) / chains >= 0.93


def test_few_reports_are_undecided():
    advice = answer(run(300, 1.0, begin=270, weights=3))
    assert advice.equilibrium.answer == "unknown, average longer"
    assert "3 of 3 undecided" in advice.equilibrium.note
    assert advice.equilibrium.low == 0 < advice.equilibrium.high


def test_one_report_has_no_interval():
    report = run(300, 1.0, begin=270, weights=3)[-1]
    for given in (report, [report]):
        advice = answer(given)
        assert advice.equilibrium.answer == "unknown, average longer"
        assert "one report has no interval" in advice.equilibrium.note
        assert math.isnan(advice.lengths[0].ratio.low)
        assert advice.to_dict()["lengths"][0]["ratio"][1] is None


def test_a_monitor_is_its_report():
    w = nn.Parameter(torch.ones(4))
    optimizer = normkern.SGD([("w", w)], lr=0.1, weight_decay=0.1, stats="tensor")
    monitor = normkern.EquilibriumMonitor(optimizer)
    w.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
    optimizer.step()
    monitor.update()
    assert answer(monitor).equilibrium == answer(monitor.report()).equilibrium


def test_run_without_decay_never_settles():
    w = nn.Parameter(torch.ones(4))
    optimizer = normkern.SGD([("w", w)], lr=0.1, stats="tensor")
    monitor, reports = normkern.EquilibriumMonitor(optimizer), []
    for _ in range(3):
        w.grad = torch.randn(4)
        optimizer.step()
        monitor.update()
        reports.append(monitor.report())
    advice = answer(reports)
    assert advice.equilibrium.answer == "no equilibrium: nothing settles"
    assert "weight_decay is 0" in advice.equilibrium.note
    assert advice.lengths == ()


def test_weights_without_gradients_shrink_to_zero():
    w = nn.Parameter(torch.ones(4))
    optimizer = normkern.SGD([("w", w)], lr=0.1, weight_decay=0.1, stats="tensor")
    monitor, reports = normkern.EquilibriumMonitor(optimizer), []
    for _ in range(4):
        w.grad = torch.zeros(4)
        optimizer.step()
        monitor.update()
        reports.append(monitor.report())
    advice = answer(reports)
    assert advice.equilibrium.answer == "not yet: the weights shrink to zero"
    assert advice.equilibrium.estimate is None
    assert advice.to_json()


def test_reports_must_be_in_the_order_of_time_and_of_one_run():
    reports = run(300, 1.0, begin=200)
    with pytest.raises(ValueError, match="in the order of time"):
        answer(reports[::-1])
    with pytest.raises(ValueError, match="in the order of time"):
        answer([reports[0], reports[0]])
    with pytest.raises(ValueError, match="reports of the same parameters"):
        answer([reports[0], run(300, 1.0, begin=270, weights=3)[-1]])


def test_picture_of_norms(tmp_path):
    pytest.importorskip("matplotlib")
    for reports in (run(300, 1.0, begin=200), run(300, 1.0, begin=270, weights=3)[-1:]):
        answer(reports).plot(tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 10000
