"""Gradients that cancel within every sample: what is left is rounding, and no fault of the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern

from .case import numbers
from .measuring import refuses
from .reference import contributions, expected


class Chooser(nn.Module):
    """A scorer of four candidates; the softmax does not see its last bias, which is used four times."""

    def __init__(self):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        return torch.cat([self.score(x[:, i]) for i in range(x.shape[1])], 1).log_softmax(1)


class PositionBias(nn.Module):
    """A bias of attention made by a network of its own, whose last bias the softmax does not see."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(4, 3)
        self.bias = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))
        self.register_buffer("positions", torch.randn(4, 4, 2))

    def forward(self, x):
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        scores = q @ q.transpose(-1, -2) + self.bias(self.positions).permute(2, 0, 1)
        return self.o(scores.softmax(-1))


class Triplet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, x):
        return F.triplet_margin_loss(*(self.body(x[:, i]) for i in range(3)), reduction="none")[:, None]


NETS = {
    "chooser": lambda: numbers(Chooser(), 8, 4, 5),
    "position_bias": lambda: numbers(PositionBias(), 3, 4, 8),
    "triplet": lambda: numbers(Triplet(), 6, 3, 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_cancelling_gradients_are_measured(name, dtype):
    for seed in range(10):
        torch.manual_seed(seed)
        problem = NETS[name]().to(dtype)
        noise = normkern.GradientNoise(problem.model)
        with noise:
            problem.value().backward()
        if dtype == torch.float32:
            wanted = expected(contributions(problem.to(torch.float64))).scalars["trace_sigma"]
            assert float(noise.result().trace_sigma) == pytest.approx(wanted, rel=1e-4)


def test_changed_gradient_that_cancels_is_found():
    torch.manual_seed(0)
    problem = NETS["chooser"]()
    problem.model.score[2].bias.register_hook(lambda g: g + 0.1)
    with refuses("'score.2.bias' .*do not add up to its gradient"), normkern.GradientNoise(problem.model):
        problem.value().backward()
