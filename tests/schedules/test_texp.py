"""TEXP and TEXP++: the paper's rules, how far they are from the run with weight decay, and through saves."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.one_weight import SIZE, forms, gradient, one, the
from torch import nn
from torch.optim import lr_scheduler as lrs

import normkern
from normkern import TEXP, EquivalentExponentialLR, SvagSchedule
from normkern.theory import exponential_factor

STEPS, DECAY, MILESTONES = 400, 0.01, [130, 265]
MOMENTUM = {"momentum": 0.9}
BUFFER = "momentum_buffer"


def step_decay(t):
    return 0.1 * 0.1 ** sum(t >= m for m in MILESTONES)


def with_decay(loss, momentum=0.9, weight_decay=DECAY):
    opt, out = one(momentum=momentum, weight_decay=weight_decay), []
    for t, a in enumerate(loss):
        opt.param_groups[0]["lr"] = step_decay(t)
        out.append(the(opt).detach().clone())
        the(opt).grad = gradient(the(opt).detach(), a)
        opt.step()
    return out


def follow(scheduler, loss, expected):
    """Distances from the run with weight decay, of weights and of directions, before each step; and all lrs."""
    opt, weights, directions, rates = scheduler.optimizer, [], [], []
    for w, a in zip(expected, loss, strict=True):
        p = the(opt).detach()
        weights.append(float((scheduler.true_scale()[0] * p - w).norm() / w.norm()))
        directions.append(float((p / p.norm() - w / w.norm()).norm()))
        rates += scheduler.get_last_lr()
        the(opt).grad = gradient(p, a)
        opt.step()
        scheduler.step()
    return weights, directions, rates


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0, 0.5, 0.9])
def test_lrs_are_the_papers_step_by_step(momentum):
    opt = one(momentum=momentum)
    scheduler = TEXP(opt, DECAY, [5, 9], 0.1)
    eta = [0.1, 0.01, 0.001]
    alpha = [exponential_factor(lr=lr, weight_decay=DECAY, momentum=momentum) for lr in eta]
    expected, phase = 0.1 / alpha[0], 0
    for t in range(14):
        if t in (5, 9):
            phase += 1
            expected *= (eta[phase] / eta[phase - 1]) / (alpha[phase] * alpha[phase - 1])
        elif t:
            expected *= alpha[phase] ** -2
        assert scheduler.get_last_lr() == [pytest.approx(expected, rel=1e-14)]
        opt.step()
        scheduler.step()


def test_without_momentum_it_is_the_exact_map():
    loss = forms()
    weights, _, rates = follow(TEXP(one(), DECAY, MILESTONES), loss, with_decay(loss, 0))
    assert max(weights) < 1e-11
    opt = one()
    exact = EquivalentExponentialLR(opt, DECAY, step_decay)
    for lr in rates:
        assert exact.get_last_lr() == [pytest.approx(lr, rel=1e-13)]
        opt.step()
        exact.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, normkern.SGD], ids=["torch", "ours"])
@pytest.mark.parametrize("momentum", [0, 0.5, 0.9])
def test_plus_plus_is_the_run_with_weight_decay(kind, momentum):
    loss = forms()
    scheduler = TEXP(one(kind, momentum=momentum), DECAY, MILESTONES, plus_plus=True)
    weights, _, _ = follow(scheduler, loss, with_decay(loss, momentum))
    assert max(weights) < 1e-11
    assert scheduler.true_scale()[0] < 0.9


def test_how_far_it_is_without_the_buffers():
    """T5.4. Of the terms of TEXP++ the first matters most: plain TEXP begins with another momentum."""
    loss = forms()
    expected = with_decay(loss)
    plain = follow(TEXP(one(**MOMENTUM), DECAY, MILESTONES), loss, expected)
    half = TEXP(one(**MOMENTUM), DECAY, MILESTONES)
    alpha = exponential_factor(lr=0.1, weight_decay=DECAY, momentum=0.9)
    w = the(half.optimizer)
    half.optimizer.state[w][BUFFER] = -(1 - alpha) / (alpha * 0.1) * w.detach()
    without_boundary_terms = follow(half, loss, expected)
    assert 0.01 < plain[1][-1] < 0.5
    assert 0.01 < max(plain[0]) < 0.5
    assert max(without_boundary_terms[1][:131]) < 1e-14
    assert 5e-5 < without_boundary_terms[1][-1] < 1e-3
    assert 1e-6 < without_boundary_terms[1][140] < 1e-4
    exact = EquivalentExponentialLR(one(**MOMENTUM), DECAY, step_decay)
    ratios = []
    for lr in plain[2]:
        ratios.append(lr / exact.get_last_lr()[0])
        exact.optimizer.step()
        exact.step()
    assert min(ratios) == pytest.approx(1.010, abs=1e-3)
    assert max(ratios) == pytest.approx(1.274, abs=1e-3)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 30), max_size=4, unique=True).map(sorted),
    st.floats(0.05, 1.3),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.floats(0, 8e-3),
    st.integers(0, 2**31),
)
def test_plus_plus_for_every_schedule(milestones, gamma, momentum, weight_decay, seed):
    torch.manual_seed(seed)
    loss = forms(40)
    plain = one(momentum=momentum, weight_decay=weight_decay)
    decay = lrs.MultiStepLR(plain, milestones, gamma)
    opt = one(momentum=momentum)
    scheduler = TEXP(opt, weight_decay, milestones, gamma, plus_plus=True)
    for a in loss:
        w, p = the(plain).detach(), the(opt).detach()
        torch.testing.assert_close(scheduler.true_scale()[0] * p, w, rtol=0, atol=1e-11 * float(w.norm()))
        for optimizer, s in ((plain, decay), (opt, scheduler)):
            the(optimizer).grad = gradient(the(optimizer).detach(), a)
            optimizer.step()
            s.step()


def test_groups_have_their_own_lr_momentum_and_decay():
    groups = [
        {"params": [nn.Parameter(torch.ones(2))]},
        {"params": [nn.Parameter(torch.ones(2))], "lr": 0.5, "momentum": 0.0},
        {"params": [nn.Parameter(torch.ones(2))], "lr": 0.3},
    ]
    opt = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    scheduler = TEXP(opt, [0.1, 0.2, 0.0], [2], gamma=0.5)
    for _ in range(3):
        opt.step()
        scheduler.step()
    first, second = (exponential_factor(lr=lr, weight_decay=0.1, momentum=0.5) for lr in (0.1, 0.05))
    assert scheduler.get_last_lr() == pytest.approx(
        [0.05 / (first**4 * second**3), 0.25 / (0.9**4 * 0.95**3), 0.15], rel=1e-14
    )
    assert scheduler.true_scale() == pytest.approx([first**2 * second, 0.9**2 * 0.95, 1.0], rel=1e-14)


def test_buffers_are_those_of_parameters_that_are_trained():
    frozen, trained = (
        nn.Parameter(torch.ones(2), requires_grad=False),
        nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
    )
    opt = torch.optim.SGD([frozen, trained], lr=0.1, momentum=0.9)
    TEXP(opt, DECAY, [3], plus_plus=True)
    assert list(opt.state) == [trained]
    alpha = exponential_factor(lr=0.1, weight_decay=DECAY, momentum=0.9)
    buffer = opt.state[trained][BUFFER]
    assert buffer.dtype == torch.bfloat16
    assert not buffer.requires_grad
    assert buffer.tolist() == [pytest.approx(-(1 - alpha) / (alpha * 0.1), rel=2**-8)] * 2
    opt = torch.optim.SGD([trained], lr=0.1)
    TEXP(opt, DECAY, [3], plus_plus=True)
    assert not opt.state


def test_a_long_run_in_float64_keeps_its_digits():
    """The scale is no product of a million factors: rounding does not pile up."""
    opt = one(lr=1e-3, momentum=0.5)
    scheduler = TEXP(opt, 1e-6, [10**6])
    state = scheduler.state_dict()
    scheduler.load_state_dict({**state, "last_epoch": 10**6 - 1, "_step_count": 10**6})
    opt.step()
    scheduler.step()
    c = 1e-9  # lr * weight_decay; x = 1 - alpha solves x^2 - (1/2 + c) x + c = 0
    x = 2 * c + 4 * c**2
    assert scheduler.log2_true_scale()[0] * math.log(2) == pytest.approx(10**6 * math.log1p(-x), rel=1e-13)


def test_milestones_may_be_none():
    opt = one(**MOMENTUM)
    scheduler = TEXP(opt, DECAY, [])
    alpha = exponential_factor(lr=0.1, weight_decay=DECAY, momentum=0.9)
    for t in range(4):
        assert scheduler.get_last_lr() == [pytest.approx(0.1 * alpha ** (-2 * t - 1), rel=1e-14)]
        opt.step()
        scheduler.step()


def test_it_is_a_scheduler_for_those_who_ask():
    opt = one(**MOMENTUM)
    scheduler = TEXP(opt, DECAY, (3, 5), plus_plus=True)
    assert isinstance(scheduler, lrs.LRScheduler)
    assert repr(scheduler) == "TEXP(weight_decay=[0.01], milestones=[3, 5], gamma=0.1, plus_plus=True, last_epoch=0)"
    slow = SvagSchedule(scheduler, 1)
    opt.step()
    slow.step()
    assert scheduler.last_epoch == 1


def test_in_a_sequence():
    opt = one(**MOMENTUM)
    scheduler = TEXP(opt, DECAY, [3])
    first = scheduler.get_last_lr()
    lrs.SequentialLR(opt, [scheduler, lrs.ConstantLR(opt)], milestones=[2])
    assert scheduler.last_epoch == 0
    assert scheduler.get_last_lr() == first


# --- resuming ---------------------------------------------------------------------------------------------------------


def trace(scheduler, loss):
    opt, out = scheduler.optimizer, []
    for a in loss:
        the(opt).grad = gradient(the(opt).detach(), a)
        opt.step()
        scheduler.step()
        out.append(
            (scheduler.get_last_lr(), scheduler.true_scale(), the(opt).tolist(), opt.state[the(opt)][BUFFER].tolist())
        )
    return out


@pytest.mark.pairwise
@pytest.mark.parametrize("plus_plus", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 13])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_resumed_is_never_stopped(plus_plus, stop, optimizer_first):
    loss, arguments = forms(20), {"weight_decay": DECAY, "milestones": [7, 13], "plus_plus": plus_plus}
    scheduler = TEXP(one(**MOMENTUM), **arguments)
    trace(scheduler, loss[:stop])
    file, w = io.BytesIO(), the(scheduler.optimizer).detach().clone()
    torch.save({"opt": scheduler.optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    straight = trace(scheduler, loss[stop:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = TEXP(one(w=w, **MOMENTUM), **arguments)
    for name in ("opt", "scheduler") if optimizer_first else ("scheduler", "opt"):
        (fresh.optimizer if name == "opt" else fresh).load_state_dict(saved[name])
    assert trace(fresh, loss[stop:]) == straight


def test_last_epoch_begins_after_a_run():
    scheduler = TEXP(one(**MOMENTUM), DECAY, [7, 13])
    trace(scheduler, forms(10))
    anew = TEXP(scheduler.optimizer, DECAY, [7, 13], last_epoch=9)
    assert anew.last_epoch == 10
    assert anew.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"milestones": [7]}, "milestones expected [7, 13], that of this schedule, got [7]"),
        ({"gamma": 0.5}, "gamma expected 0.1, that of this schedule, got 0.5"),
        ({"plus_plus": 1}, "plus_plus expected True, that of this schedule, got 1"),
        ({"momentum": [0.5]}, "momentum expected [0.9], that of this schedule, got [0.5]"),
        ({"weight_decay": [0.5]}, "weight_decay expected [0.01], that of this schedule, got [0.5]"),
        ({"_last_lr": [-1.0]}, "_last_lr[0] expected a finite number >= 0, got -1.0"),
    ],
)
def test_foreign_state_is_refused_before_anything_is_loaded(change, sentence):
    scheduler = TEXP(one(**MOMENTUM), DECAY, [7, 13], plus_plus=True)
    before = copy.deepcopy(scheduler.state_dict())
    with pytest.raises(ValueError) as caught:
        scheduler.load_state_dict({**before, "last_epoch": 5, **change})
    assert str(caught.value) == f"TEXP.load_state_dict: {sentence}"
    with pytest.raises(ValueError, match=r"lr \* weight_decay from step 0 expected at most"):
        scheduler.load_state_dict({**before, "last_epoch": 5, "base_lrs": [10.0]})
    assert scheduler.state_dict() == before


# --- what is refused --------------------------------------------------------------------------------------------------


def with_buffers():
    opt = one(**MOMENTUM)
    the(opt).grad = torch.ones(SIZE, dtype=torch.float64)
    opt.step()
    return opt


GROUP = "TEXP: param_groups[0]: "
REFUSED = [
    (lambda: one(momentum=0.9, nesterov=True), {}, GROUP + 'nesterov expected False, got True; normkern.SGD(decay="exponential") follows it'),
    (lambda: one(weight_decay=0.1), {}, GROUP + "weight_decay expected 0, as the learning rate takes its place, got 0.1"),
    (lambda: one(torch.optim.Adam), {}, GROUP + "expected one of an SGD, got 'betas' among its options"),
    (lambda: one(momentum=0.9, dampening=0.1), {}, GROUP + "dampening expected 0, got 0.1"),
    (lambda: one(momentum=1.0), {"weight_decay": 0.0}, GROUP + "momentum expected a number in [0, 1), got 1.0"),
    (lambda: one(lr=0.0), {}, GROUP + "lr from step 0 expected a finite number > 0, got 0.0"),
    (lambda: one(lr=0.1), {"gamma": 1e-200}, GROUP + "lr from step 5 expected a finite number > 0, got 0.0"),
    (lambda: one(lr=1.0), {"weight_decay": 1.0}, GROUP + "lr * weight_decay from step 0 expected less than 1, the whole of the weights, got 1.0 * 1.0"),
    (
        lambda: one(**MOMENTUM),
        {"gamma": 2.0},
        GROUP + "lr * weight_decay from step 5 expected at most (1 - sqrt(momentum))**2 = 0.0026334 with momentum 0.9, got 0.4 * 0.01 = 0.004",
    ),
    (with_buffers, {"plus_plus": True}, GROUP + "expected no momentum buffers yet, as plus_plus writes the first, got one for "
                                        "params[0]; construct the scheduler before the optimizer's load_state_dict"),
    (one, {"milestones": 3}, "TEXP: milestones expected a list of integers, got 3"),
    (one, {"milestones": [1.0]}, "TEXP: milestones expected a list of integers, got [1.0]"),
    (one, {"milestones": [True]}, "TEXP: milestones expected a list of integers, got [True]"),
    (one, {"milestones": [0, 3]}, "TEXP: milestones expected to grow, from 1 on, got [0, 3]"),
    (one, {"milestones": [3, 3]}, "TEXP: milestones expected to grow, from 1 on, got [3, 3]"),
    (one, {"gamma": 0}, "TEXP: gamma expected a number > 0, got 0"),
    (one, {"gamma": math.nan}, "TEXP: gamma expected a finite number >= 0, got nan"),
    (one, {"gamma": True}, "TEXP: gamma expected a finite number >= 0, got True"),
    (one, {"plus_plus": 1}, "TEXP: plus_plus expected True or False, got 1"),
    (one, {"plus_plus": True, "last_epoch": 3}, "TEXP: last_epoch expected -1 with plus_plus, got 3; load_state_dict resumes a run"),
    (one, {"weight_decay": -1}, "TEXP: weight_decay expected a finite number >= 0, got -1"),
    (one, {"weight_decay": [0.1, 0.1]}, "TEXP: weight_decay expected a number or 1, one per param group, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "arguments", "sentence"), REFUSED, ids=lambda x: x[:70] if isinstance(x, str) else "")
def test_refusals(make, arguments, sentence):
    opt = make()
    before, state = [dict(group) for group in opt.param_groups], copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(ValueError) as caught:
        TEXP(opt, **{"weight_decay": DECAY, "milestones": [2, 5], **arguments})
    assert str(caught.value) == sentence
    assert [dict(group) for group in opt.param_groups] == before
    assert str(opt.state_dict()["state"]) == str(state)


class Plain(torch.optim.Optimizer):
    def __init__(self):
        super().__init__([nn.Parameter(torch.ones(3))], {"lr": 0.1, "momentum": 0.9})

    def step(self, closure=None):
        pass


def test_plus_plus_knows_the_buffers_of_sgd_alone():
    assert TEXP(Plain(), DECAY, [3]).last_epoch == 0
    with pytest.raises(
        ValueError, match="TEXP: optimizer expected a torch.optim.SGD, as plus_plus writes its buffers, got Plain"
    ):
        TEXP(Plain(), DECAY, [3], plus_plus=True)
    with pytest.raises(TypeError, match="list is not an Optimizer"):
        TEXP([], DECAY, [3])


@pytest.mark.parametrize("plus_plus", [False, True])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"momentum": 0.5}, "momentum expected to stay 0.9, got 0.5; EquivalentExponentialLR follows one that changes"),
        ({"momentum": 0}, "momentum expected to stay 0.9, got 0.0; EquivalentExponentialLR follows one that changes"),
        ({"dampening": 0.5}, "dampening expected 0, got 0.5"),
        ({"weight_decay": 0.5}, "weight_decay expected 0, as the learning rate takes its place, got 0.5"),
        ({"nesterov": True}, 'nesterov expected False, got True; normkern.SGD(decay="exponential") follows it'),
    ],
    ids=str,
)
def test_changes_in_the_middle_are_refused_and_change_nothing(plus_plus, change, sentence):
    opt = one(**MOMENTUM)
    scheduler = TEXP(opt, DECAY, [2, 5], plus_plus=plus_plus)
    trace(scheduler, forms(1))
    opt.param_groups[0].update(change)  # and the next step would be a milestone's
    before = scheduler.state_dict(), str(opt.state_dict()), the(opt).tolist()
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            scheduler.step()
        assert str(caught.value) == f"TEXP.step: param_groups[0]: {sentence}"
        assert (scheduler.state_dict(), str(opt.state_dict()), the(opt).tolist()) == before
    with pytest.raises(ValueError, match="TEXP.step: epoch expected None, got 7"):
        scheduler.step(7)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2.0**128), (torch.float64, 2.0**1023 * 1.99)])
def test_lr_stops_before_its_range_does(dtype, most):
    opt = one(w=torch.zeros(2, dtype=dtype), lr=1.0)
    scheduler = TEXP(opt, 0.75, [3], 0.5)
    with pytest.raises(
        ValueError, match=f"lr of step \\d+ expected below .*, the largest {dtype}, got 2\\*\\*"
    ) as caught:
        until_refused(opt, scheduler)
    (lr,) = scheduler.get_last_lr()
    assert lr < most < lr * (1 - 0.375) ** -2
    assert str(caught.value).startswith(
        f"TEXP.step: param_groups[0]: lr of step {scheduler.last_epoch + 1} expected below "
    )
    assert str(caught.value).endswith('; normkern.SGD(decay="exponential") does not overflow')


def test_weights_stop_before_their_range_does():
    opt = one(normkern.SGD, torch.full((3,), 1000.0, dtype=torch.float16), lr=0.1)
    scheduler = TEXP(opt, 1.0, [1000])  # by 1/0.9 a step
    with pytest.raises(
        ValueError, match="weights at step \\d+ expected at most 1/4 of 65504, the largest torch.float16"
    ):
        until_refused(opt, scheduler, lambda p: p.div_(0.9))
    assert 65504 / 4 < the(opt).max() < 65504 / 1.9


def until_refused(opt, scheduler, change=lambda p: None):
    for _ in range(10_000):
        change(the(opt).detach())
        opt.step()
        scheduler.step()
