"""EquivalentExponentialLR: the run with weight decay, followed without."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.one_weight import forms, gradient, one, the
from torch import nn
from torch.optim import lr_scheduler as lrs

import normkern
from normkern import EquivalentExponentialLR
from normkern.theory import exponential_factor

from .exponential_runs import DECAY, SCHEDULES, advance, apart, both, cosine, patient, with_decay


@pytest.mark.pairwise
@both
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("momentum", [0, 0.5, 0.9])
@pytest.mark.parametrize("dampening", [0, 0.3])
def test_weights_are_those_of_the_run_with_decay(kind, schedule, momentum, dampening):
    loss, options = forms(), {"momentum": momentum, "dampening": dampening}
    expected = with_decay(loss, schedule, **options)
    opt = one(kind, **options)
    scheduler = EquivalentExponentialLR(opt, DECAY, schedule)
    for w, a in zip(expected, loss, strict=True):
        assert apart(scheduler, w) < 1e-11
        advance(opt, a, scheduler)
    assert scheduler.true_scale()[0] < 0.9


def test_the_equilibrium_of_the_norm_is_a_ratio_of_norm_and_lr():
    """T5.8: |w~|^2/lr~_t = |w|^2 a_{t+1}/(a_t lr_t), with w of torch's run."""
    loss = forms()
    expected = with_decay(loss, cosine, momentum=0.9)
    opt = one(momentum=0.9)
    scheduler = EquivalentExponentialLR(opt, DECAY, cosine)
    for t, (w, a) in enumerate(zip(expected, loss, strict=True)):
        (before,), (lr,), ours = scheduler.log2_true_scale(), scheduler.get_last_lr(), the(opt).detach().square().sum()
        advance(opt, a, scheduler)
        (after,) = scheduler.log2_true_scale()
        assert ours / lr == pytest.approx(float(w.square().sum()) * 2 ** (after - before) / cosine(t), rel=1e-11)


def test_constant_lr_grows_by_the_factor():
    """T5.2: what any gauge tends to is the paper's exponential."""
    opt = one(momentum=0.9)
    scheduler = EquivalentExponentialLR(opt, 5e-4)
    alpha = exponential_factor(lr=0.1, weight_decay=5e-4, momentum=0.9)
    rates = []
    for _ in range(600 + 391):
        rates += scheduler.get_last_lr()
        opt.step()
        scheduler.step()
    assert rates[-1] / rates[-2] == pytest.approx(alpha**-2, rel=1e-12)
    assert rates[-1] / rates[-392] == pytest.approx(1.48123, abs=5e-6)


def test_buffers_that_exist_are_those_of_the_run():
    loss = forms(80)
    straight = with_decay(loss, momentum=0.9, dampening=0.3)
    opt = one(momentum=0.9, dampening=0.3, weight_decay=DECAY)
    for a in loss[:30]:
        advance(opt, a)
    opt.param_groups[0]["weight_decay"] = 0
    scheduler = EquivalentExponentialLR(opt, DECAY)
    for t in range(30, 80):
        assert apart(scheduler, straight[t]) < 1e-12
        advance(opt, loss[t], scheduler)


@patient
@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.floats(0.01, 0.9), st.floats(-0.2, 0.9)), min_size=2, max_size=40),
    st.floats(0, 0.02),
    st.integers(0, 2**31),
)
def test_everything_may_change_between_steps(steps, weight_decay, seed):
    torch.manual_seed(seed)

    def change(t):
        _, momentum, dampening = steps[min(t, len(steps) - 1)]
        return {"momentum": momentum, "dampening": dampening}

    def schedule(t):
        return steps[min(t, len(steps) - 1)][0]

    loss = forms(len(steps))
    expected = with_decay(loss, schedule, weight_decay, momentum=0.9, change=change)
    opt = one(**change(0))
    scheduler = EquivalentExponentialLR(opt, weight_decay, schedule)
    for t, a in enumerate(loss):
        assert apart(scheduler, expected[t]) < 1e-11
        p = the(opt)
        p.grad = gradient(p.detach(), a)
        opt.step()
        opt.param_groups[0].update(change(t + 1))  # before the step that sets the lr it goes with
        scheduler.step()


def test_momentum_that_begins_later():
    loss, options = forms(60), {"dampening": 0.3}

    def change(t):
        return {"momentum": 0.9 if t >= 20 else 0}

    expected = with_decay(loss, change=change, **options)
    opt = one(**options)
    scheduler = EquivalentExponentialLR(opt, DECAY)
    for t, a in enumerate(loss):
        assert apart(scheduler, expected[t]) < 1e-12
        p = the(opt)
        p.grad = gradient(p.detach(), a)
        opt.step()
        opt.param_groups[0].update(change(t + 1))
        scheduler.step()


def test_dampening_does_not_count_at_the_first_step_and_without_momentum():
    for options in ({"momentum": 0.9}, {}):
        a, b = (
            EquivalentExponentialLR(one(dampening=dampening, **options), DECAY).get_last_lr() for dampening in (0, 0.7)
        )
        assert a == b == [pytest.approx(0.1 / (1 - 0.1 * DECAY), rel=1e-15)]


class Net(nn.Module):
    """Scale-invariant up to the last layer: eps as good as 0, which torch refuses."""

    def __init__(self):
        super().__init__()
        self.invariant = nn.ModuleList([nn.Linear(8, 16, bias=False), nn.Linear(16, 16, bias=False)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(16, eps=1e-30) for _ in self.invariant])
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        for layer, norm in zip(self.invariant, self.norms, strict=True):
            x = torch.tanh(norm(layer(x)))
        return self.last(x)

    def groups(self, decay, other_decay):
        rest = [p for n, p in self.named_parameters() if not n.startswith("invariant")]
        return [
            {"params": rest, "weight_decay": other_decay},
            {"params": list(self.invariant.parameters()), "weight_decay": decay},
        ]


@both
@pytest.mark.parametrize(
    "schedule",
    [lambda t: 0.1 if t < 200 else 0.01 if t < 400 else 0.001, lambda t: 0.05 * (1 + math.cos(math.pi * t / 500))],
    ids=["step", "cosine"],
)
def test_a_network_computes_what_it_does_with_weight_decay(kind, schedule):
    torch.set_num_threads(1)
    theirs = Net().double()
    ours = copy.deepcopy(theirs)
    x, y = torch.randn(10, 24, 8, dtype=torch.float64), torch.randint(4, (10, 24))
    opt = torch.optim.SGD(theirs.groups(DECAY, 0.003), lr=0.1, momentum=0.9)
    plain = lrs.LambdaLR(opt, lambda t: schedule(t) / 0.1)
    mine = kind(ours.groups(0, 0.003), lr=0.1, momentum=0.9)
    scheduler = EquivalentExponentialLR(mine, DECAY, schedule, groups=[1])
    for t in range(500):
        results = []
        for net, optimizer, s in ((theirs, opt, plain), (ours, mine, scheduler)):
            optimizer.zero_grad()
            out = net(x[t % 10])
            nn.functional.cross_entropy(out, y[t % 10]).backward()
            optimizer.step()
            s.step()
            results.append(out.detach())
        torch.testing.assert_close(*results, rtol=0, atol=1e-9)
    assert scheduler.true_scale()[0] == 1.0
    assert scheduler.true_scale()[1] < 0.7
    for p, q in zip(theirs.invariant.parameters(), ours.invariant.parameters(), strict=True):
        torch.testing.assert_close(p, q * scheduler.true_scale()[1], rtol=1e-9, atol=0)
    assert theirs.last.weight.norm().item() == pytest.approx(ours.last.weight.norm().item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_both_faces_are_the_same_run_to_the_bit(dtype, momentum):
    """The schedule's weights are those of decay="exponential", with none of its powers of two taken out."""
    decay = 0.02 if momentum else 0.2  # so that the scale halves several times in either case
    loss = forms().to(dtype)
    kept = one(normkern.SGD, dtype=dtype, momentum=momentum, weight_decay=decay, decay="exponential")
    kept.param_groups[0].update(norm_buffers=[], followers=[], scale_invariant=True)
    grown = one(normkern.SGD, dtype=dtype, momentum=momentum)
    schedule = EquivalentExponentialLR(grown, decay, cosine)
    for t, a in enumerate(loss):
        kept.param_groups[0]["lr"] = cosine(t)
        advance(kept, a)
        advance(grown, a, schedule)
        exponent = kept.param_groups[0]["gauge"][2]
        assert torch.equal(torch.ldexp(the(kept), torch.tensor(exponent)), the(grown)), t
        if momentum:
            buffers = [opt.state[the(opt)]["momentum_buffer"] for opt in (kept, grown)]
            assert torch.equal(torch.ldexp(buffers[0], torch.tensor(-exponent)), buffers[1]), t
    assert exponent >= 5
    assert kept.true_scale()[0] * 2.0**-exponent == pytest.approx(schedule.true_scale()[0], rel=1e-12)
