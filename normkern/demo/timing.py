"""Measures the time of a step that also returns its norms, with normkern and with torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import normkern

from .settings import ADAMWS, SGDS, Settings


@torch.no_grad()
def step_and_norms(optimizer: torch.optim.Optimizer, before: list[Tensor]) -> tuple[list[Tensor], ...]:
    """Take a step and return |w|, |g|, <w, g>, |u| and <w, u> of every parameter; `before` receives a copy of w.

    An optimizer of normkern returns them with the step. For another one torch's operations compute them, batched where
    torch can.
    """
    if isinstance(optimizer, (normkern.SGD, normkern.AdamW)):
        optimizer.step()
        s = optimizer.stats()
        return ([s.weight_norm], [s.grad_norm], [s.weight_grad_dot], [s.update_norm], [s.weight_update_dot])
    params = optimizer.param_groups[0]["params"]
    grads = [p.grad for p in params]
    torch._foreach_copy_(before, params)
    optimizer.step()
    updates = torch._foreach_sub(params, before)
    weight_grad_dots = [torch.dot(w.flatten(), g.flatten()) for w, g in zip(before, grads, strict=True)]
    weight_update_dots = [torch.dot(w.flatten(), u.flatten()) for w, u in zip(before, updates, strict=True)]
    weight_norms, grad_norms, update_norms = (list(torch._foreach_norm(x)) for x in (before, grads, updates))
    return weight_norms, grad_norms, weight_grad_dots, update_norms, weight_update_dots


def time_steps(model: nn.Module, settings: Settings, rounds: int = 300) -> dict[str, float]:
    """Return the median seconds of `step_and_norms` for every implementation of the optimizer that has trained.

    Each steps a copy of the weights with the last gradients.
    """
    optimizers = ADAMWS if settings.is_adamw else SGDS
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    runs = {}
    for name, construct in optimizers.items():
        params = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for copy, p in zip(params, model.parameters(), strict=True):
            copy.grad = None if p.grad is None else p.grad.clone()
        numbers = {"lr": settings.first_lr, "weight_decay": settings.weight_decay, **settings.hyperparameters}
        optimizer = construct(params, **numbers)
        runs[name] = partial(step_and_norms, optimizer, [torch.empty_like(p) for p in params])
    wait: Callable[[], object] = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    # The optimizers take turns, so that other load on the machine slows all of them.
    for _ in range(rounds):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    warm_up = rounds // 10
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}
