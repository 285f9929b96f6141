"""Parameters in the places of samples, by functions, in masks of attention: what is refused, and what is left out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern
from normkern.noise.per_sample.layers import loop

from .case import numbers
from .measuring import measured, refuses
from .nets_placed import PLACED, Biased


class Mean(torch.autograd.Function):
    """A sum over the samples, in a function of the input and a weight."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w).mean(0)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = grad.expand(len(x), -1) / len(x)
        return grad @ w.t(), x.t() @ grad


class Coupled(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.into, self.table, self.out = way, nn.Linear(4, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x):
        return WAYS[self.way](self, x)


def _function(net, x):
    return net.out(net.into(x) + Mean.apply(x, net.table.weight[:4]))


def _rows(net, x):
    """As many rows as samples, but behind them."""
    return net.out(torch.cat([net.into(x), net.table(torch.arange(len(x)))], 0)).unflatten(0, (2, -1)).transpose(0, 1)


def _windows(net, x):
    """Each of the second half of a sample and the first half of the next one."""
    h = net.into(x)
    return net.out(h.as_strided((len(x) - 1, 4), (4, 1), 2))


def _outside(net, x):
    """Memory of all samples, through a view of the first rows of each."""
    h = net.into(x).unflatten(1, (2, 2))[:, :1]
    return net.out(h.as_strided((len(x) // 2, 2, 4), (8, 4, 1))).flatten(1)


def _distances(net, x):
    h = net.into(x)
    return net.out(h) + torch.cdist(h, h).sum(1, keepdim=True)


def _linear(net, x):
    h = net.into(x)
    return F.linear(h, h.tanh())


def _bilinear(net, x):
    h = net.into(x)
    return F.bilinear(h, h, h[:, None] * h[:, :, None])


def _convolved(net, x):
    h = net.into(x).unflatten(1, (2, 2))
    return F.conv1d(h, h.tanh()).flatten(1)


def _normed(net, x):
    """As many channels as samples."""
    h = net.into(x)
    return F.group_norm(h.repeat(1, 2)[:, :6], 2, h[:, 0])


def _looked_up(net, x):
    return net.out(F.embedding(torch.arange(len(x)).flip(0), net.into(x)))


def _bags(net, x):
    return net.out(F.embedding_bag(torch.arange(len(x)).view(-1, 1).flip(0), net.into(x)))


def _renormed(net, x):
    return net.out(torch.renorm(net.into(x), 2, 1, 0.5))


def _weighted(net, x):
    """Weights of classes, as many as samples, from the samples."""
    h = net.into(x).repeat(1, 2)[:, :6]
    return F.cross_entropy(h, torch.arange(6), weight=h[:, 0].detach().square(), reduction="none")


def _losses(net, x):
    losses = torch.stack([net.out(net.into(x)).square().mean(), net.into(x).square().mean()])
    return losses.square()


def _pooled(net, x):
    return net.out(net.into(x)).mean(0)


WAYS = {
    "function": _function, "rows": _rows, "windows": _windows, "outside": _outside, "distances": _distances,
    "losses": _losses, "pooled": _pooled, "linear": _linear, "bilinear": _bilinear, "convolved": _convolved, "normed": _normed,
    "looked up": _looked_up, "weighted": _weighted, "bags": _bags, "renormed": _renormed,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_coupled_samples_are_refused(way):
    model = Coupled(way)
    with refuses(""), normkern.GradientNoise(model):
        model(torch.randn(6, 4)).square().mean().backward()


class Unseen(torch.autograd.Function):
    """The same by numpy, whose operations no mode sees; `keep`: how its backward knows the inputs."""

    @staticmethod
    def forward(ctx, x, w, keep):
        if keep == "saved":
            ctx.save_for_backward(x)
        else:
            ctx.kept = {"tensor": x, "list": [x], "array": x.detach().numpy()}[keep]
        return torch.tensor((x.detach().numpy() @ w.detach().numpy()).mean(0))

    @staticmethod
    def backward(ctx, grad):
        kept = ctx.saved_tensors[0] if ctx.saved_tensors else ctx.kept
        x = torch.as_tensor(kept[0] if isinstance(kept, list) else kept)
        return None, x.mean(0)[:, None] * grad, None


class Hidden(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.keep, self.w, self.out = keep, nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x) + Unseen.apply(x, self.w, self.keep)


@pytest.mark.parametrize("keep", ["saved", "tensor", "list", "array"])
def test_samples_that_a_function_hides_are_refused(keep):
    model = Hidden(keep)
    with refuses("'w' of the model .*no use was seen"), normkern.GradientNoise(model):
        model(torch.randn(6, 4)).square().mean().backward()


def test_wrong_gradient_of_a_functions_weight_is_found():
    problem = PLACED["rounded_kernels"].problem()
    problem.model[0].weight.register_hook(lambda g: g * 1.01)
    with refuses("'0.weight' .*do not add up.*exclude"):
        measured(problem)


def test_attention_with_positions_takes_one_call(monkeypatch):
    """Not one for each sample."""

    def looped(*_):
        raise AssertionError

    monkeypatch.setattr(loop.LoopOverSamples, "apply", looped)
    model, x = Biased(), torch.randn(4, 5, 6)
    with normkern.GradientNoise(model):
        model(x).square().mean().backward()


# ---- Left out -------------------------------------------------------------------------------------------------------


def _two_layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _loss(model, kind, x, y):
    loss = F.cross_entropy(model(x), y)
    if kind == "penalty":
        return loss + 0.1 * model[0].weight.square().sum()
    return loss * model[0].weight[0, 0].exp() if kind == "scale" else loss


@pytest.mark.parametrize("kind", ["penalty", "scale", "hook"])
def test_what_does_not_add_up_has_a_way_out(kind):
    model, x, y = _two_layers(), torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    if kind == "hook":
        model[0].weight.register_hook(lambda g: 2 * g)
    with refuses('"exclude"'), normkern.GradientNoise(model):
        _loss(model, kind, x, y).backward()
    for uncovered in ("exclude", "estimate"):
        model.zero_grad()
        noise = normkern.GradientNoise(model, ("norms", "variance")[uncovered == "estimate" :], uncovered=uncovered)
        with noise:
            _loss(model, kind, x, y).backward()
        result = noise.result()
        is_estimated = uncovered == "estimate" and kind == "penalty"
        assert result.coverage.estimated == (("0.weight",) if is_estimated else ())
        assert result.coverage.excluded == (() if is_estimated else ("0.weight",))
        rest = [p for n, p in model.named_parameters() if n != "0.weight"]
        each = [torch.autograd.grad(_loss(model, kind, x[i : i + 1], y[i : i + 1]), rest) for i in range(8)]
        for n, cs in zip(("0.bias", "2.weight", "2.bias"), zip(*each, strict=True), strict=True):
            torch.testing.assert_close(result.variance[n], torch.stack(cs).var(0), rtol=1e-10, atol=0)
        plain = torch.autograd.grad(_loss(model, kind, x, y), model[0].weight)[0]
        torch.testing.assert_close(model[0].weight.grad, plain)


def test_estimate_of_a_penalised_weight_is_unbiased():
    model, x, y = _two_layers(), torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
    each = [torch.autograd.grad(_loss(model, "", x[i : i + 1], y[i : i + 1]), model[0].weight)[0] for i in range(4)]
    wanted = torch.stack(each).var(0).sum()
    found = []
    for _ in range(60):
        model.zero_grad()
        noise = normkern.GradientNoise(model, "variance", uncovered="estimate")
        with noise:
            _loss(model, "penalty", x, y).backward()
        found.append(noise.result().variance["0.weight"].sum())
    contrasts = {round(float(v), 9) for v in found}
    assert len(contrasts) == 3  # of four samples, up to their signs
    assert sum(contrasts) / 3 == pytest.approx(float(wanted), rel=1e-6)


# ---- Coarser dtypes in a model -----------------------------------------------------------------------------------


class Cast(nn.Module):
    """A weight that goes through a coarser dtype, once or in one of two uses."""

    def __init__(self, dtype, twice):
        super().__init__()
        self.weight, self.dtype, self.twice = nn.Parameter(torch.randn(3, 5)), dtype, twice

    def forward(self, x):
        out = F.linear(x.to(self.dtype), self.weight.to(self.dtype)).to(x.dtype)
        return out + F.linear(x, self.weight) if self.twice else out


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("dtype", "planted"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_the_coarsest_dtype_decides_what_may_differ(dtype, planted, twice):
    """Rounding of the coarsest dtype passes; an error somewhat above it does not, and in float64 alone a small one."""
    for seed in range(5):
        torch.manual_seed(seed)
        measured(numbers(Cast(dtype, twice), 5, 7, 5).to(torch.float64))
        problem = numbers(Cast(dtype, twice), 5, 7, 5).to(torch.float64)
        problem.model.weight.register_hook(lambda g: g * (1 + planted))
        with refuses("do not add up"):
            measured(problem)
    problem = numbers(Cast(torch.float64, twice), 5, 7, 5).to(torch.float64)
    problem.model.weight.register_hook(lambda g: g * (1 + 1e-8))
    with refuses("do not add up"):
        measured(problem)
