"""Complex parameters: Var = E|c - mean c|^2, a real number for each entry, as of the real and imaginary parts together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern
from normkern import GradientNoiseResult

from .measuring import refuses

SAMPLES = 5


class Spectral(nn.Module):
    """A layer of a Fourier neural operator."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.into, self.out = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 1, 1)
        self.w = nn.Parameter(0.3 * torch.randn(4, 4, 3, dtype=torch.complex64))
        self.b = nn.Parameter(0.3 * torch.randn(4, 1, dtype=torch.complex64))

    def forward(self, x):
        x = self.into(x)
        f = torch.fft.rfft(x)[..., :3]
        return self.out(torch.fft.irfft(WAYS[self.way](f, self.w, self.b), n=x.shape[-1]).tanh())


WAYS = {
    "einsum": lambda f, w, b: torch.einsum("bik,iok->bok", f, w) + b,
    "scaled": lambda f, w, b: f * w[0] * b.conj(),
    "twice": lambda f, w, b: torch.einsum("bik,iok->bok", torch.einsum("bik,iok->bok", f, w) + b, w),
    "linear": lambda f, w, b: F.linear(f.transpose(1, 2), w[..., 0], b[:, 0]).transpose(1, 2),
    "matmul": lambda f, w, b: w[..., 1] @ (f - b),
    "polar": lambda f, w, b: f * torch.polar(w[0].abs(), w[0].angle() + 1) + b,
}


def double(model):
    """Return the model in float64 and complex128."""
    model = copy.deepcopy(model)
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(p.detach().to(torch.promote_types(p.dtype, torch.float64)))
    return model


def contributions(model, x):
    """Name -> (B, *shape): per-sample gradients of the mean of squares, by a loop over samples."""
    rows = []
    for b in range(len(x)):
        loss = model(x[b : b + 1]).square().mean()
        rows.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    named = [n for n, _ in model.named_parameters()]
    return {n: torch.stack([row[i] for row in rows]) for i, n in enumerate(named) if rows[0][i] is not None}


def variance_of(g):
    return (g - g.mean(0)).abs().square().sum(0) / (len(g) - 1)


def measured(model, x, stats=("nsr", "norms", "variance", "projections"), **options):
    model.zero_grad()
    noise = normkern.GradientNoise(model, stats, check=True, **options)
    with noise:
        model(x).square().mean().backward()
    return noise.result()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_statistics_of_complex_parameters(way, dtype):
    torch.manual_seed(0)
    model, x = Spectral(way), torch.randn(SAMPLES, 1, 16, dtype=torch.float64)
    g = contributions(double(model), x)
    result = measured(double(model) if dtype == torch.float64 else model, x.to(dtype))
    rtol = 1e-10 if dtype == torch.float64 else 2e-3
    assert set(result.variance) >= set(g)
    squares = sum(c.abs().square().flatten(1).sum(1) for c in g.values())
    torch.testing.assert_close(result.sq_norms, squares, rtol=rtol, atol=0)
    along = sum((c * c.mean(0).conj()).real.flatten(1).sum(1) for c in g.values())
    torch.testing.assert_close(result.projections, along, rtol=rtol, atol=rtol * float(squares.max()))
    assert float(result.trace_sigma) == pytest.approx(float(sum(variance_of(c).sum() for c in g.values())), rel=rtol)
    for n, c in g.items():
        assert not result.variance[n].is_complex()
        assert result.mean[n].is_complex() == c.is_complex()
        scale = float(c.abs().square().max())
        kind = torch.complex128 if c.is_complex() else torch.float64
        torch.testing.assert_close(result.variance[n].double(), variance_of(c), rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(result.mean[n].to(kind), c.mean(0), rtol=rtol, atol=rtol * scale**0.5)


def test_micro_batches_of_complex_parameters():
    """Of two backwards in one context, and of two results joined."""
    torch.manual_seed(0)
    model, x = double(Spectral("twice")), torch.randn(6, 1, 16, dtype=torch.float64)
    whole = measured(model, x, ("nsr", "variance"))
    model.zero_grad()
    noise = normkern.GradientNoise(model, ("nsr", "variance"))
    with noise:
        for part in x.split([2, 4]):
            (model(part).square().mean() * (len(part) / 6)).backward()
    halves = [
        normkern.GradientNoise.measure(model, lambda m, x: m(x).square().mean(), part, stats=("nsr", "variance"))
        for part in x.split([2, 4])
    ]
    for got in (noise.result(), GradientNoiseResult.join(halves)):
        torch.testing.assert_close(got.trace_sigma, whole.trace_sigma, rtol=1e-10, atol=0)
        torch.testing.assert_close(got.variance["w"], whole.variance["w"], rtol=1e-9, atol=0)


def test_layers_without_complex_arithmetic_are_refused():
    """A convolution of complex images has no kernel here: an error, and no wrong number."""
    model, x = nn.Conv2d(2, 3, 2, dtype=torch.complex64), torch.randn(4, 2, 5, 5, dtype=torch.complex64)
    with refuses("'weight' of .*of complex numbers"), normkern.GradientNoise(model):
        model(x).abs().mean().backward()
