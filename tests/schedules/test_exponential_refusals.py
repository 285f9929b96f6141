"""EquivalentExponentialLR: what is refused."""

import math

import pytest
import torch
from support.one_weight import forms, one, the
from torch import nn

import normkern
from normkern import EquivalentExponentialLR

from .exponential_runs import DECAY, advance, refuses_twice, running, step_decay, two


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
