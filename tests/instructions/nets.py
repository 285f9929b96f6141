"""Three small networks: most of a step is what surrounds the arithmetic, and that is what a budget can watch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: A model and its loss, a mean over samples.
Task = tuple[nn.Module, Callable[[], Tensor]]


def perceptron() -> Task:
    """Three linear layers, one row per sample."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    inputs, target = torch.randn(8, 16), torch.randint(8, (8,))
    return model, lambda: F.cross_entropy(model(inputs), target)


def convolutional() -> Task:
    """Two convolutions with group norm, then a linear layer."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 8),
    )  # fmt: skip
    inputs, target = torch.randn(4, 3, 8, 8), torch.randint(8, (4,))
    return model, lambda: F.cross_entropy(model(inputs), target)


class Words(nn.Module):
    """Embedding, layer norm, a perceptron on every position, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.fc, self.out, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.head(x + self.out(F.gelu(self.fc(self.norm(x)))))


def sequence() -> Task:
    """Embedding and layers on (B, T, D)."""
    model = Words()
    ids = torch.randint(20, (4, 12))
    target = ids.roll(-1, 1).flatten()
    return model, lambda: F.cross_entropy(model(ids).flatten(0, 1), target)


NETS = {"perceptron": perceptron, "convolutional": convolutional, "sequence": sequence}
