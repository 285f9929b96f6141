"""max_norm of the constructor: clipping that any trainer's plain step() does; other norms; norms that are not finite."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import normkern

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def give(model, t, scale=1.0):
    make = torch.Generator().manual_seed(t)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=make, dtype=torch.float64).to(p.dtype)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, math.inf])
def test_it_is_torchs_clip_and_torchs_step(norm_type, differentiable):
    ours, theirs = net(), net()
    if differentiable:
        ours.requires_grad_(False)  # torch's loop steps no leaf otherwise
    more = {"differentiable": True} if differentiable else {"stats": "tensor"}
    opt = normkern.SGD(ours.parameters(), max_norm=0.5, norm_type=norm_type, **more, **OPTIONS)
    twin = torch.optim.SGD(theirs.parameters(), **OPTIONS)
    for t in range(4):
        give(ours, t, scale=(1.0, 1e-3)[t % 2])
        give(theirs, t, scale=(1.0, 1e-3)[t % 2])
        before = [p.grad.clone() for p in ours.parameters()]
        expected = clip_grad_norm_(theirs.parameters(), 0.5, norm_type)
        twin.step()
        assert opt.step() is None
        torch.testing.assert_close(opt.last_grad_norm, expected.double(), rtol=1e-12, atol=0)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours.parameters(), before, strict=True))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-10, atol=1e-12)


def test_what_a_step_returns():
    model = net()
    opt = normkern.SGD(model.parameters(), lr=0.1, max_norm=1.0)
    assert opt.last_grad_norm is None
    give(model, 0)
    assert opt.step(lambda: 3.0) == 3.0
    norm = opt.last_grad_norm
    assert opt.step(max_norm=0.5) is opt.last_grad_norm
    assert opt.last_grad_norm == norm
    loss, norm = opt.step(lambda: 3.0, max_norm=0.5)
    assert (loss, norm) == (3.0, opt.last_grad_norm)
    svag = normkern.SVAG(model.parameters(), lr=0.1, max_norm=1.0)

    def closure():
        give(model, 1)
        return 2.0

    assert svag.step(closure, closure) == (2.0, 2.0)
    assert svag.step(closure) == 2.0
    assert svag.last_grad_norm > 0


def test_the_argument_of_a_step_overrides():
    models = net(), net()
    clipped, plain = (
        normkern.SGD(models[0].parameters(), max_norm=0.1, **OPTIONS),
        normkern.SGD(models[1].parameters(), **OPTIONS),
    )
    for model in models:
        give(model, 0)
    clipped.step(max_norm=math.inf)
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_it_clips_the_combination_of_pairs():
    """What clip_grad_norm_ between hold() and step() cannot do."""
    models = net(), net()
    opts = [
        normkern.SVAG(models[0].parameters(), lr=0.1, l=4, max_norm=0.3),
        normkern.SVAG(models[1].parameters(), lr=0.1, l=4),
    ]
    for model, opt in zip(models, opts, strict=True):
        give(model, 0)
        opt.hold()
        give(model, 1)
    opts[0].step()
    opts[1].step(max_norm=0.3)
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))
    assert torch.equal(opts[0].last_grad_norm, opts[1].last_grad_norm)


@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_other_norms_of_pairs(norm_type):
    model, l = net(), 4.0
    opt = normkern.SVAG(model.parameters(), lr=0.1, l=l, norm_type=norm_type)
    give(model, 0)
    first = [p.grad for p in model.parameters()]
    opt.hold()
    give(model, 1)
    root = math.sqrt(2 * l - 1)
    whole = [0.5 * (a + p.grad) + 0.5 * root * (a - p.grad) for a, p in zip(first, model.parameters(), strict=True)]
    expected = torch.linalg.vector_norm(torch.cat([x.flatten() for x in whole]), norm_type)
    torch.testing.assert_close(opt.step(max_norm=1.0), expected, rtol=1e-12, atol=0)


def test_it_is_saved_and_restored():
    model = net()
    first = normkern.SGD(model.parameters(), max_norm=0.5, norm_type=math.inf, error_if_nonfinite=True, **OPTIONS)
    give(model, 0)
    first.step()
    second = normkern.SGD(model.parameters(), lr=0.1)
    second.load_state_dict(first.state_dict())
    assert (second.max_norm, second._run.clip_options.norm_type, second._run.clip_options.error_if_nonfinite) == (
        0.5,
        math.inf,
        True,
    )
    third = normkern.SGD(model.parameters(), lr=0.1, max_norm=7.0)  # a checkpoint without leaves the constructor's
    theirs = torch.optim.SGD(model.parameters(), **OPTIONS)
    theirs.load_state_dict(first.state_dict())
    third.load_state_dict(theirs.state_dict())
    assert third.max_norm == 7.0
    assert set(normkern.SGD(model.parameters(), lr=0.1).state_dict()) == {"state", "param_groups"}


@pytest.mark.parametrize(
    "entry", [3, {"max_nom": 1.0}, {"max_norm": -1.0}, {"norm_type": 0.5}, {"error_if_nonfinite": 1}]
)
def test_a_bad_entry_of_a_checkpoint(entry):
    model = net()
    opt = normkern.SGD(model.parameters(), lr=0.1, max_norm=1.0)
    state = copy.deepcopy(opt.state_dict()) | {"clipping": entry}
    state["param_groups"][0]["lr"] = 0.7
    with pytest.raises(ValueError, match="SGD.load_state_dict"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1
    assert opt.max_norm == 1.0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_norm": -1.0}, ValueError, "SGD: max_norm expected a number of at least 0, got -1.0"),
        ({"max_norm": "1"}, TypeError, "SGD: max_norm expected a number of at least 0, got '1'"),
        ({"norm_type": 0.5}, ValueError, "SGD: norm_type expected a number of at least 1 or infinity, got 0.5"),
        ({"norm_type": None}, TypeError, "SGD: norm_type expected a number"),
        ({"error_if_nonfinite": 1}, TypeError, "SGD: error_if_nonfinite expected True or False, got 1"),
        ({"group": 3}, TypeError, 'SGD: group expected a torch.distributed.ProcessGroup, "world" or None, got 3'),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        normkern.SGD(net().parameters(), lr=0.1, **options)
    with pytest.raises(error, match=text):
        normkern.SVAG(net().parameters(), lr=0.1, **options)


def test_it_is_no_option_of_a_group():
    model = net()
    with pytest.raises(ValueError, match=r"param_groups\[0\]: max_norm is an option of the whole optimizer"):
        normkern.SGD([{"params": model.parameters(), "max_norm": 1.0}], lr=0.1)
    # As ZeroRedundancyOptimizer repeats the defaults in its groups.
    opt = normkern.SGD([{"params": model.parameters(), "max_norm": 1.0}], lr=0.1, max_norm=1.0)
    assert "max_norm" not in opt.param_groups[0]


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_an_error_names_the_parameter_that_is_not_finite(norm_type):
    model = net()
    opt = normkern.SGD(model.named_parameters(), max_norm=1.0, error_if_nonfinite=True, norm_type=norm_type, **OPTIONS)
    give(model, 0)
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    model[2].weight.grad[0, 1] = math.nan
    with pytest.raises(RuntimeError, match=r"the norm of all gradients is nan, because of the gradient of '2.weight'"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    model[2].weight.grad.fill_(math.inf)
    with pytest.raises(RuntimeError, match=r"the gradient of '2.weight'; nothing was stepped"):
        opt.step(max_norm=1.0)
    opt = normkern.SGD(model.parameters(), max_norm=1.0, error_if_nonfinite=True, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"the gradient of params\[2\] of param_groups\[0\]"):
        opt.step()


def test_a_scaler_that_skips_is_no_error():
    model = net()
    opt = normkern.SGD(model.parameters(), fused=True, max_norm=1.0, error_if_nonfinite=True, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros((), requires_grad=True))
    give(model, 0)
    model[0].weight.grad.fill_(math.nan)
    assert scaler.step(opt) is None
    assert opt.last_grad_norm.isnan()


def pairs(between=None, steps=1, micro=(1, 1), copy=False, zero=False, scale=None, model=None):
    """SVAG steps of as many micro-batches per half as `micro`; `between` sees the parameters before each step."""
    torch.manual_seed(0)
    model = model or nn.Linear(16, 4)
    opt = normkern.SVAG(model.parameters(), lr=0.05, l=4)
    for _ in range(steps):
        opt.zero_grad(set_to_none=not zero)
        for half, count in enumerate(micro):
            for _ in range(count):
                model(torch.randn(8, 16)).square().sum().backward()
            if half == 0:
                opt.hold(copy=copy, scale=scale)
        if between:
            between(list(model.parameters()))
        opt.step()


def by_norm(params):
    clip_grad_norm_(params, 1.0)


def by_value(params):
    nn.utils.clip_grad_value_(params, 1e-3)


def unscale(params):
    for p in params:
        p.grad.mul_(0.5)


@pytest.mark.parametrize(
    ("between", "options"),
    [
        (by_norm, {}),
        (by_value, {}),
        (by_norm, {"micro": (3, 3), "steps": 3}),
        (lambda params: (unscale(params), by_norm(params)), {"scale": 2.0}),
    ],
)
def test_clipping_between_hold_and_step_is_warned_of(between, options):
    with pytest.warns(UserWarning, match=r"something clips .grad between hold\(\) and step\(\) .* max_norm="):
        pairs(between, **options)


def test_the_warning_comes_once_and_points_at_the_step():
    with pytest.warns(UserWarning, match="something clips") as seen:
        pairs(by_norm, steps=4)
    assert len(seen) == 1
    assert seen[0].filename == __file__


class Loops(nn.Module):
    """The whole model is run a number of times that varies, so that backwards write gradients in place."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(16, 16)

    def forward(self, x):
        for _ in range(int(torch.randint(3, 6, ()))):
            x = torch.tanh(self.cell(x))
        return x


@pytest.mark.parametrize(
    ("between", "options"),
    [
        (None, {}),
        (None, {"zero": True}),
        (None, {"copy": True}),
        (None, {"micro": (3, 3)}),
        (unscale, {"scale": 2.0}),
        (None, {"model": Loops()}),
    ],
)
def test_pairs_that_nothing_clips_are_not_warned_of(between, options):
    pairs(between, steps=12, **options)
