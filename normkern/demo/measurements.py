"""Derives the demo's numbers from the statistics of the steps, and what theory predicts for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import normkern

from .settings import ADAMW_BETAS, ADAMW_WEIGHT_DECAY, MOMENTUM, WEIGHT_DECAY


def measured(steps: list[normkern.StepStats], names: list[str]) -> tuple[Tensor, Tensor]:
    """Return effective LR and angular update of the named parameters, both (steps, names) on the CPU."""
    slots = [steps[0].slots[name].start for name in names]
    effective_lr = torch.stack([step.effective_lr for step in steps])
    angular_update = torch.stack([step.angular_update for step in steps])
    return effective_lr[:, slots].cpu(), angular_update[:, slots].cpu()


def root_mean_square(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the root mean square over all of `x`, or over one of its dimensions."""
    return x.square().mean(dim).sqrt()


def predicted_angle(lr: float, is_adamw: bool = False) -> float:
    r"""Return the angular update at equilibrium, in radians: :math:`\sqrt{2 \eta \lambda / (1 + \mu)}`.

    The root mean square over the steps, for scale-invariant weights under SGD with momentum and coupled weight decay;
    :math:`\sqrt{2 \eta \lambda (1-\beta_1) / (1+\beta_1)}` under AdamW (arXiv 2006.08419; arXiv 2305.17212). It
    depends neither on the network nor on the data.
    """
    if is_adamw:
        beta1 = ADAMW_BETAS[0]
        return math.sqrt(2 * lr * ADAMW_WEIGHT_DECAY * (1 - beta1) / (1 + beta1))
    return math.sqrt(2 * lr * WEIGHT_DECAY / (1 + MOMENTUM))


def exponential_lr(optimizer: normkern.SGD, lr: float) -> float:
    """Return the learning rate of the run without weight decay: lr / a^2, where a is all the decay so far."""
    scale, _, exponent = optimizer.param_groups[0].get("gauge", normkern.ops.NEW_GAUGE)
    return math.ldexp(lr / scale**2, 2 * exponent)
