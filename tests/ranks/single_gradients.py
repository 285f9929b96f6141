"""GradientNoise of all processes' samples is that of one process with the joint batch."""

import itertools

import pytest
import script
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import normkern

SCALARS = ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased", "nsr", "nsr_batch", "gns")


class Net(nn.Module):
    def __init__(self, hides=False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 7), nn.Linear(7, 3)
        self.odd = nn.Parameter(torch.linspace(1, 2, 7)) if hides else None
        self.double()

    def forward(self, x, odd=True):
        h = torch.tanh(self.first(x))
        if self.odd is not None and odd:
            h = h * Odd.apply(self.odd)
        return self.second(h)


class Odd(torch.autograd.Function):
    """What hides the samples."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def parts(world):
    """Batches of different sizes."""
    x = torch.randn(sum(range(2, 2 + world)) * 2, 4, dtype=torch.float64) + 1
    return x, list(x.split([2 * (2 + r) for r in range(world)]))


def squares(y, reduction):
    return y.square().sum(1).mean() if reduction == "mean" else y.square().sum()


def same(ours, theirs, tiers, own=None):
    for field in SCALARS:
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-9, atol=1e-12)
    assert ours.batch_size == theirs.batch_size
    for name, x in theirs.mean.items():
        torch.testing.assert_close(ours.mean[f"module.{name}"], x, rtol=1e-10, atol=1e-12)
        told, by = ours.per_param[f"module.{name}"], theirs.per_param[name]
        torch.testing.assert_close(told.trace_sigma, by.trace_sigma, rtol=1e-8, atol=1e-12)
        if "variance" in tiers:
            torch.testing.assert_close(ours.variance[f"module.{name}"], theirs.variance[name], rtol=1e-9, atol=1e-12)
    if "norms" in tiers:
        torch.testing.assert_close(ours.sq_norms, theirs.sq_norms[own], rtol=1e-10, atol=1e-12)


def joint_batch(rank, world):
    groups = [None, dist.new_group()]
    for tiers, reduction, group in itertools.product((("nsr",), ("nsr", "norms", "variance")), ("mean", "sum"), groups):
        alone = Net()
        model = Net()
        model.load_state_dict(alone.state_dict())
        ddp = nn.parallel.DistributedDataParallel(model, process_group=group)
        whole, mine = parts(world)
        begin = sum(len(x) for x in mine[:rank])
        noise, one = (normkern.GradientNoise(m, tiers, reduction=reduction) for m in (ddp, alone))
        for _ in range(2):
            ddp.zero_grad()
            alone.zero_grad()
            with noise:
                squares(ddp(mine[rank]), reduction).backward()
            with one:
                squares(alone(whole), reduction).backward()
            own = slice(begin, begin + len(mine[rank]))
            same(noise.result(sync=True), one.result(), tiers, own)
            same(noise.result(), one.result(), tiers, own)  # once more: nothing was used up
        of_own = noise.result(sync=False)
        assert of_own.batch_size == len(mine[rank])


def micro_batches(rank, world):
    """Two backwards a context, in no_sync the first."""
    alone, model = Net(), Net()
    model.load_state_dict(alone.state_dict())
    ddp = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(world, 2, 3, 4, dtype=torch.float64)
    noise, one = normkern.GradientNoise(ddp, "variance"), normkern.GradientNoise(alone, "variance")
    with noise:
        with ddp.no_sync():
            (squares(ddp(x[rank, 0]), "mean") / 2).backward()
        (squares(ddp(x[rank, 1]), "mean") / 2).backward()
    with one:
        squares(alone(x.view(-1, 4)), "mean").backward()
    same(noise.result(), one.result(), ("variance",))


def left_out(rank, world):
    """Where one process excludes a parameter all do, whether they use it or not."""
    for who in (range(world), [0]):
        alone, model = Net(hides=True), Net(hides=True)
        model.load_state_dict(alone.state_dict())
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        x = torch.randn(world, 3, 4, dtype=torch.float64)
        noise = normkern.GradientNoise(ddp, "variance", uncovered="exclude")
        with noise:
            squares(ddp(x[rank], rank in who), "mean").backward()
        result = noise.result()
        assert "module.odd" not in result.per_param
        assert "module.odd" in result.coverage.excluded
        if len(who) == world:
            one = normkern.GradientNoise(alone, "variance", uncovered="exclude")
            with one:
                squares(alone(x.view(-1, 4)), "mean").backward()
            same(result, one.result(), ("variance",))


def estimated(rank, world):
    """An estimate has no exact partner: all processes have the same, and what is not estimated is exact."""
    for tiers in ("nsr", "variance"):
        model, alone = (
            nn.Sequential(weight_norm(nn.Linear(4, 7)), nn.Tanh(), nn.Linear(7, 3)).double() for _ in range(2)
        )
        alone.load_state_dict(model.state_dict())
        ddp = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(world, 3, 4, dtype=torch.float64)
        noise, one = (normkern.GradientNoise(m, tiers, uncovered="estimate") for m in (ddp, alone))
        with noise:
            squares(ddp(x[rank]), "mean").backward()
        with one:
            squares(alone(x.view(-1, 4)), "mean").backward()
        ours, theirs = noise.result(), one.result()
        first = ours.trace_sigma.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, ours.trace_sigma)
        assert len(ours.coverage.estimated) == 3
        for name, told in theirs.per_param.items():
            by = ours.per_param[f"module.{name}"]
            torch.testing.assert_close(by.grad_sq_norm, told.grad_sq_norm, rtol=1e-9, atol=1e-12)
            if name.startswith("2."):
                torch.testing.assert_close(by.trace_sigma, told.trace_sigma, rtol=1e-9, atol=1e-12)
            else:
                assert 0.1 < by.trace_sigma / told.trace_sigma < 10


def refused(rank, world):
    ddp = nn.parallel.DistributedDataParallel(Net())
    x = torch.randn(3, 4, dtype=torch.float64)
    noise = normkern.GradientNoise(ddp)
    with ddp.no_sync():
        if rank != 1:
            with noise:
                squares(ddp(x), "mean").backward()
        with pytest.raises(RuntimeError, match=r"in every process, but rank 1 has measured nothing"):
            noise.result()
        noise = normkern.GradientNoise(ddp, "projections")
        with noise:
            squares(ddp(x), "mean").backward()
        with pytest.raises(RuntimeError, match=r"projections.*expected sync=False"):
            noise.result()
        assert noise.result(sync=False).projections.shape == (3,)


if __name__ == "__main__":
    script.run(joint_batch, micro_batches, left_out, estimated, refused)
