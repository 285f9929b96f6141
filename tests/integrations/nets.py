"""A small residual net with BatchNorm and dropout, and images for it."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def residual_net():
    stem = [nn.Conv2d(1, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, Block(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3))


def images(count=64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=generator)
    kinds = torch.randn(3, 1, 6, 6, generator=generator)
    return torch.utils.data.TensorDataset(
        kinds[labels] + 0.5 * torch.randn(count, 1, 6, 6, generator=generator), labels
    )
