"""Weights of any size made of parameters, and parameter-made operands of products and attention: exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import normkern
from normkern.noise.per_sample.derived import Derived

from .case import Problem, classes, numbers, squares, words
from .measuring import assert_right, measured, refuses
from .reference import contributions, expected


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias)


class Merged(nn.Module):
    """A frozen weight, changed by a small trained one: `kind`."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.base = nn.Linear(6, 8).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6) / 2), nn.Parameter(torch.randn(8, 2) / 2)
        self.c, self.d = nn.Parameter(torch.randn(4, 3) / 2), nn.Parameter(torch.randn(2, 2) / 2)
        self.r, self.head = nn.Parameter(torch.randn(6, 6) / 4), nn.Linear(8, 3)

    def forward(self, x):
        w = self.base.weight
        if self.kind == "lora":
            w = w + 0.5 * self.b @ self.a
        elif self.kind == "loha":
            w = w + (self.b @ self.a) * (self.b.square() @ self.a.cos())
        elif self.kind == "lokr":
            w = w + torch.kron(self.c, self.d)
        elif self.kind == "dora":
            w = w + self.b @ self.a
            w = self.b.sum(1, keepdim=True) * w / w.norm(dim=1, keepdim=True)
        elif self.kind == "oft":
            skew, eye = self.r - self.r.t(), torch.eye(6, dtype=x.dtype)
            w = w @ (eye - skew) @ torch.linalg.inv(eye + skew)
        elif self.kind == "fourier":
            w = w + torch.fft.ifft2(torch.complex(self.b @ self.a, self.b @ self.a.sin())).real
        return self.head(torch.tanh(F.linear(x, w, self.base.bias)))


class ParameterMade(nn.Module):
    """Samples meet something that another network makes of a table: `kind`."""

    def __init__(self, kind, inplace=False):
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 8))
        self.heads = nn.Sequential(nn.Linear(2, 5), nn.ReLU(inplace), nn.Linear(5, 2))
        self.relative = nn.Embedding(9, 2)
        self.register_buffer("table", torch.randn(5, 4))
        self.register_buffer("pairs", torch.randn(5, 5, 2))
        self.register_buffer("distance", torch.arange(5)[:, None] - torch.arange(5) + 4)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made = self.made(self.table)
        keys = made.unflatten(-1, (2, 4)).transpose(0, 1)
        scores = q @ k.transpose(-1, -2)
        if self.kind == "keys":
            return self.o(torch.tanh(self.q(x) @ made.t() @ made))
        if self.kind == "positions":
            return self.o(torch.tanh(self.q(x) + made))
        if self.kind == "learned_queries":
            out = torch.matmul((keys @ k.transpose(-1, -2)).softmax(-1), v)
            return self.o(out.transpose(1, 2).flatten(-2))
        if self.kind == "queries_of_sdpa":
            out = F.scaled_dot_product_attention(keys.expand(len(x), 2, 5, 4), k, v)
            return self.o(out.transpose(1, 2).flatten(-2))
        if self.kind == "t5":
            scores = scores + self.relative(self.distance).permute(2, 0, 1)
        if self.kind == "swin":
            scores = scores + 3 * torch.sigmoid(self.heads(self.pairs)).permute(2, 0, 1)
        if self.kind == "conformer":
            scores = scores + torch.einsum("bhqd,hkd->bhqk", q + self.v.bias.unflatten(0, (2, 1, 4)), keys)
        if self.kind == "deberta":
            scores = scores + torch.gather(q @ keys.transpose(-1, -2), -1, (self.distance % 5).expand_as(scores))
            scores = scores + (k @ keys.transpose(-1, -2)).transpose(-1, -2)
        if self.kind == "sdpa":
            mask = self.relative(self.distance).permute(2, 0, 1)[None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.kind == "sdpa_expanded":
            mask = self.heads(self.pairs).permute(2, 0, 1).expand(len(x), 2, 5, 5)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = scores.softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(-2))


class Written(nn.Module):
    """A weight written in place before its use: `kind`."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.w, self.s = kind, nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        if self.kind == "filled":
            w = torch.zeros(4, 6, dtype=x.dtype)
            w[:, ::2] = self.w[:, ::2]
            w[0, 1] = self.s[0]
        elif self.kind == "copied":
            w = torch.ones(4, 6, dtype=x.dtype)
            w.copy_(self.w)
            w.mul_(self.s[:, None])
        elif self.kind == "multiplied_buffer":
            w = torch.full((4, 6), 3.0, dtype=x.dtype)
            w *= self.w
        elif self.kind == "chain":
            w = self.w * 2
            w.clamp_(-1.5, 1.5).add_(self.s[:, None]).sin_()
            w[1:3, 2] = 0
        return F.linear(x, w)


def spectral():
    torch.manual_seed(3)
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)).eval()


NETS = {
    "weight_norm": lambda: classes(
        nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4)), 5, 6
    ),
    "weight_norm_of_all": lambda: numbers(parametrizations.weight_norm(nn.Conv1d(2, 3, 3), dim=None), 5, 2, 7),
    "spectral_norm": lambda: numbers(spectral(), 5, 6),
    "weight_standardisation": lambda: numbers(nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.Flatten()), 4, 3, 5, 5),
    **{
        f"orthogonal_{how}": lambda how=how: numbers(
            nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map=how), nn.Tanh(), nn.Linear(6, 2)), 4, 6
        )
        for how in ("matrix_exp", "cayley", "householder")
    },
    **{k: lambda k=k: numbers(Merged(k), 5, 6) for k in ("lora", "loha", "lokr", "dora", "oft", "fourier")},
    **{
        k: lambda k=k: numbers(ParameterMade(k), 3, 5, 8)
        for k in (
            "keys", "positions", "learned_queries", "queries_of_sdpa", "t5", "swin", "conformer", "deberta", "sdpa",
            "sdpa_expanded",
        )
    },
    "swin_in_place": lambda: numbers(ParameterMade("swin", inplace=True), 3, 5, 8),
    "positions_in_place": lambda: numbers(ParameterMade("positions", inplace=True), 3, 5, 8),
    **{f"written_{k}": lambda k=k: numbers(Written(k), 5, 6) for k in ("filled", "copied", "multiplied_buffer", "chain")},
    "embedding_normalised": lambda: words(Table(), 4, 6),
}  # fmt: skip


class Table(nn.Module):
    """Rows of a table that is normalised as a whole."""

    def __init__(self):
        super().__init__()
        self.e, self.o = nn.Embedding(7, 5), nn.Linear(5, 2)

    def forward(self, ids):
        return self.o(torch.tanh(F.embedding(ids, F.normalize(self.e.weight - self.e.weight.mean(0), dim=1))))


@pytest.mark.parametrize("name", NETS)
def test_weights_made_of_parameters_are_exact(name):
    torch.manual_seed(1)
    problem = NETS[name]().to(torch.float64)
    assert_right(problem, measured(problem))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrapped", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_hooks_that_make_a_weight_before_the_forward(wrapped):
    """The older implementations, whose models cannot be copied."""
    torch.manual_seed(1)
    model = (
        nn.Sequential(wrapped(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), wrapped(nn.Linear(36, 3))).double().eval()
    )
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(model(x[b : b + 1]).square().mean(), list(model.parameters()))]
        )
        for b in range(4)
    ]
    noise = normkern.GradientNoise(model, ("norms", "variance"), check=True)
    with noise:
        model(x).square().mean().backward()
    g = torch.stack(rows)
    torch.testing.assert_close(noise.result().sq_norms, g.square().sum(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(noise.result().trace_sigma, g.var(0).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["weight_norm", "dora", "swin", "sdpa"])
def test_each_tier_alone(name):
    torch.manual_seed(1)
    problem = NETS[name]().to(torch.float64)
    for stats in (("nsr",), ("variance",)):
        problem.model.zero_grad()
        assert_right(problem, measured(problem, stats), stats)


def test_overwritten_memory_of_a_made_weight_is_refused():
    """Another tensor in the memory that an operation wrote into has no way back any more."""

    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            w = self.w * 2
            w[:2].zero_()
            return F.linear(x, w)

    with refuses("'w' of the model .*made by zero"):
        measured(numbers(Aliased(), 5, 6))


class Float32Norm(nn.Module):
    def __init__(self, width, back):
        super().__init__()
        self.weight, self.back = nn.Parameter(torch.zeros(width)), back

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        scale = 1.0 + self.weight.float()
        return (y.type_as(x) * scale.type_as(x)) if self.back else (y * scale).type_as(x)


@pytest.mark.parametrize("back", [False, True])
def test_float32_inside_a_float64_model_is_measured(back):
    """The tolerance is that of the lowest dtype that a contribution goes through."""
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), Float32Norm(64, back), nn.Linear(64, 2)).double()
        x = torch.randn(4, 50, 64, dtype=torch.float64)
        problem = Problem(net, (x,), torch.randn(4, 1, dtype=torch.float64), squares)
        noise = normkern.GradientNoise(net, check=True)
        with noise:
            problem.value().backward()
        wanted = expected(contributions(problem)).scalars["trace_sigma"]
        assert float(noise.result().trace_sigma) == pytest.approx(wanted, rel=1e-5)


def test_changed_gradient_of_a_made_weight_is_still_found():
    problem = numbers(Float32Norm(6, False), 5, 6).to(torch.float64)
    problem.model.weight.register_hook(lambda g: g * 1.01)
    with refuses("'weight' .*do not add up"):
        measured(problem)


def test_contributions_to_one_derived_tensor_go_back_together(monkeypatch):
    """As those of layers that share a table of relative positions."""

    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(7, 2, dtype=torch.float64))

        def forward(self, x):
            places = self.table[torch.tensor([[3, 4, 5], [2, 3, 4], [1, 2, 3]])].permute(2, 0, 1)
            for _ in range(3):
                x = torch.tanh(x + places)
            return x

    torch.manual_seed(0)
    model, x = Shared(), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    went = []
    back = Derived.back_rows
    monkeypatch.setattr(Derived, "back_rows", lambda self, *args: went.append(self) or back(self, *args))
    noise = normkern.GradientNoise(model, ("norms", "variance"))
    with noise:
        model(x).square().flatten(1).sum(1).mean().backward()
    assert len(went) == 1
    rows = [torch.autograd.grad(model(x)[b].square().sum(), model.table)[0] for b in range(4)]
    torch.testing.assert_close(noise.result().variance["table"], torch.stack(rows).var(0))
