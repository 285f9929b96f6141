"""`MomentumSums`: norms and inner products of momentum buffers, derived from the sums of the steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .step_reader import Hyperparameters, Step


class MomentumSums:
    r"""Follows :math:`|b|^2` and :math:`\langle b,g\rangle`, b the buffer before the step, from step to step.

    For heavy ball :math:`u = -\eta b'`, so that :math:`|b'|^2` is known, and

    .. math::
        2\mu\langle b,g\rangle = |b' - \lambda w|^2 - \mu^2|b|^2 - |g|^2

    For nesterov :math:`u = -\eta\,((1+\mu) d + \mu^2 b)` with :math:`d = g + \lambda w` gives
    :math:`\langle w,b\rangle` and, given :math:`|b|^2`, :math:`\langle b,d\rangle`, from which the next
    :math:`|b|^2` follows; an error in the first is multiplied with :math:`\mu^2/(1+\mu)` at each step. Both for
    :math:`\langle w,g\rangle = 0`; with dampening tau b is in units of 1 - tau. Where b was not followed before,
    :math:`\langle b,g\rangle` counts as 0.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.buffer_sq = torch.full((rows,), torch.nan, dtype=torch.float64, device=device)

    def dots(self, step: Step) -> Tensor:
        """Return <b,g> of each row in this step."""
        x = step.sums
        if all(h.momentum == 0 or h.rule != "sgd" for h in step.groups):
            self.buffer_sq = torch.full_like(self.buffer_sq, torch.nan)
            return torch.zeros_like(x.weight_sq)
        numbers = [_numbers(h) for h in step.groups]
        lr, mu, decay, nesterov = step.row_index.of_groups(numbers, x.weight_sq.device).unbind(1)
        step_sq, step_dot = x.update_sq / lr.square(), -x.weight_update_dot / lr  # |s|^2 and <w,s>, u = -lr s
        followed = ~self.buffer_sq.isnan()
        unfollowed_dot = (step_sq - 2 * decay * step_dot + decay.square() * x.weight_sq) - x.grad_sq
        dot = (unfollowed_dot - mu.square() * self.buffer_sq) / (2 * mu)
        buffer_sq = step_sq
        if any(h.nesterov for h in step.groups):
            d_sq = x.grad_sq + decay.square() * x.weight_sq
            weight_dot = (step_dot - (1 + mu) * decay * x.weight_sq) / mu.square()
            rest = step_sq - (1 + mu).square() * d_sq
            of_dot, of_sq = 2 * mu.square() * (1 + mu), mu.square().square()
            guess = ((rest - of_dot * decay * weight_dot) / of_sq).clamp(min=0)
            before = torch.where(followed, self.buffer_sq, guess)
            d_dot = (rest - of_sq * before) / of_dot
            is_nesterov = nesterov > 0
            dot = torch.where(is_nesterov, d_dot - decay * weight_dot, dot)
            buffer_sq = torch.where(is_nesterov, mu.square() * before + d_sq + 2 * mu * d_dot, buffer_sq)
        most = (self.buffer_sq * x.grad_sq).clamp(min=0).sqrt()  # rounding may break the Cauchy-Schwarz inequality
        dot = torch.where(followed & dot.isfinite(), torch.minimum(torch.maximum(dot, -most), most), 0.0)
        self.buffer_sq = torch.where(buffer_sq.isfinite() & (mu > 0), buffer_sq, torch.nan)
        return dot


def _numbers(h: Hyperparameters) -> tuple[float, float, float, float]:
    return h.lr * (1 - h.dampening), h.momentum, h.weight_decay, float(h.nesterov)
