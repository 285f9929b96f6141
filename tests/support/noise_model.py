"""Simulations of scale-invariant weights whose gradients are noise: the world in which the theory's formulas are exact."""

import math
from types import SimpleNamespace

import torch


def start(chains, dim, weight_sq, seed):
    torch.set_num_threads(1)  # many small steps; conftest.py sets it back
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(chains, dim, generator=generator, dtype=torch.float64)
    return w * (math.sqrt(weight_sq) / w.norm(dim=1, keepdim=True)), generator


def tangential(w, unit_grad_sq, generator, previous=None, memory=0.0):
    """Gradients g with <w,g> = 0 and mean of |w|^2|g|^2 as given; `memory`: how much of the last one's noise is left."""
    xi = torch.randn(w.shape, generator=generator, dtype=torch.float64)
    if previous is not None:
        xi = memory * previous + math.sqrt(1 - memory**2) * xi
    sq = w.square().sum(1, keepdim=True)
    scale = math.sqrt(unit_grad_sq / (w.shape[1] - 1))
    return (xi - (xi * w).sum(1, keepdim=True) / sq * w) * (scale / sq.sqrt()), xi


class Means:
    """Of what a simulation saw after its burn-in."""

    def __init__(self):
        self.count, self.sums = 0, 0

    def add(self, w, new, grad, dot):
        n = w.square().sum(1)
        cosine = (w * new).sum(1) / (n.sqrt() * new.norm(dim=1))
        numbers = [n, grad.square().sum(1), (new - w).square().sum(1) / n, cosine.clamp(max=1).arccos().square(), dot]
        self.sums = self.sums + torch.stack([x.mean() for x in numbers])
        self.count += 1

    def told(self):
        n, g, u, angle, dot = (self.sums / self.count).tolist()
        return {"weight_sq": n, "grad_sq": g, "update": math.sqrt(u), "angle": math.sqrt(angle), "dot": dot}


def simulate(
    *, lr, weight_decay, momentum=0.0, nesterov=False, decoupled=False, unit_grad_sq=1.0, weight_sq, steps, burn=0,
    memory=0.0, chains=32, dim=256, seed=0,
):  # fmt: skip
    """SGD. `lr` may be a function of the step. `curve`: sqrt of the mean |w|^4 before each step and after the last."""
    w, generator = start(chains, dim, weight_sq, seed)
    buffer, xi, curve, means = torch.zeros_like(w), None, [], Means()
    for t in range(burn + steps):
        rate = lr(t) if callable(lr) else lr
        g, xi = tangential(w, unit_grad_sq, generator, xi, memory)
        dot = (buffer * g).sum(1)
        d = g if decoupled else g + weight_decay * w
        buffer = momentum * buffer + d
        s = d + momentum * buffer if nesterov else buffer
        new = (1 - rate * weight_decay if decoupled else 1) * w - rate * s
        curve.append(w.square().sum(1).square().mean().sqrt())
        if t >= burn:
            means.add(w, new, g, dot)
        w = new
    curve.append(w.square().sum(1).square().mean().sqrt())
    return SimpleNamespace(w=w, buffer=buffer, curve=torch.stack(curve).tolist(), **means.told())


def simulate_signs(rule, *, lr, weight_decay, beta1, beta2, weight_sq, steps, burn, chains=8, dim=256, seed=0):
    """AdamW without eps, or Lion."""
    w, generator = start(chains, dim, weight_sq, seed)
    m, v, means = torch.zeros_like(w), torch.zeros_like(w), Means()
    for t in range(1, burn + steps + 1):
        g, _ = tangential(w, 1.0, generator)
        if rule == "adamw":
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            s = m / (1 - beta1**t) / (v / (1 - beta2**t)).sqrt()
        else:
            s = (beta1 * m + (1 - beta1) * g).sign()
            m = beta2 * m + (1 - beta2) * g
        new = (1 - lr * weight_decay) * w - lr * s
        if t > burn:
            means.add(w, new, g, g.new_zeros(1))
        w = new
    return SimpleNamespace(**means.told())


class Invariant(torch.nn.Module):
    """A small loss that is scale-invariant in every row of `first`, exactly: no eps. Batches are numbers of seeds."""

    def __init__(self, rows=4, dim=12, norm=1.0):
        super().__init__()
        torch.set_num_threads(1)
        make = torch.Generator().manual_seed(5)
        first = torch.randn(rows, dim, generator=make, dtype=torch.float64)
        self.first = torch.nn.Parameter(first * norm / first.norm())
        self.register_buffer("last", torch.randn(rows, generator=make, dtype=torch.float64))
        self.register_buffer("teacher", torch.randn(dim, generator=make, dtype=torch.float64))

    def forward(self, batch, size=16):
        make = torch.Generator().manual_seed(batch)
        x = torch.randn(size, len(self.teacher), generator=make, dtype=torch.float64)
        h = torch.tanh(2 * x @ (self.first / self.first.norm(dim=1, keepdim=True)).T)
        return (h @ self.last - torch.tanh(x @ self.teacher)).square().mean()
