"""DistributedDataParallel in two gloo processes: the result of one process that has the whole batch."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.gloo import leave, run, start
from torch import nn

import normkern
from normkern.noise.per_sample.parallel import Shards

from .budgets import BUDGET, assert_says
from .measuring import problem_of, told_of

TIERS = ("nsr", "norms", "variance")


def parallel(rank, world, rendezvous, name, options):
    start(rank, world, rendezvous)
    problem = problem_of(name)
    each = problem.samples // world
    mine = slice(rank * each, (rank + 1) * each)
    part, told = problem.sample(mine.start, mine.stop), told_of(problem)
    # Of all processes' samples, but for the numbers per sample: everybody has those of its own.
    of_mine = {name: norms[mine] for name, norms in told.sq_norms_per_param.items()}
    told = replace(told, sq_norms=told.sq_norms[mine], sq_norms_per_param=of_mine)
    wrapped = nn.parallel.DistributedDataParallel(part.model, **options)
    noise = normkern.GradientNoise(wrapped, TIERS, check=True)
    for _ in range(3):
        wrapped.zero_grad()
        with noise:
            part.loss(wrapped(*part.inputs), part.target).backward()
        result = noise.result()
        assert result.batch_size == problem.samples
        named = dict(part.model.named_parameters())
        assert list(result.per_param) == list(named)  # the names of the model inside
        assert_says(result, told, TIERS, BUDGET[torch.float64])
        for n, p in named.items():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(grad, told.mean[n], rtol=1e-9, atol=1e-12)
    leave()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt_tied_by_module", {}),
        ("resnet", {"gradient_as_bucket_view": True}),
        ("two_losses_of_six", {"find_unused_parameters": True}),
    ],
)
def test_parallel(name, options, tmp_path):
    run(parallel, str(tmp_path / "rendezvous"), name, options)


class Mesh:
    """A device mesh as far as `Shards.group` looks at it."""

    def __init__(self, *shape):
        self.shape, self.ndim = shape, len(shape)

    def size(self):
        return math.prod(self.shape)

    def get_group(self):
        return self.shape


@pytest.mark.parametrize(
    ("shapes", "group"),
    [([(4,)], (4,)), ([(2,)], (2,)), ([(2, 2)], None), ([(2, 1)], "refused"), ([(4,), (2, 2)], "refused")],
)
def test_meshes_that_are_one_process_group(shapes, group, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    params = [nn.Parameter(torch.ones(1)) for _ in shapes]
    of = {id(p): SimpleNamespace(mesh_info=SimpleNamespace(mesh=Mesh(*s))) for p, s in zip(params, shapes, strict=True)}
    named = [(str(i), p) for i, p in enumerate(params)]
    if group == "refused":
        with pytest.raises(NotImplementedError, match=r"expected fully_shard\(\) with one mesh for all parameters"):
            Shards(of).group(named)
    else:
        assert Shards(of).group(named) == group
