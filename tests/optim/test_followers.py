"""decay="exponential": averages that follow, weights that something else has written, and the true weights."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normkern
from normkern import ops
from normkern.optim.exponential_groups import find_followers


def net(buffers=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-14, track_running_stats=buffers), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-14, track_running_stats=buffers), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    ).double()  # fmt: skip


def batches(count, seed=0):
    make = torch.Generator().manual_seed(seed)
    protos = torch.randn(10, 3, 8, 8, generator=make, dtype=torch.float64)
    for _ in range(count):
        y = torch.randint(10, (16,), generator=make)
        yield protos[y] + torch.randn(16, 3, 8, 8, generator=make, dtype=torch.float64), y


class Run:
    """A network, its optimizer in either form of decay, and what follows it."""

    def __init__(self, decay, followers=None, named=False, momentum=0.5, **group):
        self.net = net()
        self.convs = [self.net[0].weight, self.net[3].weight]
        pairs = [("0.weight", self.convs[0]), ("3.weight", self.convs[1])]
        self.copies = [] if followers is None else followers(self.net)
        rest = [(n, p) for n, p in self.net.named_parameters() if p.ndim != 4]
        own = {"weight_decay": 1.0, "decay": decay, "norm_buffers": [self.net[1], self.net[4]]} | group
        own["followers"] = self.copies if decay == "exponential" else []
        groups = [
            {"params": pairs if named else self.convs, **own},
            {"params": rest if named else [p for _, p in rest]},
        ]
        self.opt = normkern.SGD(groups, lr=0.05, momentum=momentum)

    def step(self, x, y):
        self.opt.zero_grad()
        nn.functional.cross_entropy(self.net(x), y).backward()
        self.opt.step()

    @property
    def scale(self):
        return self.opt.true_scale()[0]

    @property
    def exponent(self):
        return self.opt.param_groups[0].get("gauge", ops.NEW_GAUGE)[2]


def ema(model, **options):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), **options)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("how", ["ema", "swa", "list", "dict"])
def test_an_average_is_that_of_the_run_with_decay(how, named):
    """Of the weights, at every step, over several rescales; of modules and of lists."""

    def follow(model):
        if how in ("ema", "swa"):
            average = ema(model) if how == "ema" else AveragedModel(model)
            return [average]
        tensors = [model[0].weight.detach().clone(), model[3].weight.detach().clone()]
        return [tensors if how == "list" else {"params": tensors}]

    runs = [Run(decay, follow, named) for decay in ("exponential", "coupled")]
    rescales = 0
    for x, y in batches(60):
        for run in runs:
            before = run.exponent
            run.step(x, y)
            rescales += run.exponent != before
            (copy_,) = run.copies
            if how in ("ema", "swa"):
                copy_.update_parameters(run.net)
            else:
                for e, w in zip(copy_ if how == "list" else copy_["params"], run.convs, strict=True):
                    e.lerp_(w.detach(), 0.1)
        averages = [
            [run.copies[0].module[0].weight, run.copies[0].module[3].weight] if how in ("ema", "swa")
            else run.copies[0] if how == "list" else run.copies[0]["params"] for run in runs
        ]  # fmt: skip
        for ours, theirs in zip(*averages, strict=True):
            torch.testing.assert_close(runs[0].scale * ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-9)
    assert rescales >= 2


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_loss_of_an_average_does_not_jump(use_buffers):
    """In eval mode, at the steps that take a power of two out."""
    run = Run("exponential", lambda model: [ema(model, use_buffers=use_buffers)], weight_decay=0.4)
    test = next(batches(1, seed=1))
    losses, jumps = [], []
    for x, y in batches(100):
        before = run.exponent
        run.step(x, y)
        run.copies[0].eval()
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(run.copies[0](test[0]), test[1]).item())
        if run.exponent != before:
            jumps.append(abs(losses[-1] / losses[-2] - 1))
        run.copies[0].update_parameters(run.net)
    assert len(jumps) >= 2
    assert max(jumps) < 0.1, jumps


def test_lookahead_is_that_of_the_run_with_decay():
    """Slow weights that are mixed into the fast ones, as lists that follow: without momentum, up to rounding."""

    def follow(model):
        return [[model[0].weight.detach().clone(), model[3].weight.detach().clone()]]

    runs = [Run(decay, follow, momentum=0.0) for decay in ("exponential", "coupled")]
    for t, (x, y) in enumerate(batches(48)):
        for run in runs:
            run.step(x, y)
            if t % 6 == 5:
                with torch.no_grad():
                    for slow, fast in zip(run.copies[0], run.convs, strict=True):
                        slow.lerp_(fast, 0.5)
                        fast.copy_(slow)
    for ours, theirs in zip(runs[0].convs, runs[1].convs, strict=True):
        torch.testing.assert_close(runs[0].scale * ours.detach(), theirs.detach(), rtol=1e-8, atol=1e-8)
    assert runs[0].exponent >= 2


def test_slow_weights_in_the_state_follow():
    """As timm's Lookahead keeps them."""
    run = Run("exponential")
    for t, (x, y) in enumerate(batches(8)):
        run.step(x, y)
        if t == 0:
            run.opt.state[run.convs[0]]["lookahead_slow_buff"] = run.convs[0].detach().clone()
            true = run.scale * run.convs[0].detach()
    torch.testing.assert_close(run.scale * run.opt.state[run.convs[0]]["lookahead_slow_buff"], true)


def test_leaving_exponential_decay():
    run = Run("exponential", lambda m: [[m[0].weight.detach().clone(), m[3].weight.detach().clone()]])
    for x, y in batches(10):
        run.step(x, y)
    true = [run.scale * e.clone() for e in run.copies[0]]
    run.opt.param_groups[0]["decay"] = "coupled"
    run.step(x, y)
    assert run.scale == 1
    for e, t in zip(run.copies[0], true, strict=True):
        torch.testing.assert_close(e, t)


def shrinking(**group):
    torch.manual_seed(0)
    w = nn.Parameter(torch.linspace(1, 2, 20))
    opt = normkern.SGD(
        [{"params": [("w", w)], "norm_buffers": [], **group}], lr=1.0, weight_decay=0.2, decay="exponential"
    )
    n = torch.randn(20)

    def step():
        w.grad = (n - (n @ w.detach()) / w.detach().square().sum() * w.detach()) / w.detach().norm()
        opt.step()

    return w, opt, step


def test_without_followers_a_warning_says_that_averages_are_stale():
    _, opt, step = shrinking()
    step()
    with pytest.warns(
        UserWarning, match=r"Averages and other copies .* are stale: .* followers=\[\] if there are none"
    ) as seen:
        step()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert "norm_buffers" not in str(seen[0].message)
    for _ in range(10):
        step()
    assert opt.param_groups[0]["gauge"][2] > 2


def test_weights_written_behind_the_back():
    """By name, once; the step is taken. Not where copies follow, and not for a conversion."""
    for write in (lambda w: w.mul_(0.5), lambda w: setattr(w, "data", w.data.clone())):
        w, _, step = shrinking(followers=[])
        step()
        with torch.no_grad():
            write(w)
        before = w.detach().clone()
        with pytest.warns(UserWarning, match=r"the weight 'w' was written between steps.*followers") as seen:
            step()
        assert seen[0].filename == __file__
        assert not torch.equal(w, before)
        with torch.no_grad():
            write(w)
        step()
    for momentum in (0.0, 0.01):
        w, opt, step = shrinking(followers=[[torch.ones(20)]])
        opt.param_groups[0]["momentum"] = momentum
        step()
        with torch.no_grad():
            w.mul_(0.5)
        with pytest.warns(UserWarning, match="without momentum, name the copies") if momentum else nullcontext():
            step()


def test_weights_that_are_converted_loaded_or_copied():
    w, opt, step = shrinking(followers=[])
    step()
    state, saved = copy.deepcopy(opt.state_dict()), w.detach().clone()
    step()
    with torch.no_grad():
        w.copy_(saved)
    opt.load_state_dict(state)  # with the optimizer's state
    step()
    w.requires_grad_(False).requires_grad_(True)
    step()
    with opt.true_weights():
        pass
    step()
    copy.deepcopy(opt)


def test_a_conversion_is_no_write():
    """The same values in another dtype or memory format."""
    from normkern.optim.written_behind import Versions

    w = nn.Parameter(torch.ones(2, 3, 4, 5))
    versions = Versions([w])
    w.data = w.data.contiguous(memory_format=torch.channels_last)
    assert versions.find_written([w], True) is None
    w.data = w.data.double()
    assert versions.find_written([w], True) is None
    versions = Versions([w])
    assert versions.find_written([w], True) is None
    w.data = w.data.clone()
    assert versions.find_written([w], True) == 0
    assert versions.find_written([w, w], True) is None
    assert versions.find_written([nn.Parameter(torch.ones(2))], True) is None


@pytest.mark.parametrize("count", [1, 4, 5, 18])
@pytest.mark.parametrize("alone", [True, False])
def test_a_write_among_many_parameters_is_found(count, alone):
    """At once where all are written, else after as many steps as it takes to look at all of them."""

    def params_of(n):
        params = [nn.Parameter(torch.randn(4, 4)) for _ in range(n)]
        for p in params:
            p.grad = torch.randn(4, 4)
            p.grad -= (p.grad * p).sum() / (p * p).sum() * p.detach()
        return params

    def take(opt, steps):
        for _ in range(steps):
            opt.step()

    for k in range(count):
        params = params_of(count)
        group = {"params": params, "scale_invariant": True, "norm_buffers": [], "followers": []}
        opt = normkern.SGD([group], lr=0.01, weight_decay=0.01, momentum=0.9, decay="exponential")
        take(opt, k % 4 + 1)
        with torch.no_grad():
            for i, p in enumerate(params):
                if i == k or not alone:
                    p.mul_(1)
        name = rf"params\[{k}\] of" if alone else "params"
        with pytest.warns(UserWarning, match=f"the weight {name}.* was written between steps"):
            take(opt, -(-count // 4) if alone else 1)


def test_loading_weights_alone_is_noticed():
    run = Run("exponential")
    saved = copy.deepcopy(run.net.state_dict())
    data = list(batches(4))
    for x, y in data[:3]:
        run.step(x, y)
    run.net.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"the weight params\[0\] of param_groups\[0\] was written"):
        run.step(*data[3])


def test_true_weights():
    """For evaluation and export: the weights of the run with decay; afterwards all is as before, to the bit."""
    runs = [Run(d, lambda m: [ema(m)], named=True) for d in ("exponential", "coupled")]
    for x, y in batches(20):
        for run in runs:
            run.step(x, y)
            run.copies[0].update_parameters(run.net)
    ours, theirs = runs
    assert ours.scale != 1
    before = copy.deepcopy(ours.net.state_dict())
    x = next(batches(1, seed=1))[0]
    ours.net.eval()
    expected = ours.net(x)
    with ours.opt.true_weights():
        exported = copy.deepcopy(ours.net.state_dict())
        torch.testing.assert_close(ours.net(x), expected)
        torch.testing.assert_close(ours.copies[0].module[3].weight, theirs.copies[0].module[3].weight)
        with pytest.raises(RuntimeError, match="SGD.step: expected a step outside of true_weights"):
            ours.opt.step()
        with (
            pytest.raises(RuntimeError, match="SGD.true_weights: expected no such context around it"),
            ours.opt.true_weights(),
        ):
            pass
    for name in ("0.weight", "3.weight"):
        torch.testing.assert_close(exported[name], theirs.net.state_dict()[name], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[k], v) for k, v in ours.net.state_dict().items())
    ours.net.train()
    ours.step(*next(batches(1)))


def two_alike():
    ws = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    return ws, nn.ParameterList([p.detach().clone() for p in ws])


@pytest.mark.parametrize(
    ("followers", "text"),
    [
        (3, "followers expected a list of modules or of lists, got int"),
        ([3], r"followers\[0\] expected a module, a list of tensors in the group's order, or a dict .*, got int"),
        ([[torch.ones(3)]], r"followers\[0\] expected 2 tensors, one for each parameter of the group, got 1"),
        ([[torch.ones(3), torch.ones(4)]], r"followers\[0\]\[1\] expected shape \(3,\), got \(4,\)"),
        ([[torch.ones(3), None]], r"followers\[0\]\[1\] expected a tensor, got NoneType"),
        ([{"norm_buffers": []}], r"followers\[0\]\['params'\] expected a module"),
        (
            [{"params": [torch.ones(3)] * 2, "norm_buffers": [3]}],
            r"followers\[0\]\['norm_buffers'\]\[0\] expected a norm or a pair",
        ),
        ([nn.Linear(2, 2)], r"followers\[0\], a Linear, expected a copy of params\[0\], found 0 tensors"),
    ],
)
def test_followers_that_are_none(followers, text):
    ws, _ = two_alike()
    with pytest.raises(ValueError, match=r"SGD: param_groups\[0\]: " + text):
        normkern.SGD([{"params": ws, "followers": followers}], lr=0.1, decay="exponential")


def test_ambiguous_copies_ask_for_the_list():
    ws, copies = two_alike()

    class Copy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = copies

    with pytest.raises(ValueError, match="found 2 tensors of its shape and value .* expected a list of the copies"):
        normkern.SGD([{"params": ws, "followers": [Copy()]}], lr=0.1, decay="exponential")
    follower = Copy()
    opt = normkern.SGD([{"params": [("a", ws[0]), ("b", ws[1])], "followers": [follower]}], lr=0.1, decay="exponential")
    assert opt._run.followers[0].tensors == [follower.a, follower.b]
    with pytest.raises(ValueError, match=r"that of params\[0\] is the parameter itself"):
        normkern.SGD([{"params": ws, "followers": [ws]}], lr=0.1, decay="exponential")


def test_norms_of_a_module_that_are_not_known():
    """Two of three norms, of a model whose names are not known."""
    model = nn.Sequential(net(), nn.BatchNorm1d(10)).double()
    group = {"params": [model[0][0].weight, model[0][3].weight], "norm_buffers": [model[0][1], model[0][4]]}
    average = ema(model)
    with pytest.raises(ValueError, match=r"expected the norms of norm_buffers in it, .* opt.name_parameters\(model\)"):
        normkern.SGD([{**group, "followers": [average]}], lr=0.1, decay="exponential")
    opt = normkern.SGD([group, {"params": [p for p in model.parameters() if p.ndim != 4]}], lr=0.1, decay="exponential")
    opt.name_parameters(model)
    opt.param_groups[0]["followers"] = [average]
    found = find_followers(opt._run, opt.param_groups, 0, "here")
    assert [id(m) for m, _ in found.norms] == [id(average.module[0][i].running_mean) for i in (1, 4)]


def test_followers_are_not_saved():
    run = Run("exponential", lambda m: [ema(m)])
    state = run.opt.state_dict()
    assert "followers" not in state["param_groups"][0]
    given = run.opt.param_groups[0]["followers"]
    run.opt.load_state_dict(copy.deepcopy(state))
    assert run.opt.param_groups[0]["followers"] is given
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in batches(10):
            run.step(x, y)
