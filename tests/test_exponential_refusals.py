"""SGD(decay="exponential"): what it refuses, with a sentence and nothing written; scalers, checkpoints, ways in and out."""

import copy
import io
import math
import pickle

import pytest
import torch
from invariant_nets import gradient_of_direction
from memory import same_bits
from torch import nn

import normkern
from normkern import ops

BUFFER = "momentum_buffer"


def weights(count=2, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(4, 5, generator=make, dtype=torch.float64).to(dtype)) for _ in range(count)]


def give(*lists, t=0, size=0.05):
    """Gradients of directions, the same for all lists."""
    make = torch.Generator().manual_seed(100 + t)
    for entries in zip(*lists, strict=True):
        n = size * torch.randn(entries[0].shape, generator=make, dtype=torch.float64)
        for w in entries:
            w.grad = gradient_of_direction(w, n).to(w.dtype)


def exponential(params, lr=0.5, weight_decay=0.1, **options):
    group = {"params": params, "norm_buffers": []}
    return normkern.SGD([group], lr=lr, weight_decay=weight_decay, decay="exponential", **options)


class Unchanged:
    """Weights, momentum buffers and param groups are afterwards as before."""

    def __init__(self, opt):
        self.opt = opt

    @staticmethod
    def _tensors(opt):
        params = [p for group in opt.param_groups for p in group["params"]]
        buffers = [opt.state[p][BUFFER] for p in params if BUFFER in opt.state.get(p, {})]
        return [t.detach().clone() for t in (*params, *buffers)], [t._version for t in (*params, *buffers)]

    @staticmethod
    def _groups(opt):
        return [{k: v for k, v in group.items() if k not in ("params", "norm_buffers")} for group in opt.param_groups]

    def __enter__(self):
        self.tensors, self.versions = self._tensors(self.opt)
        self.groups, self.state = copy.deepcopy(self._groups(self.opt)), len(self.opt.state)

    def __exit__(self, *_):
        tensors, versions = self._tensors(self.opt)
        assert versions == self.versions
        assert all(same_bits(a, b) for a, b in zip(tensors, self.tensors, strict=True))
        assert self._groups(self.opt) == self.groups
        assert len(self.opt.state) == self.state


def stepped(steps=3, **options):
    params = weights()
    opt = exponential(params, **options)
    for t in range(steps):
        give(params, t=t)
        opt.step()
    give(params, t=steps)
    return params, opt


def assert_follows(ours, theirs, params, twins, steps=5, tolerance=1e-12, start=50):
    """Both runs are one, and stay so."""
    for t in range(start, start + steps):
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            scale = group.get("gauge", ops.NEW_GAUGE)[0]
            for p, q in zip(group["params"], other["params"], strict=True):
                torch.testing.assert_close(scale * p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
        give(params, twins, t=t)
        ours.step()
        theirs.step()


# ---- lr * weight_decay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("later", [False, True])
def test_too_much_decay(later, momentum, nesterov):
    """T5.3: at the first step, and at a later one; in the last group, after good ones."""
    most = (1 - math.sqrt(momentum)) ** 2
    params = weights(3)
    options = {"momentum": momentum, "nesterov": nesterov and momentum > 0, "norm_buffers": []}
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


# ---- Gradients that are missing ---------------------------------------------------------------------------------------------


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
    groups = [[{"params": [p], "norm_buffers": []} for p in side] for side in (params, twins)]
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


# ---- GradScaler ---------------------------------------------------------------------------------------------------------------


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


# ---- Who is scale-invariant -----------------------------------------------------------------------------------------------------


def plain(params):
    """Gradients of a loss that sees the scale."""
    for p in params:
        p.grad = p.detach().clone() + 0.1


@pytest.mark.parametrize("names", [False, True])
def test_a_group_that_would_lose_its_decay(names):
    params = weights(3)
    give(params)
    params[1].grad = params[1].grad + 0.01 * params[1].detach()
    opt = exponential([(f"layer.{i}", p) for i, p in enumerate(params)] if names else params)
    name = r"params\[1\] \('layer.1'\)" if names else r"params\[1\]"
    text = rf"param_groups\[0\]: {name} is not scale-invariant, and would lose its weight decay.*got 0\.\d+; give it"
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
    groups = [{"params": [p], "norm_buffers": []} for p in params]
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
    text = "is not scale-invariant|is all zeros"
    with Unchanged(opt), pytest.raises(ValueError, match=text):
        opt.step()


def test_zero_weights():
    params = weights()
    with torch.no_grad():
        params[1].zero_()
    give(params[:1])
    params[1].grad = torch.ones_like(params[1])
    opt = exponential([("a", params[0]), ("b", params[1])])
    with Unchanged(opt), pytest.raises(ValueError, match=r"params\[1\] \('b'\) is all zeros.*scale_invariant=True"):
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


# ---- Options ----------------------------------------------------------------------------------------------------------------------


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
        text = r'SGD.step: param_groups\[0\]: decay expected "coupled" or "exponential", got \'linear\''
        with Unchanged(opt), pytest.raises(ValueError, match=text):
            opt.step()
    else:
        with pytest.raises(ValueError, match=r'SGD: decay expected "coupled" or "exponential", got \'linear\''):
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
            ours.add_param_group({"params": [params[2]], "norm_buffers": [], "lr": 0.1})
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


# ---- Ways in and out ------------------------------------------------------------------------------------------------------------


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


# ---- Checkpoints ------------------------------------------------------------------------------------------------------------------


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
    other = exponential(twins)
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
