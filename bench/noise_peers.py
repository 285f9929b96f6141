"""The table of peers in gradient noise: who does a job on a network. A maker takes a `Task`, returns a `Watched` step.

Everybody does a forward and a backward, and statistics of the per-sample gradients besides; nobody steps an optimizer.
Where a package gives the single gradients, torch's own sums of them are part of its time.

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
class Told:
    """What a step found out of the gradients g_b of single samples. None: the job does not ask for it."""

    trace_sigma: Tensor | None = None
    sq_norms: Tensor | None = None
    variance: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Watched:
    """One forward and backward of one peer. run: what gets timed. told: of the last run."""

    run: Callable[[], object]
    told: Callable[[], Told]


Maker = Callable[[Task], Watched]


def plain(task: Task) -> Watched:
    """What everybody's time is a multiple of."""

    def run() -> None:
        task.model.zero_grad()
        task.value().backward()

    return Watched(run, Told)


def ours(task: Task, stats: tuple[str, ...]) -> Watched:
    noise = normkern.GradientNoise(task.model, stats)
    results: list[Any] = []

    def run() -> None:
        task.model.zero_grad()
        with noise:
            task.value().backward()
        results[:] = [noise.result()]

    def told() -> Told:
        return Told(results[0].trace_sigma, results[0].sq_norms, results[0].variance)

    return Watched(run, told)


def of_rows(rows: dict[str, Tensor]) -> Told:
    """Statistics of gradients that lie there, (B, *shape) each, which are gone afterwards.

    By the fastest operations that torch has for it: var(0) takes twice as long, and squares out of place more memory.
    """
    sq_norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in rows.values()]).square().sum(0)
    variance = {name: g.sub_(g.mean(0)).square_().sum(0) / (len(g) - 1) for name, g in rows.items()}
    return Told(None, sq_norms, variance)


def torch_func(task: Task) -> Watched:
    """As torch documents it: vmap over grad of the loss of one sample."""
    named = {name: p.detach() for name, p in task.model.named_parameters()}
    found: list[Told] = []

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
    found: list[Told] = []

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
    found: list[Told] = []

    def run() -> None:
        model.zero_grad()
        task.loss(model(task.inputs), task.target).backward()
        found[:] = [Told(None, model.get_norm_sample().square())]

    return Watched(run, lambda: found[0])


def backpack(task: Task, variance: bool) -> Watched:
    """Statistics of c_b = g_b / B, biased: told in the units of the others, outside of its time."""
    from backpack import backpack as context
    from backpack import extend, extensions

    model, found = extend(task.model), list[Told]()
    asked = [extensions.BatchL2Grad(), *([extensions.Variance()] if variance else [])]

    def run() -> None:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with context(*asked):
                task.loss(model(task.inputs), task.target).backward()
        named = dict(task.model.named_parameters())
        sq_norms = torch.stack([p.batch_l2 for p in named.values()]).sum(0)
        found[:] = [Told(None, sq_norms, {n: p.variance for n, p in named.items()} if variance else None)]

    def told() -> Told:
        batch = len(task.inputs)
        unit, of_variance = batch**2, batch**3 / (batch - 1)
        said = found[0]
        spread = said.variance and {n: v * of_variance for n, v in said.variance.items()}
        return Told(None, said.sq_norms * unit if said.sq_norms is not None else None, spread)

    return Watched(run, told)


# --- the table --------------------------------------------------------------------------------------------------------

#: What is asked for: fields of `Told`.
JOBS: dict[str, tuple[str, ...]] = {
    "forward + backward": (),
    "noise scale": ("trace_sigma",),
    "norms": ("sq_norms",),
    "norms + variance": ("sq_norms", "variance"),
}
PLAIN = "plain"


@dataclass(frozen=True)
class NoisePeer:
    """One competitor in one job. needs: packages to import, as (module, name on the index)."""

    name: str
    job: str
    make: Maker
    needs: tuple[tuple[str, str], ...] = ()

    def missing(self) -> str:
        """What must be installed first, or ""."""
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
