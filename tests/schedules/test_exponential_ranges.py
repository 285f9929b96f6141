"""EquivalentExponentialLR: up to where numbers end, and how many digits are left."""

import decimal
import math
import random

import pytest
import torch
from support.one_weight import SIZE, forms, gradient, one, the
from torch import nn

import normkern
from normkern import EquivalentExponentialLR, ops

from .exponential_runs import refuses_twice


def until_refused(step):
    for _ in range(10_000):
        step()


LIMITS = [
    (torch.float64, normkern.SGD, {}, torch.float64),
    (torch.float32, torch.optim.SGD, {}, torch.float32),
    (torch.bfloat16, normkern.SGD, {}, torch.float32),
    (torch.float16, normkern.SGD, {}, torch.float32),
    (torch.float16, torch.optim.SGD, {"fused": True}, torch.float32),
    (torch.float16, torch.optim.SGD, {}, torch.float16),  # of which torch makes lr a number
    (torch.bfloat16, torch.optim.SGD, {}, torch.bfloat16),
    (torch.float64, torch.optim.SGD, {"lr": torch.tensor(1.0)}, torch.float32),
    (torch.complex64, torch.optim.SGD, {}, torch.float32),
]


@pytest.mark.parametrize(("dtype", "kind", "options", "limit"), LIMITS, ids=str)
def test_lr_stops_before_its_range_does(dtype, kind, options, limit):
    opt = one(kind, torch.ones(3, dtype=dtype), **{"lr": 1.0, **options})
    p = the(opt)
    scheduler = EquivalentExponentialLR(opt, 0.75)  # lr of step t: 4 * 16^t, exactly
    most = torch.finfo(limit).max
    last = next(t for t in range(1000) if not 4 * 16 ** (t + 1) < int(most))
    for _ in range(last):
        p.grad = torch.zeros_like(p)
        opt.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [4 * 16.0**last]
    p.grad = torch.zeros_like(p)
    opt.step()
    assert p.isfinite().all()
    sentence = (
        f"EquivalentExponentialLR.step: param_groups[0]: lr of step {last + 1} expected below {most:.5g}, the largest {limit}, "
        f'got 2**{4 * last + 6:.2f}; normkern.SGD(decay="exponential") does not overflow'
    )
    refuses_twice(scheduler.step, opt, sentence, scheduler)


def test_a_group_stops_at_its_least_parameter():
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1, dtype=d)) for d in (torch.float64, torch.float32)], lr=1.0)
    scheduler = EquivalentExponentialLR(opt, 0.75)
    opt.step()
    with pytest.raises(ValueError, match="the largest torch.float32"):
        until_refused(scheduler.step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("start", [1.0, 0.03])
def test_weights_stop_before_their_range_does(dtype, start):
    """Weights that grow like 1/a, as those of a run at equilibrium do."""
    most = torch.finfo(dtype).max
    opt = one(normkern.SGD, torch.full((3,), start * 2.0 ** (math.log2(most) // 1 - 20), dtype=dtype))
    p = the(opt)
    scheduler = EquivalentExponentialLR(opt, 1.0)  # by 1/0.9 a step

    def grow():
        with torch.no_grad():
            p.div_(0.9)
        p.grad = torch.zeros_like(p)
        opt.step()
        assert p.isfinite().all()
        scheduler.step()

    with pytest.raises(ValueError) as caught:
        until_refused(grow)
    largest = p.abs().max().item()
    assert most / 4 < largest < most / 1.9
    sentence = str(caught.value)
    assert sentence == (
        f"EquivalentExponentialLR.step: param_groups[0]: weights at step {scheduler.last_epoch + 1} expected at most 1/4 of "
        f"{most:.5g}, the largest {dtype}, as they grow, got {largest:.5g} in params[0]; "
        'normkern.SGD(decay="exponential") does not overflow'
    )
    opt.step = lambda *_: None
    opt.step._wrapped_by_lr_sched = True
    refuses_twice(scheduler.step, opt, sentence, scheduler)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_run_that_is_not_watched_ends_with_a_sentence_and_not_with_infinities(dtype):
    opt = one(normkern.SGD, torch.linspace(-1, 2, SIZE, dtype=dtype), momentum=0.5)
    scheduler = EquivalentExponentialLR(opt, 0.5)
    loss, p = forms(50).float(), the(opt)

    def train():
        p.grad = gradient(p.detach().float(), loss[scheduler.last_epoch % 50]).to(dtype)
        opt.step()
        assert p.isfinite().all()
        scheduler.step()

    with pytest.raises(ValueError, match="does not overflow"):
        until_refused(train)
    assert scheduler.last_epoch > 50


def test_weights_are_measured_once_per_doubling(monkeypatch):
    from normkern.schedules import growing

    measured = []
    monkeypatch.setattr(growing, "largest_weight", lambda p: measured.append(scheduler.last_epoch) or 0.0)
    scheduler = EquivalentExponentialLR(one(), 1.0)
    for _ in range(60):
        scheduler.optimizer.step()
        scheduler.step()
    ends = [
        t for t in range(1, 61) if math.floor(-math.log2(0.9) * (t + 1) + 0.5) > math.floor(-math.log2(0.9) * t + 0.5)
    ]
    assert measured == [t - 1 for t in ends]
    assert len(ends) == 9


def test_a_sudden_drop_asks_for_more_room():
    opt = one(normkern.SGD, torch.full((3,), 3000.0, dtype=torch.float16))
    scheduler = EquivalentExponentialLR(opt, 1.0, lambda t: 0.99 if t == 2 else 0.0)
    opt.step()
    scheduler.step()
    with pytest.raises(
        ValueError, match="weights at step 2 expected at most 1/256 of 65504, the largest torch.float16"
    ):
        scheduler.step()


def test_parameters_without_numbers_are_passed_over():
    from normkern.schedules.growing import largest_weight

    assert largest_weight(torch.tensor([1, -7])) == 0
    assert largest_weight(torch.empty(0, 3)) == 0
    assert largest_weight(torch.empty(3, device="meta")) == 0
    assert largest_weight(torch.tensor([3 - 4j, 1])) == 5
    assert largest_weight(torch.tensor([1.0, -7.0], dtype=torch.float16)) == 7
    assert largest_weight(torch.tensor([[0.0, -7.0], [0.0, 2.0]]).to_sparse()) == 7
    twice = torch.sparse_coo_tensor([[0, 0]], torch.tensor([3.0, 4.0]), (2,), check_invariants=True)
    assert largest_weight(twice) == 7
    assert largest_weight(torch.zeros(2).to_sparse()) == 0
    assert math.isnan(largest_weight(torch.tensor([1.0, math.nan])))
    assert largest_weight(torch.tensor([1.0, -math.inf])) == math.inf
    opt = torch.optim.SGD(
        [{"params": []}, {"params": [torch.ones(2, dtype=torch.int64), nn.Parameter(torch.ones(1))]}], lr=0.5
    )
    scheduler = EquivalentExponentialLR(opt, 1.0)
    opt.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [4.0, 4.0]


def precision(steps):
    """The worst relative error of a over all steps, checked against 50 digits now and then."""
    rng, digits = random.Random(0), decimal.Context(prec=50)
    decay, mu, tau = 0.01, 0.9, 0.1
    gauge, a, z, worst = ops.NEW_GAUGE, digits.create_decimal(1), digits.create_decimal(0), 0.0
    big_mu, source = (
        digits.create_decimal(mu),
        digits.multiply(1 - digits.create_decimal(tau), digits.create_decimal(decay)),
    )
    kinds = [lambda t: 0.1, lambda t: 0.1 * 0.1 ** (t // 1000 % 3), lambda t: 0.05 * (1 + math.cos(t / 500)), lambda t: 0.2 * rng.random()]  # fmt: skip
    for t in range(steps):
        lr = kinds[t // 10_000 % 4](t)
        gauge = ops.gauge_step(gauge, lr, mu, tau, decay, False, ops.Buffers.KEPT).next
        z = digits.fma(big_mu, z, source)
        q = digits.subtract(1, digits.multiply(digits.create_decimal(lr), z))
        z, a = digits.divide(z, q), digits.multiply(a, q)
        if t % 1009 == 0 or t == steps - 1:
            scale, _, exponent = gauge
            ratio = digits.divide(digits.multiply(digits.create_decimal(scale), digits.power(2, -exponent)), a)
            worst = max(worst, abs(float(ratio - 1)))
    return worst, gauge


def test_many_steps_lose_few_digits():
    worst, gauge = precision(40_000)
    assert worst < 40_000 * 2**-53  # with a constant lr each step rounds alike
    assert gauge[2] > 100


@pytest.mark.slow
def test_a_million_steps_lose_few_digits():
    worst, gauge = precision(1_000_000)
    assert worst < 1_000_000 * 2**-53
    assert gauge[2] > 5000
