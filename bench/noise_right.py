"""Checks a peer's gradient noise on a small net of the same layers, against a loop over samples in float64."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .nets import Net, Task
from .noise_peers import JOBS, NoisePeer, Statistics

#: Relative to the largest of the compared numbers: float32 through a few layers and norms.
TOLERANCE = 1e-3


def small_task(net: Net) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return net.small()


def truth(task: Task) -> Statistics:
    """Return all statistics, by their definitions."""
    task = task.to(torch.float64)
    named = dict(task.model.named_parameters())
    samples = zip(task.inputs.split(1), task.target.split(1), strict=True)
    rows = [torch.autograd.grad(task.loss(task.model(x), y), list(named.values())) for x, y in samples]
    gradients = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(named)}
    sq_norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    variance = {name: g.var(0) for name, g in gradients.items()}
    return Statistics(torch.stack([v.sum() for v in variance.values()]).sum(), sq_norms, variance)


@functools.cache
def fault(peer: NoisePeer, net_name: str) -> str:
    """Return why a peer is not timed on this net, or "". An exception is a reason, too."""
    from .nets import NETS

    if reason := peer.missing():
        return reason
    net = NETS[net_name]
    try:
        watched = peer.make(small_task(net))
        for _ in range(2):  # the second run finds what the first has left
            watched.run()
        return _difference(watched.statistics(), truth(small_task(net)), JOBS[peer.job])
    except Exception as error:
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _difference(got: Statistics, wanted: Statistics, asked: tuple[str, ...]) -> str:
    for field in asked:
        found, right = getattr(got, field), getattr(wanted, field)
        if found is None:
            return f"wrong: it does not tell {field}"
        if isinstance(right, dict):
            if found.keys() != right.keys():
                return f"wrong: {field} of {len(found)} parameters, expected {len(right)}"
            off = max(_off(found[name], right[name], max(map(_largest, right.values()))) for name in right)
        else:
            off = _off(found, right, _largest(right))
        if not off < TOLERANCE:
            return f"wrong: {field} is off by {off:.1e} of its size"
    return ""


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _off(got: Tensor, wanted: Tensor, overall: float) -> float:
    """A tensor of its own small size counts by that; one that is 0 but for rounding by the others'."""
    return float((got.double() - wanted).abs().max()) / max(_largest(wanted), 1e-4 * overall)
