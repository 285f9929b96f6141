"""Image features written into a text by masked_scatter, as vision-language models do."""

import pytest
import torch
from torch import nn

import normkern

from .measuring import refuses


class Captions(nn.Module):
    """Placeholders, id 0, are replaced by the features of the sample's images."""

    def __init__(self):
        super().__init__()
        self.vision, self.words, self.out = nn.Linear(3, 8), nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, ids, images):
        features = self.vision(images).flatten(0, 1)
        text = self.words(ids)
        return self.out(torch.tanh(text.masked_scatter((ids == 0)[..., None].expand_as(text), features)))


def batch(counts):
    """Texts with so many placeholders, two images each."""
    torch.manual_seed(0)
    ids = torch.randint(1, 9, (4, 6))
    for row, count in zip(ids, counts, strict=True):
        row[1 : 1 + count] = 0
    return ids, torch.randn(4, 2, 3, dtype=torch.float64)


def test_features_of_the_own_sample_are_measured():
    torch.manual_seed(1)
    model, (ids, images) = Captions().double(), batch((2, 2, 2, 2))
    noise = normkern.GradientNoise(model, ("norms",), check=True)
    with noise:
        model(ids, images).square().mean().backward()
    for b, got in enumerate(noise.result().sq_norms):
        loss = model(ids[b : b + 1], images[b : b + 1]).square().mean()
        wanted = sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("uncovered", ["raise", "exclude", "estimate"])
def test_features_of_another_sample_are_refused(uncovered):
    model, given = Captions().double(), batch((3, 1, 2, 2))
    with refuses("masked_scatter"), normkern.GradientNoise(model, uncovered=uncovered):
        model(*given).square().mean().backward()
