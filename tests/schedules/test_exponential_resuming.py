"""EquivalentExponentialLR: through saves and copies."""

import copy
import io
import math
import pickle

import pytest
import torch
from support.one_weight import SIZE, forms, gradient, one
from torch import nn

from normkern import EquivalentExponentialLR

from .exponential_runs import DECAY, both, cosine, running


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
