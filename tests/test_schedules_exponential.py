"""EquivalentExponentialLR: the run with weight decay, followed without; through saves, and up to where numbers end."""

import copy
import decimal
import io
import math
import pickle
import random
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_weight import SIZE, forms, gradient, one, the
from torch import nn
from torch.optim import lr_scheduler as lrs

import normkern
from normkern import EquivalentExponentialLR, ops
from normkern.theory import exponential_factor

STEPS, DECAY = 400, 0.02
OPTIMIZERS = {"torch": torch.optim.SGD, "ours": normkern.SGD}
both = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
patient = settings(deadline=None, max_examples=50)


def step_decay(t):
    return 0.1 if t < 150 else 0.01 if t < 300 else 0.001


def cosine(t):
    return 0.05 * (1 + math.cos(math.pi * t / STEPS))


def unsteady(t):
    return 0.1 * random.Random(t).random()


SCHEDULES = {"constant": None, "step": step_decay, "cosine": cosine, "random": unsteady}


def advance(opt, a, scheduler=None):
    p = the(opt)
    p.grad = gradient(p.detach(), a)
    opt.step()
    if scheduler is not None:
        scheduler.step()


def with_decay(loss, schedule=None, weight_decay=DECAY, w=None, change=None, **options):
    """The weights before each step of torch's own run with weight decay, and the norms of nothing else."""
    opt, out = one(w=w, weight_decay=weight_decay, **options), []
    for t, a in enumerate(loss):
        if change is not None:
            opt.param_groups[0].update(change(t))
        opt.param_groups[0]["lr"] = 0.1 if schedule is None else schedule(t)
        out.append(the(opt).detach().clone())
        advance(opt, a)
    return out


def apart(scheduler, w):
    """How far our weights are from w, relative to it, after the scale."""
    (a,) = scheduler.true_scale()
    return float((a * the(scheduler.optimizer).detach() - w).norm() / w.norm())


# --- the theorem ------------------------------------------------------------------------------------------------------


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


# --- groups and arguments ---------------------------------------------------------------------------------------------


def two(kind=torch.optim.SGD, **options):
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(3))], "lr": 0.3}]
    return kind(groups, **{"lr": 0.1, **options})


def test_each_group_has_its_own():
    opt = two()
    scheduler = EquivalentExponentialLR(opt, [0.5, 1.0], [lambda t: 0.1, lambda t: 0.2 / (1 + t)])
    opt.step()
    scheduler.step()
    q = [1 - 0.1 * 0.5, 1 - 0.2 * 1.0]
    assert scheduler.true_scale() == pytest.approx(q, rel=1e-15)
    assert scheduler.get_last_lr() == pytest.approx([0.1 / q[0] ** 3, 0.1 / (q[1] ** 2 * (1 - 0.1))], rel=1e-15)
    assert [group["lr"] for group in opt.param_groups] == scheduler.get_last_lr()


def test_groups_without_the_map_get_the_schedule_and_keep_their_decay():
    opt = two()
    opt.param_groups[0].update(weight_decay=0.7, nesterov=True, momentum=0.9)
    scheduler = EquivalentExponentialLR(opt, [9.0, 0.5], lambda t: 0.1 + t, groups=[1])
    opt.step()
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 1.1
    assert opt.param_groups[0]["weight_decay"] == 0.7
    assert scheduler.true_scale() == pytest.approx([1.0, 0.95], rel=1e-15)
    assert scheduler.log2_true_scale() == pytest.approx([0.0, math.log2(0.95)], rel=1e-14)
    none = EquivalentExponentialLR(two(weight_decay=0.1), 0.5, groups=())
    assert none.get_last_lr() == [0.1, 0.3]


def test_without_a_schedule_each_group_keeps_its_initial_lr():
    opt = two()
    scheduler = EquivalentExponentialLR(opt, 0.5)
    assert scheduler.get_last_lr() == pytest.approx([0.1 / 0.95, 0.3 / 0.85], rel=1e-15)
    assert [group["initial_lr"] for group in opt.param_groups] == scheduler.base_lrs == [0.1, 0.3]


def test_the_scale_does_not_underflow_in_logarithms():
    opt = one(lr=1.0)
    scheduler = EquivalentExponentialLR(opt, 0.9)
    for _ in range(150):
        opt.step()
        scheduler.step()
    assert scheduler.log2_true_scale()[0] == pytest.approx(150 * math.log2(0.1), rel=1e-12)
    state = scheduler.state_dict()
    state["gauges"] = [(1.25, 0.0, 5000)]
    scheduler.load_state_dict(state)
    assert scheduler.true_scale() == [0.0]
    assert scheduler.log2_true_scale() == [math.log2(1.25) - 5000]


def test_lr_is_eta_over_neighbouring_scales():
    opt = one(momentum=0.9)
    scheduler = EquivalentExponentialLR(opt, DECAY, cosine)
    for t in range(STEPS):
        (before,), (lr,) = scheduler.log2_true_scale(), scheduler.get_last_lr()
        opt.step()
        scheduler.step()
        assert lr == pytest.approx(cosine(t) * 2 ** -(before + scheduler.log2_true_scale()[0]), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_lr_stays_the_tensor(dtype):
    lr = torch.tensor(0.1, dtype=dtype)
    opt = one(lr=lr)
    scheduler = EquivalentExponentialLR(opt, 1.0)
    opt.step()
    scheduler.step()
    assert opt.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.1 / 0.9**3, rel=1e-6 if dtype == torch.float32 else 1e-15)
    assert scheduler.get_last_lr()[0] is not lr
    assert all(type(x) is float for x in scheduler.state_dict()["_last_lr"])


def test_numbers_of_every_kind_are_welcome():
    wanted = EquivalentExponentialLR(one(), 0.5, lambda t: 0.25).get_last_lr()
    for number in (Fraction(1, 4), torch.tensor(0.25), torch.tensor([0.25]).numpy()[0]):
        for decay in (Fraction(1, 2), torch.tensor(0.5)):
            assert EquivalentExponentialLR(one(), decay, lambda t, x=number: x).get_last_lr() == wanted


def test_it_is_a_scheduler_for_those_who_ask():
    opt = one(momentum=0.9)
    scheduler = EquivalentExponentialLR(opt, DECAY)
    assert isinstance(scheduler, lrs.LRScheduler)
    assert repr(scheduler) == "EquivalentExponentialLR(weight_decay=[0.02], groups=[0], last_epoch=0)"
    chained = lrs.ChainedScheduler([scheduler], optimizer=opt)
    opt.step()
    chained.step()
    assert scheduler.last_epoch == 1
    with pytest.warns(UserWarning, match="please use `get_last_lr"):
        assert scheduler.get_lr() == scheduler.get_last_lr()


def test_first_in_a_sequence_it_starts_once_and_elsewhere_says_no():
    opt = one()
    scheduler = EquivalentExponentialLR(opt, 1.0)
    first = scheduler.get_last_lr()
    sequence = lrs.SequentialLR(opt, [scheduler, lrs.ConstantLR(opt)], milestones=[2])
    assert scheduler.last_epoch == 0
    assert scheduler.get_last_lr() == first
    opt.step()
    sequence.step()
    assert scheduler.true_scale() == [pytest.approx(0.9)]
    opt = one()
    scheduler = EquivalentExponentialLR(opt, 1.0)
    sequence = lrs.SequentialLR(opt, [lrs.ConstantLR(opt), scheduler], milestones=[1])
    opt.step()
    with pytest.raises(ValueError, match="expected steps one by one from its own first, got a jump to 0"):
        sequence.step()


def test_a_step_before_the_optimizers_is_torchs_warning():
    scheduler = EquivalentExponentialLR(one(), DECAY)
    before = scheduler.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Detected call of `lr_scheduler.step\\(\\)` before"):
            scheduler.step()
    assert scheduler.state_dict() == before
    with pytest.warns(UserWarning, match="Detected call of"):
        scheduler.step()
    assert scheduler.last_epoch == 1


# --- resuming ---------------------------------------------------------------------------------------------------------


def resumable(kind=torch.optim.SGD):
    opt = kind(
        [{"params": [nn.Parameter(torch.ones(2).double())]}, {"params": [nn.Parameter(torch.ones(SIZE).double())]}],
        lr=0.1,
        momentum=0.9,
        dampening=0.2,
    )
    return opt, EquivalentExponentialLR(opt, [0.0, DECAY], cosine, groups=[1])


def trace(opt, scheduler, loss):
    """The bits of everything, step after step."""
    out = []
    for a in loss:
        p, q = (group["params"][0] for group in opt.param_groups)
        p.grad, q.grad = torch.ones_like(p), gradient(q.detach(), a)
        opt.step()
        scheduler.step()
        out.append((scheduler.get_last_lr(), scheduler.log2_true_scale(), p.tolist(), q.tolist()))
    return out


@both
@pytest.mark.parametrize("stop", [0, 1, 7, 33, 51])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_resumed_is_never_stopped(kind, stop, optimizer_first):
    loss = forms(60)
    opt, scheduler = resumable(kind)
    trace(opt, scheduler, loss[:stop])
    file = io.BytesIO()
    weights = [group["params"][0].detach().clone() for group in opt.param_groups]
    torch.save({"opt": opt.state_dict(), "scheduler": scheduler.state_dict()}, file)
    straight = trace(opt, scheduler, loss[stop:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    opt, scheduler = resumable(kind)
    with torch.no_grad():
        for group, w in zip(opt.param_groups, weights, strict=True):
            group["params"][0].copy_(w)
    if optimizer_first:
        opt.load_state_dict(saved["opt"])
    scheduler.load_state_dict(saved["scheduler"])
    if not optimizer_first:
        opt.load_state_dict(saved["opt"])
    assert [group["lr"] for group in opt.param_groups] == scheduler.get_last_lr()
    assert trace(opt, scheduler, loss[stop:]) == straight


def test_the_scheduler_alone_brings_the_learning_rates():
    opt, scheduler = resumable()
    trace(opt, scheduler, forms(5))
    fresh, other = resumable()
    other.load_state_dict(scheduler.state_dict())
    assert [group["lr"] for group in fresh.param_groups] == scheduler.get_last_lr()
    lr = torch.tensor(0.1, dtype=torch.float64)
    opt = one(lr=lr)
    EquivalentExponentialLR(opt, 0.5).load_state_dict(
        {**EquivalentExponentialLR(one(), 0.5).state_dict(), "_last_lr": [0.7]}
    )
    assert lr.item() == 0.7
    assert opt.param_groups[0]["lr"] is lr


def test_the_initial_lr_is_that_of_the_checkpoint():
    scheduler = running(one(lr=0.2), 0.5)
    other = EquivalentExponentialLR(one(lr=0.1), 0.5)
    other.load_state_dict(scheduler.state_dict())
    for s in (scheduler, other):
        s.optimizer.step()
        s.step()
    assert other.get_last_lr() == scheduler.get_last_lr()
    assert other.base_lrs == [0.2]


def test_last_epoch_begins_after_a_run():
    loss = forms(60)
    opt, scheduler = resumable()
    trace(opt, scheduler, loss[:21])
    groups = opt.param_groups
    anew = EquivalentExponentialLR(opt, [0.0, DECAY], cosine, last_epoch=20, groups=[1])
    assert anew.last_epoch == 21
    assert anew.get_last_lr() == scheduler.get_last_lr() == [group["lr"] for group in groups]
    assert anew.log2_true_scale() == scheduler.log2_true_scale()
    with pytest.raises(KeyError, match="param 'initial_lr' is not specified in param_groups\\[0\\]"):
        EquivalentExponentialLR(one(), DECAY, last_epoch=3)
    for wrong in (-2, 1.0, True, None):
        with pytest.raises(
            ValueError, match=f"EquivalentExponentialLR: last_epoch expected an integer >= -1, got {wrong}"
        ):
            EquivalentExponentialLR(one(), DECAY, last_epoch=wrong)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves(through):
    loss = forms(12)
    opt, scheduler = resumable()
    trace(opt, scheduler, loss[:5])
    twin = through(scheduler)
    assert twin.optimizer is not opt
    assert trace(twin.optimizer, twin, loss[5:]) == trace(opt, scheduler, loss[5:])


def test_the_state_is_plain_and_has_no_schedule():
    _, scheduler = resumable()
    state = scheduler.state_dict()

    def plain(x):
        return all(map(plain, x)) if isinstance(x, (list, tuple)) else type(x) in (int, float)

    assert all(map(plain, state.values()))
    assert set(state) == {
        "last_epoch", "_step_count", "_last_lr", "base_lrs", "weight_decay", "groups", "gauges", "next_gauges", "buffers",
    }  # fmt: skip
    state["gauges"].clear()  # a copy
    assert scheduler.true_scale() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"last_epoch": -1}, "last_epoch expected an integer >= 0, got -1"),
        ({"last_epoch": True}, "last_epoch expected an integer >= 0, got True"),
        ({"_step_count": 0.0}, "_step_count expected an integer >= 1, got 0.0"),
        ({"_last_lr": [0.1]}, "_last_lr expected a list of 2, got [0.1]"),
        ({"_last_lr": [0.1, math.nan]}, "_last_lr[1] expected a finite number >= 0, got nan"),
        ({"base_lrs": 3}, "base_lrs expected a list of 2, got 3"),
        ({"weight_decay": [0.0, 0.5]}, "weight_decay expected [0.0, 0.02], that of this schedule, got [0.0, 0.5]"),
        ({"groups": [0]}, "groups expected [1], that of this schedule, got [0]"),
        ({"gauges": [(1.0, 0.0, 0)]}, "gauges expected a list of 2, got [(1.0, 0.0, 0)]"),
        ({"gauges": [(1.0, 0.0, 0), (1.0, 0.0)]}, "gauges[1] expected (scale > 0, z, exponent), got (1.0, 0.0)"),
        ({"next_gauges": [(0.0, 0.0, 0)] * 2}, "next_gauges[0] expected (scale > 0, z, exponent), got (0.0, 0.0, 0)"),
        ({"next_gauges": [(1.0, math.inf, 0)] * 2}, "next_gauges[0] expected (scale > 0, z, exponent), got (1.0, inf, 0)"),
        ({"next_gauges": [(1.0, 0.0, 0.5)] * 2}, "next_gauges[0] expected (scale > 0, z, exponent), got (1.0, 0.0, 0.5)"),
        ({"buffers": [0, 1]}, "buffers[1] expected 0, 2 or 3, got 1"),
        ("text", "got str"),
        (None, "got ['last_epoch']"),
    ],
    ids=str,
)  # fmt: skip
def test_foreign_state_is_refused_before_anything_is_loaded(change, sentence):
    opt, scheduler = resumable()
    trace(opt, scheduler, forms(3))
    good = scheduler.state_dict()
    opt, scheduler = resumable()
    before, groups = scheduler.state_dict(), copy.deepcopy(opt.param_groups)
    state = {**good, **change} if isinstance(change, dict) else change if change else {"last_epoch": 3}
    with pytest.raises(ValueError) as caught:
        scheduler.load_state_dict(state)
    assert str(caught.value).startswith("EquivalentExponentialLR.load_state_dict: ")
    assert str(caught.value).endswith(sentence)
    assert scheduler.state_dict() == before
    assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in groups]


# --- what is refused --------------------------------------------------------------------------------------------------


class Plain(torch.optim.Optimizer):
    """An optimizer of nobody's, with the options that it is given."""

    def __init__(self, w=1.0, **options):
        super().__init__([nn.Parameter(torch.full((3,), w))], options)

    def step(self, closure=None):
        pass


def test_an_optimizer_without_momentum_is_an_sgd():
    assert EquivalentExponentialLR(Plain(lr=0.5), 1.0).get_last_lr() == [1.0]


def svag(**options):
    return one(normkern.SVAG, **options)


WRONG_GROUPS = [
    (lambda: one(momentum=0.9, nesterov=True), 'nesterov expected False, got True; normkern.SGD(decay="exponential") follows it'),
    (lambda: one(weight_decay=0.1), "weight_decay expected 0, as the learning rate takes its place, got 0.1"),
    (lambda: svag(l=2.0), 'l expected 1, as SVAG steps with lr/l, got 2.0; normkern.SVAG(decay="exponential") follows any'),
    (lambda: one(torch.optim.Adam), "expected one of an SGD, got 'betas' among its options"),
    (lambda: one(torch.optim.RMSprop), "expected one of an SGD, got 'eps' among its options"),
    (lambda: one(torch.optim.Adagrad), "expected one of an SGD, got 'eps' among its options"),
    (lambda: one(torch.optim.Adadelta), "expected one of an SGD, got 'eps' among its options"),
    (lambda: one(torch.optim.Rprop), "expected one of an SGD, got 'etas' among its options"),
    (lambda: one(torch.optim.ASGD), "expected one of an SGD, got 'lambd' among its options"),
    (lambda: one(torch.optim.LBFGS), "expected one of an SGD, got 'history_size' among its options"),
    (lambda: Plain(momentum=0.9), "lr expected a number, got none"),
    (lambda: Plain(lr=0.1, momentum=-0.5), "momentum expected a finite number >= 0, got -0.5"),
    (lambda: Plain(lr=-0.1), "initial lr expected a finite number >= 0, got -0.1"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), WRONG_GROUPS, ids=lambda x: x if isinstance(x, str) else "")
def test_groups_that_cannot_be_mapped(make, sentence):
    opt = make()
    before = [dict(group) for group in opt.param_groups]
    with pytest.raises(ValueError) as caught:
        EquivalentExponentialLR(opt, DECAY)
    assert str(caught.value) == f"EquivalentExponentialLR: param_groups[0]: {sentence}"
    assert [dict(group) for group in opt.param_groups] == before
    assert "step" not in vars(opt)  # torch's scheduler would have wrapped it


def test_svag_with_one_batch_is_sgd():
    opt, plain = svag(momentum=0.9), one(normkern.SGD, momentum=0.9)
    schedulers = [EquivalentExponentialLR(o, DECAY) for o in (opt, plain)]
    for a in forms(5):
        for s in schedulers:
            advance(s.optimizer, a, s)
    assert torch.equal(the(opt), the(plain))
    opt.param_groups[0]["l"] = 4
    with pytest.raises(ValueError, match=r"EquivalentExponentialLR.step: param_groups\[0\]: l expected 1"):
        schedulers[0].step()


def test_no_optimizer():
    with pytest.raises(TypeError, match="Linear is not an Optimizer"):
        EquivalentExponentialLR(nn.Linear(1, 1), DECAY)


ARGUMENTS = [
    ((-0.1,), {}, "weight_decay expected a finite number >= 0, got -0.1"),
    ((math.nan,), {}, "weight_decay expected a finite number >= 0, got nan"),
    ((math.inf,), {}, "weight_decay expected a finite number >= 0, got inf"),
    ((10**400,), {}, f"weight_decay expected a finite number >= 0, got {10**400}"),
    ((True,), {}, "weight_decay expected a finite number >= 0, got True"),
    (("0.1",), {}, "weight_decay expected a finite number >= 0, got '0.1'"),
    ((None,), {}, "weight_decay expected a finite number >= 0, got None"),
    (([0.1],), {}, "weight_decay expected a number or 2, one per param group, got 1"),
    (([0.1, True],), {}, "weight_decay[1] expected a finite number >= 0, got True"),
    ((0.1,), {"groups": [2]}, "groups expected indices >= 0 and < 2, got 2"),
    ((0.1,), {"groups": [-1]}, "groups expected indices >= 0 and < 2, got -1"),
    ((0.1,), {"groups": [0, 1, 0]}, "groups expected each index once, got 0 twice"),
    ((0.1,), {"groups": [True]}, "groups expected indices >= 0 and < 2, got True"),
    ((0.1,), {"groups": [0.0]}, "groups expected indices >= 0 and < 2, got 0.0"),
    ((0.1,), {"groups": 1}, "groups expected indices of param groups or None, got 1"),
    ((0.1,), {"groups": "0"}, "groups expected indices of param groups or None, got '0'"),
    ((0.1, 0.5), {}, "schedule expected a function of the step, got 0.5"),
    ((0.1, [step_decay]), {}, "schedule expected a function or 2, one per param group, got 1"),
    ((0.1, [step_decay, None]), {}, "schedule expected a function of the step, got None"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named", "sentence"), ARGUMENTS, ids=lambda x: x[:60] if isinstance(x, str) else ""
)
def test_arguments_are_checked(arguments, named, sentence):
    opt = two()
    with pytest.raises(ValueError) as caught:
        EquivalentExponentialLR(opt, *arguments, **named)
    assert str(caught.value) == f"EquivalentExponentialLR: {sentence}"
    assert "initial_lr" not in opt.param_groups[0]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, None, "1", True, 1j, torch.ones(2)], ids=str)
@pytest.mark.parametrize("at", [0, 2])
def test_what_a_schedule_returns_is_checked(value, at):
    opt = two()
    make = lambda: EquivalentExponentialLR(opt, DECAY, [lambda t: 0.1, lambda t: value if t == at else 0.1], groups=[0])  # noqa: E731
    where = "EquivalentExponentialLR" if at == 0 else "EquivalentExponentialLR.step"
    sentence = f"{where}: param_groups[1]: schedule({at}) expected a finite number >= 0, got {value!r}"
    if at == 0:
        refuses_twice(make, opt, sentence)
        return
    scheduler = make()
    for _ in range(at - 1):
        opt.step()
        scheduler.step()
    refuses_twice(scheduler.step, opt, sentence, scheduler)


def refuses_twice(call, opt, sentence, scheduler=None):
    """A refusal that changes nothing is made again."""
    opt.step()

    def plain(x):
        return x.tolist() if isinstance(x, torch.Tensor) else x

    def seen():
        return (
            [{k: plain(v) for k, v in group.items()} for group in opt.param_groups],
            [{k: plain(v) for k, v in entry.items()} for entry in opt.state.values()],
            [plain(p) for group in opt.param_groups for p in group["params"]],
            None if scheduler is None else (scheduler.state_dict(), scheduler.get_last_lr()),
        )

    before = seen()
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence
        assert seen() == before


def running(opt, weight_decay=DECAY, schedule=None, steps=3, **options):
    scheduler = EquivalentExponentialLR(opt, weight_decay, schedule, **options)
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        opt.step()
        scheduler.step()
    return scheduler


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nesterov": True}, 'nesterov expected False, got True; normkern.SGD(decay="exponential") follows it'),
        ({"weight_decay": 0.5}, "weight_decay expected 0, as the learning rate takes its place, got 0.5"),
        ({"momentum": 0.0}, "momentum of step 4 expected to stay above 0 once it was, as weight decay is part of the buffers, "
                            'got 0.0; normkern.SGD(decay="exponential") can follow'),
        ({"momentum": math.nan}, "momentum expected a finite number >= 0, got nan"),
        ({"momentum": None}, "momentum expected a finite number >= 0, got None"),
        ({"dampening": "a"}, "dampening expected a number, got 'a'"),
        ({"dampening": math.nan}, "decay of step 4 expected less than all of the weights; momentum, dampening and lr, now 0.9, "
                                  "nan and 0.1, change too fast for weight_decay 0.02"),
        ({"momentum": 0.99}, "lr * weight_decay of step 4 expected at most (1 - sqrt(momentum))**2 = 2.51258e-05 with momentum "
                             "0.99, got 0.1 * 0.02 = 0.002"),
        ({"momentum": 1.5}, "lr * weight_decay of step 4 expected at most (1 - sqrt(momentum))**2 = 0 with momentum 1.5, got "
                            "0.1 * 0.02 = 0.002"),
    ],
    ids=str,
)  # fmt: skip
def test_changes_that_cannot_be_followed(change, sentence):
    opt = one(momentum=0.9)
    scheduler = running(opt)
    opt.param_groups[0].update(change)
    sentence = f"EquivalentExponentialLR.step: param_groups[0]: {sentence}"
    opt.step = lambda *_: None  # so that the refused options are not the optimizer's concern
    opt.step._wrapped_by_lr_sched = True
    refuses_twice(scheduler.step, opt, sentence, scheduler)


def test_a_sudden_drop_of_momentum_may_take_more_than_the_weights():
    opt = one(momentum=0.9)
    scheduler = running(opt, 1.0, lambda t: 0.0026 if t < 100 else 0.2, steps=99)
    opt.param_groups[0]["momentum"] = 0.3
    sentence = "decay of step 100 expected less than all of the weights; momentum, dampening and lr, now 0.3, 0.0 and 0.2, change too fast for weight_decay 1.0"
    refuses_twice(scheduler.step, opt, f"EquivalentExponentialLR.step: param_groups[0]: {sentence}", scheduler)


def test_momentum_may_go_where_there_is_no_decay():
    opt = one(momentum=0.9)
    scheduler = running(opt, 0.0)
    opt.param_groups[0]["momentum"] = 0
    opt.step()
    scheduler.step()
    opt.param_groups[0]["momentum"] = 0.5
    opt.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.1]


def test_buffers_that_rest_cannot_come_back():
    opt = one(momentum=0.9)
    advance(opt, forms(1)[0])
    opt.param_groups[0]["momentum"] = 0
    scheduler = running(opt)
    opt.param_groups[0]["momentum"] = 0.9
    sentence = (
        "EquivalentExponentialLR.step: param_groups[0]: momentum of step 4 expected to stay 0, as its buffers are older than "
        'the present scale of the weights, got 0.9; normkern.SGD(decay="exponential") can follow'
    )
    refuses_twice(scheduler.step, opt, sentence, scheduler)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_the_bound_of_real_roots(momentum):
    """T5.3: at it all is well, beyond it nothing is."""
    most = (1 - math.sqrt(momentum)) ** 2
    assert EquivalentExponentialLR(one(momentum=momentum, lr=most), 1.0).get_last_lr()[0] > most
    opt = one(momentum=momentum, lr=most * 1.001)
    with pytest.raises(ValueError) as caught:
        EquivalentExponentialLR(opt, 1.0)
    assert str(caught.value).startswith(
        "EquivalentExponentialLR: param_groups[0]: lr * weight_decay of step 0 expected at most (1 - sqrt(momentum))**2 = "
        f"{most:.6g} with momentum {momentum}, got "
    )
    scheduler = EquivalentExponentialLR(one(momentum=momentum), 1.0, lambda t: most * (1 + (t == 2)))
    scheduler.optimizer.step()
    scheduler.step()
    with pytest.raises(ValueError, match="lr \\* weight_decay of step 2 expected at most"):
        scheduler.step()


def test_without_momentum_the_whole_of_the_weights_is_too_much():
    with pytest.raises(ValueError, match="decay of step 0 expected less than all of the weights"):
        EquivalentExponentialLR(one(lr=1.0), 1.0)
    assert EquivalentExponentialLR(one(lr=1.0), 0.999).get_last_lr() == [pytest.approx(1000)]


def test_new_groups_are_not_known():
    opt = one()
    scheduler = running(opt)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(
        ValueError, match="EquivalentExponentialLR.step: expected the 1 param groups of its construction, got 2"
    ):
        scheduler.step()


def test_jumps_have_no_meaning():
    scheduler = running(one())
    with pytest.raises(ValueError, match="EquivalentExponentialLR.step: epoch expected None, got 3"):
        scheduler.step(3)
    assert scheduler.last_epoch == 3


# --- the ends of numbers ----------------------------------------------------------------------------------------------


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


# --- precision --------------------------------------------------------------------------------------------------------


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


# ---- The other face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_both_faces_are_the_same_run_to_the_bit(dtype, momentum):
    """The schedule's weights are those of decay="exponential", with none of its powers of two taken out."""
    decay = 0.02 if momentum else 0.2  # so that the scale halves several times in either case
    loss = forms().to(dtype)
    kept = one(normkern.SGD, dtype=dtype, momentum=momentum, weight_decay=decay, decay="exponential")
    kept.param_groups[0].update(norm_buffers=[], scale_invariant=True)
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
