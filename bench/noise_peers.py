"""The table of peers for gradient noise: which package does a job on a network. A maker turns a `Task` into `Watched`.

Each does a forward and a backward with statistics of the per-sample gradients; no optimizer steps. Where a package
returns the per-sample gradients, torch's sums of them are part of its time.

Looked at and left out: Opacus' other modes (functorch, expanded weights) and its fixed copies for modules of torch's;
private-transformers and fastDP 2.1, which need a torch of years ago; Cockpit 1.0, which is BackPACK underneath;
nanoGNS, whose kernel is for CUDA alone; JaxPrivacy, which has arrays of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import normkern

from .nets import Task


@dataclass(frozen=True)
class Statistics:
    """Statistics of the per-sample gradients g_b that a step has found. None: the job does not ask for it."""

    trace_sigma: Tensor | None = None
    sq_norms: Tensor | None = None
    variance: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Watched:
    """One forward and backward of one peer. run: what is timed. statistics: returns those of the last run."""

    run: Callable[[], object]
    statistics: Callable[[], Statistics]


Maker = Callable[[Task], Watched]


def plain(task: Task) -> Watched:
    """Plain forward and backward, whose time is the unit for all peers."""

    def run() -> None:
        task.model.zero_grad()
        task.value().backward()

    return Watched(run, Statistics)


def ours(task: Task, stats: tuple[str, ...]) -> Watched:
    noise = normkern.GradientNoise(task.model, stats)
    results: list[Any] = []

    def run() -> None:
        task.model.zero_grad()
        with noise:
            task.value().backward()
        results[:] = [noise.result()]

    def statistics() -> Statistics:
        norms, variance = (getattr(results[0], tier, None) for tier in ("sq_norms", "variance"))  # None: not asked for
        return Statistics(results[0].trace_sigma, norms, variance)

    return Watched(run, statistics)


def of_rows(rows: dict[str, Tensor]) -> Statistics:
    """Compute the statistics of per-sample gradients in memory, (B, *shape) each, and overwrite them.

    By the fastest operations that torch has for it: var(0) takes twice as long, and squares out of place more memory.
    """
    sq_norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in rows.values()]).square().sum(0)
    variance = {name: g.sub_(g.mean(0)).square_().sum(0) / (len(g) - 1) for name, g in rows.items()}
    return Statistics(None, sq_norms, variance)


def torch_func(task: Task) -> Watched:
    """As torch documents it: vmap over grad of the loss of one sample."""
    named = {name: p.detach() for name, p in task.model.named_parameters()}
    found: list[Statistics] = []

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(task.model, parameters, (x.unsqueeze(0),))
        return task.loss(out, y.unsqueeze(0))

    every = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> None:
        found[:] = [of_rows(every(named, task.inputs, task.target))]

    return Watched(run, lambda: found[0])


def opacus_hooks(task: Task) -> Watched:
    from opacus import GradSampleModule

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GradSampleModule(task.model, loss_reduction="mean")
    found: list[Statistics] = []

    def run() -> None:
        model.zero_grad()
        task.loss(model(task.inputs), task.target).backward()
        rows = {name: p.grad_sample for name, p in task.model.named_parameters()}
        found[:] = [of_rows(rows)]
        for p in model.parameters():
            p.grad_sample = None

    return Watched(run, lambda: found[0])


def opacus_ghost(task: Task) -> Watched:
    """Norms without the gradients: what its fast clipping computes in its first backward."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GradSampleModuleFastGradientClipping(task.model, loss_reduction="mean", max_grad_norm=1.0)
    found: list[Statistics] = []

    def run() -> None:
        model.zero_grad()
        task.loss(model(task.inputs), task.target).backward()
        found[:] = [Statistics(None, model.get_norm_sample().square())]

    return Watched(run, lambda: found[0])


def backpack(task: Task, variance: bool) -> Watched:
    """BackPACK's biased statistics of c_b = g_b / B, converted to the units of the others outside of its time."""
    from backpack import backpack as context
    from backpack import extend, extensions

    model, found = extend(task.model), list[Statistics]()
    asked = [extensions.BatchL2Grad(), *([extensions.Variance()] if variance else [])]

    def run() -> None:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with context(*asked):
                task.loss(model(task.inputs), task.target).backward()
        named = dict(task.model.named_parameters())
        sq_norms = torch.stack([p.batch_l2 for p in named.values()]).sum(0)
        found[:] = [Statistics(None, sq_norms, {n: p.variance for n, p in named.items()} if variance else None)]

    def statistics() -> Statistics:
        batch = len(task.inputs)
        unit, of_variance = batch**2, batch**3 / (batch - 1)
        said = found[0]
        spread = said.variance and {n: v * of_variance for n, v in said.variance.items()}
        return Statistics(None, said.sq_norms * unit if said.sq_norms is not None else None, spread)

    return Watched(run, statistics)


# --- the table --------------------------------------------------------------------------------------------------------

#: Job -> the fields of `Statistics` that it asks for.
JOBS: dict[str, tuple[str, ...]] = {
    "forward + backward": (),
    "noise scale": ("trace_sigma",),
    "norms": ("sq_norms",),
    "norms + variance": ("sq_norms", "variance"),
}
PLAIN = "plain"


@dataclass(frozen=True)
class NoisePeer:
    """One peer in one job. needs: packages to import, as (module, name on the index)."""

    name: str
    job: str
    make: Maker
    needs: tuple[tuple[str, str], ...] = ()

    def missing(self) -> str:
        """Return what must be installed first, or ""."""
        absent = [package for module, package in self.needs if importlib.util.find_spec(module) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""


# Without opt_einsum, einsum goes from left to right: BackPACK's variance of a Linear with T > 1 needs B T O I numbers.
BACKPACK = (("backpack", "backpack-for-pytorch"), ("opt_einsum", "opt_einsum"))
OPACUS = (("opacus", "opacus"),)
part = functools.partial

NOISE_PEERS: tuple[NoisePeer, ...] = (
    NoisePeer(PLAIN, "forward + backward", plain),
    NoisePeer("normkern nsr", "noise scale", part(ours, stats=("nsr",))),
    NoisePeer("normkern norms", "norms", part(ours, stats=("norms",))),
    NoisePeer("normkern norms + variance", "norms + variance", part(ours, stats=("norms", "variance"))),
    NoisePeer("BackPACK L2", "norms", part(backpack, variance=False), BACKPACK),
    NoisePeer("BackPACK L2 + Variance", "norms + variance", part(backpack, variance=True), BACKPACK),
    NoisePeer("Opacus ghost", "norms", opacus_ghost, OPACUS),
    NoisePeer("Opacus hooks", "norms + variance", opacus_hooks, OPACUS),
    NoisePeer("torch.func", "norms + variance", torch_func),
)
