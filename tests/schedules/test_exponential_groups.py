"""EquivalentExponentialLR: groups, arguments, and being one scheduler among others."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from support.one_weight import one
from torch.optim import lr_scheduler as lrs

from normkern import EquivalentExponentialLR

from .exponential_runs import DECAY, STEPS, cosine, two


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
