"""decay="exponential": options, ways in and out, checkpoints."""

import copy
import io
import math
import pickle

import pytest
import torch
from support.memory import same_bits
from torch import nn

import normkern

from .exponential_refusals import BUFFER, Unchanged, assert_follows, exponential, give, plain, stepped, weights


def test_differentiable():
    params = weights()
    opt = exponential(params, differentiable=True)
    give(params)
    with (
        Unchanged(opt),
        pytest.raises(ValueError, match=r'differentiable expected False with decay="exponential", got True'),
    ):
        opt.step()


@pytest.mark.parametrize("later", [False, True])
def test_unknown_decay(later):
    if later:
        _, opt = stepped()
        opt.param_groups[0]["decay"] = "linear"
        text = r'SGD.step: param_groups\[0\]: decay expected "coupled", "exponential" or "corrected", got \'linear\''
        with Unchanged(opt), pytest.raises(ValueError, match=text):
            opt.step()
    else:
        with pytest.raises(
            ValueError, match=r'SGD: decay expected "coupled", "exponential" or "corrected", got \'linear\''
        ):
            normkern.SGD(weights(), decay="linear")


@pytest.mark.parametrize(
    "bad", [["x"], [torch.ones(3)], [(torch.ones(3), None)], [nn.Linear(2, 2)], nn.Linear(2, 2), 5, "bn"]
)
def test_bad_norm_buffers(bad):
    with pytest.raises(ValueError, match=r"SGD: param_groups\[0\]: norm_buffers"):
        normkern.SGD([{"params": weights(), "norm_buffers": bad}], decay="exponential")
    params = weights()
    opt = normkern.SGD(params, lr=0.5, weight_decay=1.0, decay="exponential")
    opt.param_groups[0]["norm_buffers"] = bad
    give(params)
    # The first step halves the stored weights.
    with Unchanged(opt), pytest.raises(ValueError, match=r"SGD.step: param_groups\[0\]: norm_buffers"):
        opt.step()


def test_closure_hooks_and_a_group_added_later():
    params, twins = weights(3), weights(3)
    ours = exponential(params[:2], momentum=0.3)
    theirs = torch.optim.SGD(twins[:2], lr=0.5, momentum=0.3, weight_decay=0.1, foreach=False)
    calls = []
    ours.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.register_step_post_hook(lambda *_: calls.append("after"))
    for t in range(8):
        if t == 3:
            ours.add_param_group({"params": [params[2]], "norm_buffers": [], "followers": [], "lr": 0.1})
            theirs.add_param_group({"params": [twins[2]], "lr": 0.1})

        def closure(t=t):
            give(params, twins, t=t)
            return 7.0

        assert ours.step(closure) == 7.0
        theirs.step()
        ours.zero_grad(set_to_none=True)
        with Unchanged(ours):
            ours.step()
    assert calls == ["before", "after"] * 16
    assert len(ours.true_scale()) == 2
    assert ours.true_scale()[0] != ours.true_scale()[1]
    assert_follows(ours, theirs, params, twins)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.3}, {"momentum": 0.3, "nesterov": True}, {"momentum": 0.3, "dampening": 0.4}],
    ids=str,
)
@pytest.mark.parametrize("source", [torch.optim.SGD, normkern.SGD])
def test_a_coupled_checkpoint_goes_on_as_exponential_and_back(source, options):
    params, twins = weights(), weights()
    coupled = source(params, lr=0.5, weight_decay=0.1, **options)
    theirs = torch.optim.SGD(twins, lr=0.5, weight_decay=0.1, foreach=False, **options)
    for t in range(5):
        give(params, twins, t=t)
        coupled.step()
        theirs.step()
    ours = exponential(params, **options)
    ours.load_state_dict(coupled.state_dict())
    assert ours.param_groups[0]["norm_buffers"] == []
    ours.param_groups[0]["decay"] = "exponential"
    assert_follows(ours, theirs, params, twins, steps=15)
    assert ours.param_groups[0]["gauge"][2] >= 1
    ours.param_groups[0]["decay"] = "coupled"
    assert ours.true_scale()[0] != 1, "until the next step"
    assert_follows(ours, theirs, params, twins, start=80)
    assert ours.true_scale() == [1.0]
    assert "gauge" not in ours.param_groups[0]
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)
        if options:
            torch.testing.assert_close(ours.state[p][BUFFER], theirs.state[q][BUFFER], rtol=1e-12, atol=1e-12)
    ours.param_groups[0]["decay"] = "exponential"
    assert_follows(ours, theirs, params, twins, start=90)


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_momentum_at_rest_while_leaving(momentum):
    """The buffers that rest are those of the true run, too; and may be used again."""
    params, twins = weights(), weights()
    ours = exponential(params, momentum=0.3)
    theirs = torch.optim.SGD(twins, lr=0.5, momentum=0.3, weight_decay=0.1, foreach=False)
    assert_follows(ours, theirs, params, twins, steps=9)
    for group in (ours.param_groups[0], theirs.param_groups[0]):
        group["momentum"] = momentum
    ours.param_groups[0]["decay"] = "coupled"
    assert_follows(ours, theirs, params, twins, steps=3, start=20)
    for group in (ours.param_groups[0], theirs.param_groups[0]):
        group["momentum"] = 0.3
    assert_follows(ours, theirs, params, twins, start=30)


def test_leaving_rescales_norms():
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(1.0)
    params = weights()
    opt = exponential(params)
    opt.param_groups[0]["norm_buffers"] = [norm]
    for t in range(3):
        give(params, t=t)
        opt.step()
    scale = opt.true_scale()[0]
    assert scale == pytest.approx(0.95**3)
    opt.param_groups[0]["decay"] = "coupled"
    give(params)
    opt.step()
    torch.testing.assert_close(norm.running_mean, torch.full((3,), scale))
    torch.testing.assert_close(norm.running_var, torch.full((3,), scale**2))


@pytest.mark.parametrize("missing", [[0], [1], [0, 1]])
def test_leaving_needs_every_gradient(missing):
    """All weights of the group become those of the true run, or none: of none the gauge is kept for the next step."""
    params, opt = stepped(3, momentum=0.3)
    opt.param_groups[0]["decay"] = "coupled"
    twins = [nn.Parameter(opt.true_scale()[0] * p.detach()) for p in params]
    for i in missing:
        params[i].grad = None
    with Unchanged(opt):
        if len(missing) == 2:
            opt.step()
        else:
            with pytest.raises(
                ValueError, match=rf"params\[{missing[0]}\] has no gradient but others of its group have"
            ):
                opt.step()
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.param_groups[0].update(lr=0.0)
    opt.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


def reloaded(way, params, opt):
    """The parameters and the optimizer once more."""
    if way == "deepcopy":
        return copy.deepcopy((params, opt))
    if way == "pickle":
        return pickle.loads(pickle.dumps((params, opt)))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = exponential(twins, stats="tensor")
    if way == "into one that has stepped":
        for t in range(4):
            give(twins, t=30 + t)
            other.step()
        with torch.no_grad():
            for p, q in zip(params, twins, strict=True):
                q.copy_(p)
    other.load_state_dict(torch.load(file, weights_only=True))
    return twins, other


@pytest.mark.parametrize("options", [{}, {"momentum": 0.3}, {"momentum": 0.3, "nesterov": True}], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "into one that has stepped", "deepcopy", "pickle"])
def test_saved_and_continued_to_the_bit(way, options):
    params, opt = stepped(7, stats="tensor", **options)
    twins, other = reloaded(way, params, opt)
    assert other.param_groups[0]["gauge"] == opt.param_groups[0]["gauge"]
    assert type(other.param_groups[0]["gauge"]) is tuple
    assert other.param_groups[0]["scale_invariant"] is True
    for t in range(7):
        give(params, t=t)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        other.step()
        assert opt.true_scale() == other.true_scale()
        assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))
        assert torch.equal(opt.stats().update_sq, other.stats().update_sq)
    assert opt.param_groups[0]["gauge"][2] >= 1


def test_a_coupled_checkpoint_resets_the_gauge():
    params, opt = stepped(4)
    saved = torch.optim.SGD(params, lr=0.5, weight_decay=0.1).state_dict()
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["decay"] == "exponential"
    assert opt.true_scale() == [1.0]


def test_the_users_word_on_invariance_survives_a_checkpoint_without_it():
    params = weights()
    opt = normkern.SGD([{"params": params, "scale_invariant": True}], lr=0.5, weight_decay=0.1, decay="exponential")
    opt.load_state_dict(torch.optim.SGD(params, lr=0.5, weight_decay=0.1).state_dict())
    plain(params)
    opt.step()
    assert opt.param_groups[0]["gauge"][0] == pytest.approx(0.95)


def test_norm_buffers_are_not_saved_and_stay():
    norm = nn.BatchNorm1d(3)
    _, opt = stepped(2)
    opt.param_groups[0]["norm_buffers"] = [norm]
    saved = opt.state_dict()
    assert "norm_buffers" not in saved["param_groups"][0]
    assert opt.param_groups[0]["norm_buffers"] == [norm]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["norm_buffers"][0] is norm


@pytest.mark.parametrize("dampening", [0.0, 1.5])
def test_own_checkpoints_are_always_welcome(dampening):
    """Whatever the decay under way is: with dampening above 1 it is negative."""
    params, opt = stepped(9, momentum=0.3, dampening=dampening)
    assert (opt.param_groups[0]["gauge"][1] < 0) == (dampening > 1)
    _, other = reloaded("state_dict", params, opt)
    assert other.param_groups[0]["gauge"] == opt.param_groups[0]["gauge"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gauge", None), ("gauge", 1.0), ("gauge", (1.0, 0.0)), ("gauge", (0.0, 0.0, 0)), ("gauge", (-1.0, 0.0, 0)),
        ("gauge", (math.nan, 0.0, 0)), ("gauge", (1.0, math.inf, 0)), ("gauge", (1.0, math.nan, 0)), ("gauge", (4.0, 0.0, 0)),
        ("gauge", (1.0, 0.0, 0.5)), ("gauge", ("1", 0.0, 0)), ("gauge", "abc"), ("gauge", (1.0, 0.0, True)),
        ("scale_invariant", "yes"), ("scale_invariant", 1), ("decay", None),
    ],
    ids=str,
)  # fmt: skip
def test_a_corrupted_checkpoint_changes_nothing(key, value):
    _, opt = stepped(4, momentum=0.3)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0][key] = value
    with Unchanged(opt), pytest.raises(ValueError, match=rf"SGD.load_state_dict: param_groups\[0\]: {key} expected"):
        opt.load_state_dict(saved)
    opt.step()


@pytest.mark.parametrize("gauge", [None, (1.0, 0.0), (0.0, 0.0, 0), (math.nan, 0.0, 0), [1.0, 0.0, 0.5], "abc"])
def test_a_group_whose_gauge_somebody_spoiled(gauge):
    _, opt = stepped(4, momentum=0.3)
    opt.param_groups[0]["gauge"] = gauge
    with Unchanged(opt), pytest.raises(ValueError, match=r"SGD.step: param_groups\[0\]: gauge expected"):
        opt.step()
