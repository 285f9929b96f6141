"""One training step of an ensemble, and learning rate schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .data import Batch, loss_of
from .nets import Ensemble

Schedule = Callable[[int], float]


def take_step(net: Ensemble, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward, backward, step."""
    optimizer.zero_grad()
    loss_of(net(batch.images), batch.labels).backward()
    optimizer.step()


def step_decay(lr: float, milestones: list[int], gamma: float = 0.1) -> Schedule:
    """lr, multiplied with gamma at each milestone."""
    return lambda step: lr * gamma ** sum(step >= m for m in milestones)


def cosine(lr: float, steps: int) -> Schedule:
    """From lr down to a hundredth of it, where the exponential learning rate is still a number."""
    return lambda step: lr * (0.01 + 0.99 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of all param groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def log_steps(steps: int, per_octave: int = 2) -> list[int]:
    """Steps at which to look: so many in each doubling, and the last."""
    count = round(math.log2(steps) * per_octave)
    return sorted({min(steps, round(2 ** (i / per_octave))) for i in range(count + 1)} | {steps})
