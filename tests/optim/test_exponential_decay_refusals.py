"""SGD(decay="exponential"): what it refuses, with a sentence and nothing written; missing gradients and scalers."""

import math

import pytest
import torch
from support.invariant_nets import gradient_of_direction
from torch import nn

import normkern

from .exponential_refusals import Unchanged, assert_follows, exponential, give, plain, stepped, weights


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("later", [False, True])
def test_too_much_decay(later, momentum, nesterov):
    """T5.3: at the first step, and at a later one; in the last group, after good ones."""
    most = (1 - math.sqrt(momentum)) ** 2
    params = weights(3)
    options = {"momentum": momentum, "nesterov": nesterov and momentum > 0, "norm_buffers": [], "followers": []}
    fine, bad = 0.5 * most, most * (1 + 1e-9) * 2
    opt = normkern.SGD(
        [{"params": params[:2], **options}, {"params": params[2:], **options}],
        lr=0.5, weight_decay=fine, decay="exponential",
    )  # fmt: skip
    if later:
        for t in range(3):
            give(params, t=t)
            opt.step()
    opt.param_groups[1]["weight_decay"] = bad
    give(params, t=9)
    text = r"param_groups\[1\]: lr \* weight_decay expected at most \(1 - sqrt\(momentum\)\)\^2 = .* got 0.5 \* "
    with Unchanged(opt), pytest.raises(ValueError, match=text):
        opt.step()
    opt.param_groups[1]["weight_decay"] = fine
    opt.step()


@pytest.mark.parametrize("momentum", [0.25, 0.9])
def test_the_bound_itself_is_allowed(momentum):
    params, twins = weights(), weights()
    options = {"momentum": momentum, "weight_decay": 2 * (1 - math.sqrt(momentum)) ** 2}
    ours, theirs = exponential(params, **options), torch.optim.SGD(twins, lr=0.5, foreach=False, **options)
    assert_follows(ours, theirs, params, twins, steps=30, tolerance=1e-10)


def test_weights_that_one_step_decays_to_nothing():
    """Without momentum the bound is 1, where w' has nothing of w; just below it is fine."""
    params = weights()
    opt = exponential(params, lr=1.0, weight_decay=1.0)
    give(params)
    with Unchanged(opt), pytest.raises(ValueError, match=r"lr \* weight_decay"):
        opt.step()
    opt.param_groups[0]["weight_decay"] = 1 - 1e-6
    opt.step()
    assert opt.param_groups[0]["gauge"][2] == 20


def test_decay_that_momentum_still_carries():
    """lr * weight_decay is small at every step; but the decay under way, times the new lr, would turn the weights."""
    _, opt = stepped(20, lr=1e-4, momentum=0.9, weight_decay=10.0)
    opt.param_groups[0].update(lr=1.0, weight_decay=0.0)
    with (
        Unchanged(opt),
        pytest.raises(ValueError, match=r"lr 1\.0 is too large for the decay that momentum still carries"),
    ):
        opt.step()
    opt.param_groups[0]["lr"] = 1e-3
    opt.step()


@pytest.mark.parametrize(
    "options", [{"lr": math.nan}, {"weight_decay": math.nan}, {"momentum": math.nan}, {"lr": math.inf}]
)
def test_no_numbers(options):
    _, opt = stepped(momentum=0.3)
    opt.param_groups[0].update(options)
    with Unchanged(opt), pytest.raises(ValueError, match="lr \\* weight_decay expected at most"):
        opt.step()


@pytest.mark.parametrize("value", [torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)])
def test_tensors_of_one_element(value):
    params, twins = weights(), weights()
    ours, theirs = exponential(params), torch.optim.SGD(twins, lr=0.5, weight_decay=0.1, foreach=False)
    ours.param_groups[0]["lr"], theirs.param_groups[0]["lr"] = value, value.item()
    ours.param_groups[0]["weight_decay"], theirs.param_groups[0]["weight_decay"] = value, value.item()
    assert_follows(ours, theirs, params, twins)
    assert all(type(x) in (float, int) for x in ours.param_groups[0]["gauge"])


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_one_parameter_without_gradient(which, later):
    params, opt = stepped(2 if later else 0, momentum=0.3)
    params[which].grad = None
    text = rf"param_groups\[0\]: params\[{which}\] has no gradient but others of its group have"
    with Unchanged(opt), pytest.raises(ValueError, match=text):
        opt.step()


def test_a_missing_gradient_is_named():
    params = weights()
    opt = exponential([("first", params[0]), ("second", params[1])])
    give(params)
    params[1].grad = None
    with Unchanged(opt), pytest.raises(ValueError, match=r"params\[1\] \('second'\) has no gradient"):
        opt.step()


@pytest.mark.parametrize("steps", [0, 3])
def test_no_gradient_at_all_is_no_step(steps):
    params, opt = stepped(steps, momentum=0.3)
    opt.zero_grad(set_to_none=True)
    with Unchanged(opt):
        opt.step()
    give(params)
    opt.step()


def test_a_group_that_rests_while_another_steps():
    params, twins = weights(), weights()
    groups = [[{"params": [p], "norm_buffers": [], "followers": []} for p in side] for side in (params, twins)]
    ours = normkern.SGD(groups[0], lr=0.5, momentum=0.3, weight_decay=0.1, decay="exponential")
    theirs = torch.optim.SGD(groups[1], lr=0.5, momentum=0.3, weight_decay=0.1, foreach=False)
    for t in range(6):
        give(params, twins, t=t)
        if t in (0, 3):
            params[1].grad = twins[1].grad = None
        ours.step()
        theirs.step()
    assert_follows(ours, theirs, params, twins)


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_one_momentum_buffer_missing(dampening):
    """The gauge speaks of one past: that of parameters with buffers is another than that of those without."""
    params, opt = stepped(momentum=0.3, dampening=dampening)
    del opt.state[params[1]]
    with (
        Unchanged(opt),
        pytest.raises(ValueError, match=r"params\[1\] has no momentum_buffer but others of its group have"),
    ):
        opt.step()


def test_an_empty_group_and_a_parameter_without_elements():
    params = [nn.Parameter(torch.zeros(0, 3)), *weights(1)]
    opt = exponential(params)
    opt.add_param_group({"params": []})
    give(params[1:])
    params[0].grad = torch.zeros(0, 3)
    opt.step()
    assert opt.param_groups[0]["gauge"][0] == pytest.approx(0.95)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [True, None])
def test_a_skipped_step_does_not_advance_the_gauge(fused, unscale_first):
    params, twins = weights(dtype=torch.float32), weights()
    ours = exponential(params, momentum=0.3, fused=fused)
    theirs = torch.optim.SGD(
        [nn.Parameter(p.detach().double()) for p in params], lr=0.5, momentum=0.3, weight_decay=0.1
    )
    twins = theirs.param_groups[0]["params"]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for t in range(8):
        give(params, twins, t=t)
        scale = scaler.get_scale()
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad.mul_(scale)
        if bad := t in (0, 3):
            params[1].grad[0, 0] = torch.inf
        gauge = ours.param_groups[0].get("gauge")
        if unscale_first:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if bad:
            assert ours.param_groups[0].get("gauge") == gauge
        else:
            theirs.step()
    assert ours.param_groups[0]["gauge"][2] == 1
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(ours.true_scale()[0] * p.detach().double(), q.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [False, True])
def test_a_group_that_would_lose_its_decay(names):
    params = weights(3)
    give(params)
    params[1].grad = params[1].grad + 0.01 * params[1].detach()
    opt = exponential([(f"layer.{i}", p) for i, p in enumerate(params)] if names else params)
    name = r"params\[1\] \('layer.1'\)" if names else r"params\[1\]"
    text = rf"param_groups\[0\]: {name} is not scale-invariant, and would lose its weight decay.*got 0\.\d+\. normkern\.invariance\.param_groups puts"
    with Unchanged(opt), pytest.raises(ValueError, match=text):
        opt.step()
    opt.param_groups[0]["scale_invariant"] = False
    with Unchanged(opt), pytest.raises(ValueError, match="is not scale-invariant"):
        opt.step()
    opt.param_groups[0]["scale_invariant"] = True
    opt.step()
    assert opt.param_groups[0]["gauge"][0] < 1


def test_invariance_is_judged_once_and_not_from_zeros():
    params = weights()
    opt = exponential(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert not opt.param_groups[0].get("scale_invariant")
    give(params)
    opt.step()
    assert opt.param_groups[0]["scale_invariant"] is True
    plain(params)
    opt.step()


def test_no_decay_needs_no_invariance_until_there_is_some():
    params = weights()
    opt = exponential(params, weight_decay=0.0)
    plain(params)
    opt.step()
    opt.param_groups[0]["weight_decay"] = 0.1
    with Unchanged(opt), pytest.raises(ValueError, match="is not scale-invariant"):
        opt.step()


def test_each_group_is_judged():
    params = weights()
    give(params[:1])
    plain(params[1:])
    groups = [{"params": [p], "norm_buffers": [], "followers": []} for p in params]
    opt = normkern.SGD(groups, lr=0.5, weight_decay=0.1, decay="exponential")
    with Unchanged(opt), pytest.raises(ValueError, match=r"param_groups\[1\]: params\[0\] is not scale-invariant"):
        opt.step()
    opt.param_groups[1]["decay"] = "coupled"
    opt.step()
    assert opt.true_scale() == [pytest.approx(0.95), 1.0]


def test_sets_that_are_invariant_only_together():
    """<n, (x, y)/|(x, y)|>: no one's gradient is at right angles to it, that of both is."""
    params = weights()
    n = torch.randn(8, 5, dtype=torch.float64)
    grad = gradient_of_direction(torch.cat([p.detach() for p in params]), n)
    for p, g in zip(params, grad.split(4), strict=True):
        p.grad = g
    assert abs(float((params[0].detach() * params[0].grad).sum())) > 0.01
    opt = exponential(params)
    opt.step()
    alone = exponential(params[:1])
    with Unchanged(alone), pytest.raises(ValueError, match="is not scale-invariant"):
        alone.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero_bias", [False, True])
def test_a_bias_before_a_batch_norm_is_welcome(dtype, zero_bias):
    """Its gradient is rounding errors alone: they say nothing of it, and it may be 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 4)).to(
        dtype
    )
    if zero_bias:
        nn.init.zeros_(net[0].bias)
    opt = exponential(list(net[0].parameters()))
    nn.functional.cross_entropy(net(torch.randn(16, 3, 8, 8, dtype=dtype)), torch.arange(16) % 4).backward()
    opt.step()
    assert opt.param_groups[0]["gauge"][0] < 1


@pytest.mark.parametrize("kind", ["norm's own", "last layer", "nearly"])
def test_parts_of_a_network_that_are_not_invariant(kind):
    torch.manual_seed(0)
    eps = 0.3 if kind == "nearly" else 1e-5
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, eps=eps), nn.ReLU(), nn.Linear(8, 4))
    params = list(net[{"norm's own": 1, "last layer": 3, "nearly": 0}[kind]].parameters())
    opt = exponential(params)
    nn.functional.cross_entropy(net(torch.randn(16, 6)), torch.arange(16) % 4).backward()
    text = "(is not scale-invariant|is all zeros).*normkern.invariance.param_groups puts"
    with Unchanged(opt), pytest.raises(ValueError, match=text):
        opt.step()


def test_zero_weights():
    params = weights()
    with torch.no_grad():
        params[1].zero_()
    give(params[:1])
    params[1].grad = torch.ones_like(params[1])
    opt = exponential([("a", params[0]), ("b", params[1])])
    with (
        Unchanged(opt),
        pytest.raises(
            ValueError, match=r"params\[1\] \('b'\) is all zeros.*invariance.param_groups.*scale_invariant=True"
        ),
    ):
        opt.step()
    opt.param_groups[0]["scale_invariant"] = True
    opt.step()


def test_zero_weights_without_a_gradient_are_not_judged():
    """As a bias before a norm whose own weight begins at 0."""
    params = weights()
    with torch.no_grad():
        params[1].zero_()
    opt = exponential(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert not opt.param_groups[0].get("scale_invariant")
    give(params[:1])
    opt.step()
    assert opt.param_groups[0]["scale_invariant"] is True


def test_gradients_that_are_no_numbers_are_not_judged():
    params = weights()
    give(params)
    params[0].grad[0] = torch.nan
    opt = exponential(params)
    opt.step()
    assert not opt.param_groups[0].get("scale_invariant")
