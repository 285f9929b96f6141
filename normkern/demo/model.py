"""The demo's network: a small batch-normalised ResNet, its param groups and its accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import invariance
from .settings import WEIGHT_DECAY


def conv_norm(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution and the BatchNorm that makes its weights scale-invariant."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False),
        # At equilibrium the weights turn by a degree a step: averages over the usual ten batches would be out of date.
        nn.BatchNorm2d(channels_out, momentum=0.3),
    )


class Block(nn.Module):
    """Two convolutions and the shortcut around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(channels_in, channels_out, 3, stride)
        self.second = conv_norm(channels_out, channels_out, 3)
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Images (n, 1, 8, 8) -> logits (n, 10): three blocks, at 8 x 8, 4 x 4 and 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(1, 16, 3)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def find_groups(
    model: nn.Module, images: Tensor, labels: Tensor, decay: str = "coupled", weight_decay: float = WEIGHT_DECAY
) -> list[dict[str, Any]]:
    """Return param groups, found by measurement on a few images; only the scale-invariant parameters decay."""
    found = invariance.find(model, F.cross_entropy, [(images[:16], labels[:16])], granularity="tensor")
    decaying: dict[str, Any] = {"weight_decay": weight_decay}
    if decay == "exponential":
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        decaying |= {"decay": decay, "norm_buffers": norms, "followers": []}
    return invariance.param_groups(model, found, scale_invariant=decaying)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of the images that the model, in eval mode, classifies correctly."""
    model.eval()
    right = model(images).argmax(dim=1) == labels
    return float(right.double().mean())
