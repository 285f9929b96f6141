"""decay="corrected": weight decay times lr / max_lr, for SGD and AdamW."""

import copy
import math

import pytest
import torch
from support.memory import same_bits
from support.twins import assert_follow, give_gradients, parameters
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import normkern
from normkern.monitors.step_reader import StepReader

KINDS = {
    "SGD": (normkern.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}),
    "SVAG": (normkern.SVAG, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}),
    "AdamW": (normkern.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
}
every = pytest.mark.parametrize("kind", KINDS)


@every
def test_weight_decay_falls_with_the_learning_rate(kind):
    ours_kind, torchs_kind, options = KINDS[kind]
    ours, theirs = parameters(), parameters()
    a, b = ours_kind(ours, decay="corrected", **options), torchs_kind(theirs, foreach=False, **options)
    schedules = [CosineAnnealingLR(a, 5), CosineAnnealingLR(b, 5)]
    for t in range(5):
        group = b.param_groups[0]
        group["weight_decay"] = 0.3 * group["lr"] / 0.1
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
        for schedule in schedules:
            schedule.step()
        assert_follow(ours, theirs, steps=t + 1)
    assert a.param_groups[0]["weight_decay"] == 0.3
    assert a.param_groups[0]["decay"] == "corrected"


@every
def test_one_cycle_and_a_key_of_the_group_name_the_largest_rate(kind):
    ours_kind, _, options = KINDS[kind]
    ours, theirs = parameters(), parameters()
    a = ours_kind(ours, decay="corrected", **options)
    OneCycleLR(a, 0.4, total_steps=10)
    lr = a.param_groups[0]["lr"]
    assert lr < 0.4
    more = {name: x for name, x in options.items() if name != "lr"}
    momentum = {k: v for k, v in a.param_groups[0].items() if k in ("momentum", "betas")}
    b = ours_kind([{"params": theirs, "max_lr": 0.4}], lr=lr, decay="corrected", **{**more, **momentum})
    c = parameters()
    plain = ours_kind(c, lr=lr, **{**more, **momentum, "weight_decay": 0.3 * lr / 0.4})
    for params, opt in ((ours, a), (theirs, b), (c, plain)):
        give_gradients(params, seed=0)
        opt.step()
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))
    assert all(same_bits(p, q) for p, q in zip(c, theirs, strict=True))


@every
def test_at_the_largest_rate_it_is_the_plain_step(kind):
    ours_kind, _, options = KINDS[kind]
    ours, theirs = parameters(), parameters()
    for params, more in ((ours, {"decay": "corrected"}), (theirs, {})):
        opt = ours_kind([{"params": params, "max_lr": 0.1}], **more, **options)
        give_gradients(params, seed=0)
        opt.step()
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))


@every
@pytest.mark.parametrize(("change", "text"), [
    ({}, r'decay="corrected" expected the largest learning rate of the schedule, .*max_lr or .*initial_lr, got neither'),
    ({"max_lr": 0.05}, "expected a learning rate of at most max_lr, got 0.1 and max_lr 0.05"),
    ({"max_lr": 0.0}, "expected a learning rate of at most max_lr, got 0.1 and max_lr 0.0"),
    ({"max_lr": math.nan}, "expected a learning rate of at most max_lr, got 0.1 and max_lr nan"),
    ({"max_lr": "much"}, "max_lr expected a number, got 'much'"),
])  # fmt: skip
def test_without_a_largest_rate_a_step_is_refused(kind, change, text):
    ours_kind, _, options = KINDS[kind]
    params = parameters([(3,), (4,)])
    groups = [{"params": params[:1], "max_lr": 0.1}, {"params": params[1:], **change}]
    opt = ours_kind(groups, decay="corrected", **options)
    give_gradients(params, seed=0)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=rf"{kind}.step: param_groups\[1\]: .*" + text):
        opt.step()
    assert torch.equal(params[0], before)


def test_other_forms_are_refused_and_the_nearest_is_named():
    with pytest.raises(ValueError, match='AdamW: decay expected "decoupled" or "corrected", got \'exponential\''):
        normkern.AdamW(parameters(), decay="exponential")
    with pytest.raises(ValueError, match="SGD: decay expected .*, got 'correct'; did you mean 'corrected'"):
        normkern.SGD(parameters(), decay="correct")
    opt = normkern.AdamW(parameters())
    opt.param_groups[0]["decay"] = "coupled"
    give_gradients(opt.param_groups[0]["params"], seed=0)
    with pytest.raises(ValueError, match=r"AdamW.step: param_groups\[0\]: decay expected"):
        opt.step()
    with pytest.raises(ValueError, match=r"unknown key 'maxlr'; did you mean 'max_lr'"):
        normkern.AdamW([{"params": parameters(), "maxlr": 0.1}])


@every
def test_it_is_saved(kind):
    ours_kind, _, options = KINDS[kind]
    params = parameters()
    opt = ours_kind([{"params": params, "max_lr": 0.2}], decay="corrected", **options)
    give_gradients(params, seed=0)
    opt.step()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = ours_kind(twins)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    give_gradients(params, twins, seed=1)
    opt.step()
    other.step()
    assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("kind", ["SGD", "SVAG"])
def test_monitors_know_the_weight_decay_of_the_step(kind):
    ours_kind, _, options = KINDS[kind]
    params = parameters([(3,)])
    opt = ours_kind([{"params": params, "max_lr": 0.2}], decay="corrected", stats="tensor", **options)
    reader = StepReader(opt, "test")
    give_gradients(params, seed=0)
    opt.step()
    (hyperparameters,) = reader.read().groups
    assert hyperparameters.weight_decay == pytest.approx(0.15)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_ratio_of_norms_stays_while_the_learning_rate_falls(kind):
    """Random gradients of a scale-invariant weight: |g|/|w| of SGD is sqrt(2 lambda/max_lr), with a constant decay
    it grows as 1/sqrt(lr); of AdamW the ratio of the preconditioned gradient does."""
    make, size, ends = torch.Generator().manual_seed(0), 3000, {}
    for decay in ("corrected", "coupled" if kind == "SGD" else "decoupled"):
        w = nn.Parameter(torch.randn(size, generator=make, dtype=torch.float64) / size**0.5)
        more = (
            {"lr": 1.0, "weight_decay": 0.1} if kind == "SGD" else {"lr": 0.1, "weight_decay": 1.0, "betas": (0.0, 0.9)}
        )
        opt = getattr(normkern, kind)([w], decay=decay, **more)
        schedule = LambdaLR(opt, lambda t: 1.0 if t < 200 else 0.125)
        ratios = []
        for _ in range(800):
            g = torch.randn(size, generator=make, dtype=torch.float64) / size**0.5
            w.grad = (g - (g @ w.detach()) / (w.detach() @ w.detach()) * w.detach()) / w.detach().norm()
            norm = w.detach().norm()
            if kind == "SGD":
                ratios.append((w.grad.norm() / norm).item())
            else:
                ratios.append(size**0.5 / norm.item())  # |g/sqrt(v)| is sqrt(size), up to the spread of v
            opt.step()
            schedule.step()
        ends[decay] = sum(ratios[-50:]) / sum(ratios[150:200])
    assert ends.pop("corrected") == pytest.approx(1.0, abs=0.03)
    assert ends.popitem()[1] == pytest.approx(8**0.5, rel=0.05)
