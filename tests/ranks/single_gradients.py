"""GradientNoise of all processes' samples is that of one process with the joint batch."""

import itertools

import pytest
import script
import torch
import torch.distributed as dist
from torch import nn

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
            h = h * torch.dropout(self.odd, 1e-12, True)  # has no rule: random numbers are not drawn twice
        return self.second(h)


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
        torch.testing.assert_close(ours.mean[name], x, rtol=1e-10, atol=1e-12)
        told, by = ours.per_param[name], theirs.per_param[name]
        torch.testing.assert_close(told.trace_sigma, by.trace_sigma, rtol=1e-8, atol=1e-12)
        if "variance" in tiers:
            torch.testing.assert_close(ours.variance[name], theirs.variance[name], rtol=1e-9, atol=1e-12)
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
        assert "odd" not in result.per_param
        assert "odd" in result.coverage.excluded
        if len(who) == world:
            one = normkern.GradientNoise(alone, "variance", uncovered="exclude")
            with one:
                squares(alone(x.view(-1, 4)), "mean").backward()
            same(result, one.result(), ("variance",))


class Dropped(nn.Linear):
    """A linear layer whose weight goes through an operation without a way back."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.dropout(self.weight, 1e-12), self.bias)


def estimated(rank, world):
    """An estimate has no exact partner: all processes have the same, and what is not estimated is exact."""
    for tiers in ("nsr", "variance"):
        model, alone = (nn.Sequential(Dropped(4, 7), nn.Tanh(), nn.Linear(7, 3)).double() for _ in range(2))
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
        assert len(ours.coverage.estimated) == 2
        for name, told in theirs.per_param.items():
            by = ours.per_param[name]
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


def shares(world, samples=3):
    """Return a batch, and the part of each process."""
    x = torch.randn(world * samples, 4, dtype=torch.float64) + 1
    return x, x.view(world, samples, 4)


def mean_of_squares(model, x):
    return squares(model(x), "mean")


def inner_module(rank, world):
    """The module inside of DistributedDataParallel, which is all that a callback has, gives the joint numbers."""
    tiers = ("nsr", "norms", "variance")
    for group in (None, dist.new_group()):
        alone, model = Net(), Net()
        model.load_state_dict(alone.state_dict())
        ddp = nn.parallel.DistributedDataParallel(model, process_group=group)
        noise, one = normkern.GradientNoise(model, tiers), normkern.GradientNoise(alone, tiers)
        whole, mine = shares(world)
        own = slice(3 * rank, 3 * rank + 3)
        for _ in range(2):
            ddp.zero_grad()
            alone.zero_grad()
            with noise:
                mean_of_squares(ddp, mine[rank]).backward()
            with one:
                mean_of_squares(alone, whole).backward()
            same(noise.result(), one.result(), tiers, own)
        assert noise.result(sync=False).batch_size == 3
        with noise:
            mean_of_squares(model, mine[rank]).backward()  # past the reducer: still the same samples of all
        assert noise.result().batch_size == 3 * world
        grads = [p.grad for p in model.parameters()]
        before = [g.clone() for g in grads]
        expected = normkern.GradientNoise.measure(alone, mean_of_squares, whole, stats=tiers, sync=False)
        for given in (ddp, model):
            measured = normkern.GradientNoise.measure(given, mean_of_squares, mine[rank], stats=tiers)
            same(measured, expected, tiers, own)
            assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
            assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
        parts = [normkern.GradientNoise.measure(ddp, mean_of_squares, x, stats=tiers) for x in (mine[rank], mine[rank])]
        twice = normkern.GradientNoise.measure(
            alone, mean_of_squares, torch.cat([whole, whole]), stats="variance", sync=False
        )
        same(normkern.GradientNoiseResult.join(parts), twice, ("variance",))
        ddp.zero_grad()
        mean_of_squares(ddp, mine[rank]).backward()  # the reducer is as it was
        alone.zero_grad()
        mean_of_squares(alone, whole).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def failing_measurements(rank, world):
    """What fails in one process is an error in all, and no hang."""
    ddp = nn.parallel.DistributedDataParallel(Net())
    x = torch.randn(3, 4, dtype=torch.float64)

    def broken(model, x):
        if rank == 1:
            raise KeyError("of the user")
        return mean_of_squares(model, x)

    def infinite(model, x):
        return mean_of_squares(model, x) * (float("inf") if rank == 1 else 1.0)

    with pytest.raises(KeyError if rank == 1 else RuntimeError, match="of the user|rank 1 has measured nothing"):
        normkern.GradientNoise.measure(ddp, broken, x)
    with pytest.raises(FloatingPointError, match=r"GradientNoise.measure: the loss (is inf|of rank 1 is not finite)"):
        normkern.GradientNoise.measure(ddp, infinite, x)
    assert normkern.GradientNoise.measure(ddp, mean_of_squares, x).batch_size == 3 * world


def fully_sharded(rank, world):
    """fully_shard: the numbers of whole parameters, and gradients as without the context."""
    from torch.distributed.fsdp import fully_shard

    tiers = ("nsr", "norms", "variance")
    alone, model = Net(), Net()
    model.load_state_dict(alone.state_dict())
    fully_shard(model.first)
    fully_shard(model)
    whole, mine = shares(world)
    own = slice(3 * rank, 3 * rank + 3)
    expected = normkern.GradientNoise.measure(alone, mean_of_squares, whole, stats=tiers, sync=False)
    same(normkern.GradientNoise.measure(model, mean_of_squares, mine[rank], stats=tiers), expected, tiers, own)
    assert all(p.grad is None for p in model.parameters())
    noise = normkern.GradientNoise(model, tiers)
    mean_of_squares(alone, whole).backward()
    for _ in range(2):
        model.zero_grad()
        with noise:
            mean_of_squares(model, mine[rank]).backward()
        same(noise.result(), expected, tiers, own)
        grads = [p.grad for p in model.parameters()]
        for g, p in zip(grads, alone.parameters(), strict=True):
            torch.testing.assert_close(g.full_tensor(), p.grad)
    same(normkern.GradientNoise.measure(model, mean_of_squares, mine[rank], stats=tiers), expected, tiers, own)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    model.zero_grad()
    model.set_requires_gradient_sync(False)  # accumulation: measured in the middle of a step
    mean_of_squares(model, mine[rank]).backward()
    normkern.GradientNoise.measure(model, mean_of_squares, mine[rank])
    model.set_requires_gradient_sync(True)
    mean_of_squares(model, mine[rank]).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), 2 * q.grad)


def other_shards(rank, world):
    """Ways of sharding that give a process parts of gradients are refused, before anything runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    x = torch.randn(3, 4, dtype=torch.float64)
    cpu = torch.device("cpu")
    fsdp = [FullyShardedDataParallel(Net(), device_id=cpu, use_orig_params=o) for o in (True, False)]
    for model in (*fsdp, fsdp[0].module):
        with pytest.raises(
            NotImplementedError, match=r"^GradientNoise: '.*' is a shard of Fully.*fully_shard\(model\)"
        ):
            normkern.GradientNoise.measure(model, mean_of_squares, x)
        with pytest.raises(NotImplementedError, match="FSDP1"), normkern.GradientNoise(model):
            pass
    sharded = fully_shard(Net())
    parallel = parallelize_module(Net(), init_device_mesh("cpu", (world,)), {"first": ColwiseParallel()})
    for model in (parallel, sharded.first):
        with pytest.raises(NotImplementedError, match=r"is a DTensor that no fully_shard\(\) of this model's modules"):
            normkern.GradientNoise.measure(model, mean_of_squares, x)


if __name__ == "__main__":
    script.run(
        joint_batch, micro_batches, left_out, estimated, refused, inner_module, failing_measurements, fully_sharded,
        other_shards,
    )  # fmt: skip
