"""SvagSchedule: every torch scheduler at the pace of SVAG, through saves and loads."""

import copy
import io
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as lrs

import normkern
from normkern.schedules import SvagSchedule
from normkern.theory import svag_steps

STEPS = 12  # of the original run


def sequential(opt):
    return lrs.SequentialLR(
        opt, [lrs.LinearLR(opt, 0.1, total_iters=4), lrs.CosineAnnealingLR(opt, T_max=STEPS - 4)], milestones=[4]
    )


def chained(opt):
    return lrs.ChainedScheduler([lrs.ConstantLR(opt, 0.5, total_iters=3), lrs.ExponentialLR(opt, 0.9)], optimizer=opt)


SCHEDULERS = {
    "lambda": lambda opt: lrs.LambdaLR(opt, [lambda k: 1 / (1 + k), lambda k: 0.9**k]),
    "step": lambda opt: lrs.StepLR(opt, step_size=3),
    "multistep": lambda opt: lrs.MultiStepLR(opt, [2, 5, 6]),
    "exponential": lambda opt: lrs.ExponentialLR(opt, 0.9),
    "cosine": lambda opt: lrs.CosineAnnealingLR(opt, T_max=STEPS),
    "restarts": lambda opt: lrs.CosineAnnealingWarmRestarts(opt, T_0=3, T_mult=2),
    "polynomial": lambda opt: lrs.PolynomialLR(opt, total_iters=STEPS),
    "onecycle": lambda opt: lrs.OneCycleLR(opt, [1.0, 2.0], total_steps=STEPS),
    "cyclic": lambda opt: lrs.CyclicLR(opt, 0.01, 1.0, step_size_up=4),
    "sequential": sequential,
    "chained": chained,
}
LS = [0.5, 0.75, 1, 1.1, 1.5, 2, 3.7, math.pi, 8]
every = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def optimizer():
    w, v = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    return torch.optim.SGD([{"params": [w]}, {"params": [v], "lr": 0.3}], lr=0.8, momentum=0.9)


def exact(l):
    """The l that was meant: all of them are written as decimals, or have none."""
    return Fraction(str(l)) if l != math.pi else Fraction(math.pi)


def seen(opt):
    return [(group["lr"], group["momentum"]) for group in opt.param_groups]


def original(make, steps=STEPS):
    """The hyperparameters of each step of the original run, and those after the last."""
    opt = optimizer()
    scheduler, out = make(opt), []
    for _ in range(steps):
        out.append(seen(opt))
        opt.step()
        scheduler.step()
    return [*out, seen(opt)]


@every
@pytest.mark.parametrize("l", LS)
def test_step_k_has_the_hyperparameters_of_step_k_over_l(make, l):
    expected, opt = original(make), optimizer()
    schedule = SvagSchedule(make(opt), l)
    total = svag_steps(steps=STEPS, l=l)
    for k in range(total):
        assert seen(opt) == expected[math.floor(k / exact(l))]
        assert schedule.get_last_lr() == [lr for lr, _ in seen(opt)]
        assert (schedule.steps, schedule.effective_steps) == (k, math.floor(k / exact(l)))
        opt.step()
        schedule.step()
    if l >= 1:
        assert seen(opt) == expected[STEPS]


@every
def test_one_changes_nothing(make):
    opt, out = optimizer(), []
    schedule = SvagSchedule(make(opt), 1)
    for _ in range(STEPS):
        out.append(seen(opt))
        opt.step()
        schedule.step()
    assert [*out, seen(opt)] == original(make)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 200))
def test_floats_count_like_the_fractions_they_came_from(p, q, n):
    p = max(p, (q + 1) // 2)
    schedules = [SvagSchedule(lrs.StepLR(optimizer(), 1), l) for l in (p / q, Fraction(p, q))]
    for schedule in schedules:
        schedule.optimizer.step()
        for k in range(n):
            assert schedule.effective_steps == schedule.scheduler.last_epoch == k * q // p
            schedule.step()


def test_many_steps_at_once_are_the_steps_one_by_one():
    """0.5: two steps of the wrapped scheduler at a time, also for one that multiplies what it finds."""
    opt = optimizer()
    schedule = SvagSchedule(lrs.ExponentialLR(opt, 0.5), 0.5)
    opt.step()
    schedule.step()
    assert [lr for lr, _ in seen(opt)] == [0.8 * 0.25, 0.3 * 0.25]
    assert schedule.effective_steps == schedule.scheduler.last_epoch == 2


@every
@pytest.mark.parametrize("l", [0.75, 1.1, 2.5])
def test_resumed_is_never_stopped(make, l):
    total = svag_steps(steps=STEPS, l=l) - 1
    for stop in (0, 1, 2, total // 2, total):
        opt, straight = optimizer(), []
        schedule = SvagSchedule(make(opt), l)
        for k in range(total):
            if k == stop:
                file = io.BytesIO()
                torch.save({"opt": opt.state_dict(), "schedule": schedule.state_dict()}, file)
            straight.append(seen(opt))
            opt.step()
            schedule.step()
        if stop == total:
            continue
        file.seek(0)
        saved = torch.load(file, weights_only=False)  # CyclicLR's state holds a method
        opt = optimizer()
        schedule = SvagSchedule(make(opt), l)
        opt.load_state_dict(saved["opt"])
        schedule.load_state_dict(saved["schedule"])
        assert schedule.steps == stop
        for k in range(stop, total):
            assert seen(opt) == straight[k]
            opt.step()
            schedule.step()


def test_our_state_is_plain():
    opt = optimizer()
    schedule = SvagSchedule(sequential(opt), math.pi)
    opt.step()
    schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["steps"] == 1
    schedule.load_state_dict(state)
    assert schedule.l == Fraction(math.pi)


def test_a_loaded_scheduler_goes_on_from_where_it_was():
    opt = optimizer()
    scheduler = lrs.StepLR(opt, 1, gamma=0.5)
    opt.step()
    scheduler.step()
    schedule = SvagSchedule(scheduler, 2)
    for _ in range(2):
        schedule.step()
    assert scheduler.last_epoch == 2
    assert schedule.effective_steps == 1


def test_it_is_a_scheduler_for_those_who_ask():
    opt = optimizer()
    schedule = SvagSchedule(lrs.StepLR(opt, 1), 2)
    assert isinstance(schedule, lrs.LRScheduler)
    assert schedule.optimizer is opt
    assert repr(schedule) == "SvagSchedule(StepLR, l=2, steps=0)"
    both = lrs.ChainedScheduler([schedule], optimizer=opt)
    opt.step()
    both.step()
    both.step()
    assert schedule.effective_steps == 1


def test_an_error_of_the_wrapped_scheduler_leaves_the_count():
    opt = optimizer()
    schedule = SvagSchedule(lrs.OneCycleLR(opt, 1.0, total_steps=5), 0.5)
    for _ in range(2):
        opt.step()
        schedule.step()
    with pytest.raises(ValueError, match="Tried to step"):
        schedule.step()
    assert (schedule.steps, schedule.effective_steps) == (2, 5)


@pytest.mark.parametrize("l", [0.49, 0, -1, math.nan, math.inf, True, "2", None])
def test_l_is_checked(l):
    with pytest.raises(ValueError) as caught:
        SvagSchedule(lrs.StepLR(optimizer(), 1), l)
    assert str(caught.value) == f"SvagSchedule: l expected a finite number >= 1/2, got {l!r}"


def test_l_is_that_of_the_optimizer():
    opt = normkern.SVAG([torch.nn.Parameter(torch.zeros(1))], lr=0.1, l=4)
    assert SvagSchedule(lrs.StepLR(opt, 1), 4.0).l == 4
    with pytest.raises(ValueError) as caught:
        SvagSchedule(lrs.StepLR(opt, 1), 2)
    assert str(caught.value) == "SvagSchedule: l expected 4, as the optimizer has it in param_groups[0], got 2"


def test_scheduler_is_checked():
    with pytest.raises(ValueError, match="SvagSchedule: scheduler expected an LRScheduler, got SGD"):
        SvagSchedule(optimizer(), 2)
    with pytest.raises(ValueError, match="got the class StepLR: construct it first, with its optimizer"):
        SvagSchedule(lrs.StepLR, 2)
    with pytest.raises(ValueError, match="expected one that counts steps, got ReduceLROnPlateau"):
        SvagSchedule(lrs.ReduceLROnPlateau(optimizer()), 2)
    with pytest.raises(ValueError, match="SvagSchedule.step: epoch expected None, got 3"):
        SvagSchedule(lrs.StepLR(optimizer(), 1), 2).step(3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"l": (3, 2)}, "l expected (2, 1), that of this schedule, got (3, 2)"),
        ({"l": 2.0}, "l expected (2, 1), that of this schedule, got 2.0"),
        ({"steps": -1}, "steps expected an integer >= 0, got -1"),
        ({"steps": True}, "steps expected an integer >= 0, got True"),
        ({"effective_steps": 1.5}, "effective_steps expected an integer >= 0, got 1.5"),
        (None, "state_dict expected the keys ['base', 'l', 'steps', 'effective_steps', 'scheduler'], got ['_last_lr']"),
        ("text", "state_dict expected the keys ['base', 'l', 'steps', 'effective_steps', 'scheduler'], got str"),
    ],
)
def test_foreign_state_is_refused_before_anything_is_loaded(change, sentence):
    opt = optimizer()
    schedule = SvagSchedule(lrs.StepLR(opt, 1), 2)
    opt.step()
    schedule.step()
    before = copy.deepcopy(schedule.state_dict())
    state = {"_last_lr": []} if change is None else change if isinstance(change, str) else None
    if state is None:
        state = {**before, "scheduler": {"last_epoch": 99}, **change}
    with pytest.raises(ValueError) as caught:
        schedule.load_state_dict(state)
    assert str(caught.value) == f"SvagSchedule.load_state_dict: {sentence}"
    assert schedule.state_dict() == before


# ---- Adam ------------------------------------------------------------------------------------------------------------


def weight():
    return torch.nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("l", [1, 1.5, math.sqrt(2), 2])
@pytest.mark.parametrize("kind", [normkern.SVAGAdam, normkern.SVAGAdamW])
def test_adam_takes_l_squared_steps_per_step_of_the_schedule(kind, l):
    w = weight()
    opt = kind([w], lr=0.8, l=l)
    schedule = SvagSchedule(torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5), l=l)
    assert schedule.base == "adam"
    assert schedule.pace == normkern.theory.svag_adam_fraction(l)
    seen = []
    for _ in range(normkern.theory.svag_steps(steps=4, l=schedule.pace)):
        seen.append(opt.param_groups[0]["lr"])
        w.grad = torch.zeros(2)
        opt.hold()
        w.grad = torch.zeros(2)
        opt.step()
        schedule.step()
    square = round(float(schedule.pace), 9)
    assert seen == [0.8 * 0.5 ** math.floor(k / square) for k in range(len(seen))]
    assert len(seen) == math.ceil(4 * square)
    assert schedule.effective_steps == 4


@pytest.mark.parametrize(
    ("optimizer", "options", "sentence"),
    [
        (lambda w: normkern.SVAGAdamW(w, l=2), {"l": 4}, "l expected 2, as the optimizer has it in param_groups[0], got 4"),
        (lambda w: normkern.SVAGAdamW(w, l=2), {"l": 2, "base": "sgd"}, "base expected 'adam', as the optimizer has it"),
        (lambda w: normkern.SVAG(w, l=2), {"l": 2, "base": "adam"}, "base expected 'sgd', as the optimizer has it in"),
        (lambda w: normkern.SVAGAdamW(w, l=2), {"l": 2, "base": "adamw"}, 'base expected "sgd", "adam" or None, got'),
        (torch.optim.Adam, {"l": 2}, 'base expected "adam", as param_groups[0] is of an adaptive optimizer, which'),
        (torch.optim.RMSprop, {"l": 2}, 'base expected "adam", as param_groups[0] is of an adaptive optimizer, which'),
        (torch.optim.Adam, {"l": 0.6, "base": "adam"}, "l expected a finite number >= sqrt(1/2), got 0.6"),
    ],
)  # fmt: skip
def test_pace_that_is_not_the_optimizers_is_refused(optimizer, options, sentence):
    opt = optimizer([weight()])
    with pytest.raises(ValueError) as caught:
        SvagSchedule(torch.optim.lr_scheduler.StepLR(opt, 1), **options)
    assert str(caught.value).startswith(f"SvagSchedule: {sentence}")


def test_other_optimizers_say_what_they_are():
    opt = torch.optim.RMSprop([weight()])
    assert SvagSchedule(torch.optim.lr_scheduler.StepLR(opt, 1), l=3, base="adam").pace == 9
    assert SvagSchedule(torch.optim.lr_scheduler.StepLR(opt, 1), l=3, base="sgd").pace == 3
    assert SvagSchedule(torch.optim.lr_scheduler.StepLR(torch.optim.SGD([weight()]), 1), l=3).pace == 3


def test_state_of_another_base_is_refused():
    state = SvagSchedule(torch.optim.lr_scheduler.StepLR(normkern.SVAG([weight()], l=2), 1), l=2).state_dict()
    schedule = SvagSchedule(torch.optim.lr_scheduler.StepLR(normkern.SVAGAdamW([weight()], l=2), 1), l=2)
    with pytest.raises(ValueError, match="base expected 'adam', that of this schedule, got 'sgd'"):
        schedule.load_state_dict(state)
