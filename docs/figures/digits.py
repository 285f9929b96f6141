"""Data and networks of the pictures. Some labels are wrong in every batch, so that gradient noise does not vanish."""

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def data() -> tuple[Tensor, Tensor]:
    """Return images, (1797, 1, 8, 8) from 0 to 1, and labels."""
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    return images.float().view(-1, 1, 8, 8) / 16, labels


def convnet(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Return two convolutions, each with a norm, and a linear layer."""
    norms = [norm(c) if norm is nn.BatchNorm2d else norm(2, c) for c in (8, 16)]
    first = [nn.Conv2d(1, 8, 3, bias=False), norms[0], nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, bias=False), norms[1], nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(256, 10))


#: Names of the parameters of `convnet` in the pictures.
NAMES = {"0.weight": "first convolution", "3.weight": "second convolution", "7.weight": "last layer"}


def batches(steps: int, size: int = 32, wrong: float = 0.1, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random batches; other labels are wrong each time."""
    images, labels = data()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        i = torch.randint(len(images), (size,), generator=generator)
        guess = torch.randint(10, (size,), generator=generator)
        yield images[i], torch.where(torch.rand(size, generator=generator) < wrong, guess, labels[i])
