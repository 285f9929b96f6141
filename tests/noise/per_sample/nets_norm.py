"""Normalisation layers, by torch and by hand."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, classes, numbers

NORM = Cases()


def stack(*layers):
    return nn.Sequential(*layers)


@NORM()
def layer_norm():
    """After Linear layers on (B, D)."""
    return classes(
        stack(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 4)), 5, 6
    )


@NORM()
def layer_norm_of_rows():
    """On (B, T, D), without bias, and without parameters."""
    net = stack(
        nn.LayerNorm(6), nn.Linear(6, 8), nn.LayerNorm(8, bias=False), nn.Tanh(), nn.Linear(8, 6),
        nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2),
    )  # fmt: skip
    return numbers(net, 4, 5, 6)


@NORM()
def layer_norm_over_two_dimensions():
    """normalized_shape (T, D), and (C, H, W)."""
    net = stack(
        nn.Linear(6, 4),
        nn.LayerNorm((5, 4)),
        nn.Tanh(),
        nn.Unflatten(1, (5, 1)),
        nn.LayerNorm((5, 1, 4)),
        nn.Linear(4, 2),
    )
    return numbers(net, 4, 5, 6)


@NORM()
def layer_norm_cube():
    """B = T = D, over one dimension and over two."""
    return numbers(stack(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm((4, 4)), nn.Linear(4, 4)), 4, 4, 4)


@NORM()
def group_norm():
    """On images, rows and plain vectors."""
    net = stack(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Flatten(2), nn.GroupNorm(1, 6), nn.Conv1d(6, 4, 3),
        nn.GroupNorm(4, 4), nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 8), nn.GroupNorm(2, 8),
    )  # fmt: skip
    return numbers(net, 4, 3, 5, 6)


@NORM()
def instance_norm():
    """InstanceNorm2d and 1d with weights."""
    net = stack(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Flatten(2), nn.InstanceNorm1d(4, affine=True),
        nn.Conv1d(4, 3, 2), nn.InstanceNorm1d(3), nn.Tanh(),
    )  # fmt: skip
    return numbers(net, 4, 3, 6, 6)


@NORM()
def instance_norm_3d_of_running_statistics():
    """In eval with running statistics: an affine map."""
    net = stack(nn.Conv3d(2, 3, 2), nn.InstanceNorm3d(3, affine=True, track_running_stats=True), nn.Tanh())
    for x in range(3):
        net(torch.randn(4, 2, 4, 3, 3) + x)
    return numbers(net.eval(), 4, 2, 4, 3, 3)


@NORM()
def rms_norm():
    """nn.RMSNorm over one and two dimensions."""
    net = stack(
        nn.Linear(6, 8), nn.RMSNorm(8), nn.Tanh(), nn.Linear(8, 4), nn.RMSNorm((5, 4), eps=1e-5), nn.Linear(4, 2)
    )
    return numbers(net, 4, 5, 6)


class LlamaNorm(nn.Module):
    """As language models write it; `offset`: Gemma's (1 + w)."""

    def __init__(self, size, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(size)), offset

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.type_as(x) if self.offset == 0 else (self.offset + self.weight) * y


@NORM()
def rms_norm_by_hand():
    """weight * normalised."""
    return numbers(
        stack(nn.Linear(6, 8), LlamaNorm(8), nn.SiLU(), nn.Linear(8, 6), LlamaNorm(6), nn.Linear(6, 2)), 4, 5, 6
    )


@NORM()
def rms_norm_by_hand_cube():
    """The same with B = T = D."""
    return numbers(stack(LlamaNorm(4), nn.Linear(4, 4), LlamaNorm(4), nn.Linear(4, 4)), 4, 4, 4)


@NORM()
def rms_norm_with_offset():
    """(1 + weight) * normalised: a function of the weight alone meets the samples."""
    return numbers(stack(nn.Linear(6, 8), LlamaNorm(8, 1.0), nn.SiLU(), nn.Linear(8, 2)), 4, 5, 6)


class FunctionalNorms(nn.Module):
    """The functions with raw parameters, and the 2d LayerNorm of segmentation nets."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.ones(6) + i) for i in range(4))
        self.body = nn.Conv2d(3, 6, 2)

    def forward(self, x):
        x = F.group_norm(self.body(x), 2, self.a, self.b)
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        x = self.c[:, None, None] * (x - mean) / (var + 1e-5).sqrt() + self.d[:, None, None]
        return F.layer_norm(torch.tanh(x).mean((2, 3)), (6,), self.b, self.a)


@NORM()
def norms_without_layers():
    """F.group_norm, F.layer_norm, weight[:, None, None] * x; parameters used twice."""
    return numbers(FunctionalNorms(), 4, 3, 5, 4)


def after_training(net, *shape):
    """In eval, with running statistics that are not 0 and 1."""
    net.train()
    with torch.no_grad():
        for k in range(4):
            net(torch.randn(shape) * (1 + k) + k)
    return net.eval()


@NORM()
def batch_norm_1d_in_eval():
    """On (B, D)."""
    net = stack(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False))
    return classes(after_training(net, 9, 6), 5, 6)


@NORM()
def batch_norm_of_rows_in_eval():
    """BatchNorm1d on (B, C, L), with B = C = L."""
    return numbers(after_training(stack(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Tanh()), 9, 4, 4), 4, 4, 4)


@NORM()
def batch_norm_2d_in_eval():
    """On images, and BatchNorm3d."""
    net = stack(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Unflatten(2, (2, 2)),
        nn.BatchNorm3d(4), nn.Flatten(2), nn.Conv1d(4, 2, 3),
    )  # fmt: skip
    return numbers(after_training(net, 7, 3, 6, 5), 4, 3, 6, 5)


class Half(nn.Module):
    """BatchNorm in eval inside a net that trains, as in fine-tuning of detectors."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.head(F.relu(self.norm(self.body(x))).mean((2, 3)))


@NORM()
def batch_norm_frozen_in_training():
    """The model trains; its BatchNorm does not."""
    return classes(Half().train(), 5, 3, 5, 5)
