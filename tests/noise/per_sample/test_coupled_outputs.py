"""Samples mixed after the last parameter of a model, and losses that are sums although a mean was announced."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern

from .measuring import refuses

SAMPLES = 6


class Ending(nn.Module):
    """Two layers, and what the model does with their output."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.end = nn.Linear(5, 4), nn.Linear(4, 3), end

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.end(self.b(h), h)


def balance_loss(z):
    """Of a mixture of experts: the share of the samples times the mean probability."""
    p = z.softmax(-1)
    share = F.one_hot(p.argmax(-1), z.shape[-1]).float().mean(0)
    return z.shape[-1] * (share * p.mean(0)).sum()


#: Make the output of the model, of which the first is a part of the loss.
COUPLED = {
    "standardised": lambda z, h: (z - z.mean(0)) / z.std(0),
    "softmax_over_batch": lambda z, h: z.softmax(0),
    "mixup": lambda z, h: 0.6 * z + 0.4 * z.flip(0),
    "mixup_by_index": lambda z, h: 0.6 * z + 0.4 * z[torch.tensor([1, 2, 3, 4, 5, 0])],
    "similarities": lambda z, h: F.normalize(z, dim=1) @ F.normalize(z, dim=1).T,
    "batch_mean": lambda z, h: z.mean(0, keepdim=True).expand(SAMPLES, 3),
    "balance_loss": lambda z, h: balance_loss(z),
    "balance_loss_of_hidden": lambda z, h: z.square().mean() + 0.1 * balance_loss(h),
    "in_model_contrast": lambda z, h: F.cross_entropy(z @ h[:, :3].T, torch.arange(SAMPLES)),
    "variance_over_batch": lambda z, h: (z.var(0) - 1).square().sum(),
    "norm_of_all": lambda z, h: z.norm(),
    "square_of_mean": lambda z, h: z.mean() ** 2,
    "product_of_losses": lambda z, h: z.square().mean() * h.square().mean(),
}
#: Sums over samples that a model computes itself, and outputs that no gradient reaches.
SEPARABLE = {
    "mean_loss": lambda z, h: z.square().mean(),
    "mean_over_batch_first": lambda z, h: z.square().mean(0).sum(),
    "weighted_losses": lambda z, h: 0.5 * z.square().mean() + h.square().mean() / 3 - 0.1 * z.mean(),
    "masked": lambda z, h: (z.square() * (h[:, :3] > 0)).sum() / (h[:, :3] > 0).sum(),
    "cross_entropy": lambda z, h: F.cross_entropy(z, torch.tensor([0, 1, 2, 0, 1, 2])),
    "stacked_losses": lambda z, h: torch.stack([z.square().mean(), h.square().mean()]).sum(),
    "one_number": lambda z, h: z.square().mean().reshape(1),
    "loss_in_float64": lambda z, h: z.square().mean().double(),
    "loss_of_each_sample": lambda z, h: F.cross_entropy(z, torch.tensor([0, 1, 2, 0, 1, 2]), reduction="none"),
    "triplet_of_each_sample": lambda z, h: F.triplet_margin_loss(z, 2 * z + 1, h[:, :3], reduction="none"),
    "masked_loss_of_each": lambda z, h: (
        F.cross_entropy(z, torch.zeros(6).long(), reduction="none").dot(torch.arange(6.0, dtype=z.dtype) + 1) / 4
    ),
    "split_into_samples": lambda z, h: torch.stack([s.square().sum() for s in z.unbind(0)]).mean(),
}


def first(out):
    return out[0] if isinstance(out, tuple) else out


def measured(model, x, **options):
    noise = normkern.GradientNoise(model, ("nsr", "norms"), check=True, **options)
    with noise:
        first(model(x)).square().mean().backward() if model.scalar is False else first(model(x)).sum().backward()
    return noise.result()


def of(end):
    torch.manual_seed(0)
    model, x = Ending(end), torch.randn(SAMPLES, 5)
    with torch.no_grad():
        model.scalar = first(model(x)).numel() == 1
    return model, x


@pytest.mark.parametrize("uncovered", ["raise", "exclude", "estimate"])
@pytest.mark.parametrize("name", COUPLED)
def test_samples_coupled_in_the_model_are_refused(name, uncovered):
    model, x = of(COUPLED[name])
    with refuses("returns a tensor .*samples are mixed"):
        measured(model, x, uncovered=uncovered)


@pytest.mark.parametrize("name", SEPARABLE)
def test_sums_in_the_model_are_measured(name):
    model, x = of(SEPARABLE[name])
    result = measured(model.double(), x.double())
    assert (result.sq_norms > 0).all()


def test_coupled_output_that_the_loss_does_not_use_is_no_error():
    """A model that returns statistics of the batch besides its output."""
    model, x = of(lambda z, h: (z, h.var(0, unbiased=False), balance_loss(h)))
    model, x = model.double(), x.double()
    norms = [
        sum(
            g.square().sum()
            for g in torch.autograd.grad(model(x[b : b + 1])[0].square().mean(), list(model.parameters()))
        )
        for b in range(SAMPLES)
    ]
    torch.testing.assert_close(measured(model, x).sq_norms, torch.stack(norms), rtol=1e-10, atol=0)


#: Whether the loss of the outputs and targets is a sum over samples, as far as it can be seen.
LOSSES = {
    "cross_entropy_sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), True),
    "module_sum": (lambda z, y: nn.CrossEntropyLoss(reduction="sum")(z, y), True),
    "mse_sum": (lambda z, y: F.mse_loss(z, torch.ones_like(z), reduction="sum"), True),
    "squares_sum": (lambda z, y: z.square().sum(), True),
    "sum_of_means": (lambda z, y: z.square().mean(1).sum(), True),
    "sums_added": (lambda z, y: z.square().sum() + F.cross_entropy(z, y), True),
    "mean": (lambda z, y: F.cross_entropy(z, y), False),
    "sum_of_features_then_mean": (lambda z, y: z.square().sum(1).mean(), False),
    "mean_over_batch_then_sum": (lambda z, y: z.square().mean(0).sum(), False),
    "sum_divided": (lambda z, y: z.square().sum() / len(z), False),
    "sum_times_weight": (lambda z, y: F.cross_entropy(z, y, reduction="sum") * (1 / len(z)), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_that_is_a_sum_is_warned_about(name):
    loss, is_sum = LOSSES[name]
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(SAMPLES, 5), torch.randint(3, (SAMPLES,))
    for reduction in ("mean", "sum"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with normkern.GradientNoise(model, reduction=reduction):
                for _ in range(2):
                    loss(model(x), y).backward()
        assert len(caught) == (is_sum and reduction == "mean"), [str(w.message) for w in caught]
        for w in caught:
            assert str(w.message).startswith("GradientNoise: the loss is a sum over samples")
            assert 'reduction="sum"' in str(w.message)
            assert w.filename == __file__
