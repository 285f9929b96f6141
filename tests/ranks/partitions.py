"""Parameters that are split over processes without being DTensors: refused, or right."""

from functools import partial

import pytest
import script
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import clip_grad_norm_

import normkern

CPU = torch.device("cpu")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def own(rank, world):
    torch.manual_seed(1)
    x = torch.randn(8 * world, 8)
    return x, x[8 * rank : 8 * rank + 8]


def refused(call, *texts):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert all(text in str(caught.value) for text in texts), caught.value


def clipped_alone(rank, world, max_norm, steps=3):
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        opt.zero_grad()
        model(own(rank, world)[0]).square().mean().backward()
        norm = clip_grad_norm_(model.parameters(), max_norm)
        opt.step()
    return model, norm


def zero(rank, world):
    """Every rank has some of the parameters."""
    alone, expected = clipped_alone(rank, world, 0.1)
    for how in ("argument", "constructor"):
        for group in (None, "world", dist.group.WORLD):
            if how == "constructor" and group is dist.group.WORLD:
                continue  # ZeRO keeps options in its groups, and copies them
            more = {"max_norm": 0.1} if how == "constructor" else {}
            model = nn.parallel.DistributedDataParallel(net())
            opt = ZeroRedundancyOptimizer(
                model.parameters(),
                normkern.SGD,
                lr=0.5,
                stats="tensor",
                **more,
                **({} if group is None else {"group": group}),
            )
            argument = {"max_norm": 0.1} if how == "argument" else {}
            for _ in range(3):
                opt.zero_grad()
                model(own(rank, world)[1]).square().mean().backward()
                if group is None:
                    before = [p.detach().clone() for p in model.parameters()]
                    refused(partial(opt.step, **argument), "ZeroRedundancyOptimizer", 'group="world"')
                    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
                    break
                opt.step(**argument)
            if group is None:
                continue
            torch.testing.assert_close(opt.optim.last_grad_norm.float(), expected)
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(p, q)
            total = opt.optim.stats().scalars("grad_norm")["grad_norm/all"]
            assert abs(total / expected.item() - 1) < 1e-5, (total, expected)


def zero_without_clipping(rank, world):
    """Statistics are of whole parameters, of this rank's; there is no "all", and no noise of all."""
    model = nn.parallel.DistributedDataParallel(net())
    opt = ZeroRedundancyOptimizer(model.parameters(), normkern.SGD, lr=0.5, stats="tensor")
    model(own(rank, world)[1]).square().mean().backward()
    opt.step()
    scalars = opt.optim.stats().scalars("grad_norm")
    assert scalars
    assert not any(key.endswith("/all") for key in scalars), scalars
    pairs = ZeroRedundancyOptimizer(model.parameters(), normkern.SVAG, lr=0.5)
    pairs.optim.hold()
    model(own(rank, world)[1]).square().mean().backward()
    pairs.step()
    refused(pairs.optim.noise, "ZeroRedundancyOptimizer", "fully_shard")


def flat_shards(rank, world):
    """FSDP's first version, both kinds of its parameters."""
    alone, expected = clipped_alone(rank, world, 0.1)
    for originals in (True, False):
        for options, argument in (
            ({"stats": "tensor"}, {}),
            ({"stats": "row"}, {"max_norm": 0.1}),
            ({}, {"max_norm": 0.1}),
            ({"max_norm": 0.1}, {}),
        ):
            model = FullyShardedDataParallel(net(), use_orig_params=originals, device_id=CPU)
            opt = normkern.SGD(model.parameters(), lr=0.5, **options)
            model(own(rank, world)[1]).square().mean().backward()
            before = [p.detach().clone() for p in model.parameters()]
            refused(partial(opt.step, **argument), "FullyShardedDataParallel", "fully_shard")
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        svag = normkern.SVAG(model.parameters(), lr=0.5)
        refused(svag.step, "FullyShardedDataParallel", "fully_shard")
        model = FullyShardedDataParallel(net(), use_orig_params=originals, device_id=CPU)
        opt = normkern.SGD(model.parameters(), lr=0.5, max_norm=0.1, group="world")
        for _ in range(3):
            opt.zero_grad()
            model(own(rank, world)[1]).square().mean().backward()
            opt.step()
        torch.testing.assert_close(opt.last_grad_norm.float(), expected)
        with FullyShardedDataParallel.summon_full_params(model):
            for p, q in zip(model.parameters(), alone.parameters(), strict=originals):
                torch.testing.assert_close(p.detach().flatten()[: q.numel()], q.detach().flatten())
        opt.param_groups[0]["stats"] = "tensor"
        refused(opt.step, "fully_shard")


def flat_but_whole(rank, world):
    model = FullyShardedDataParallel(
        net(), use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD, device_id=CPU
    )
    opt = normkern.SGD(model.named_parameters(), lr=0.5, stats="tensor")
    _, expected = clipped_alone(rank, world, 0.1, steps=1)
    model(own(rank, world)[1]).square().mean().backward()
    torch.testing.assert_close(opt.step(max_norm=0.1).float(), expected)
    assert opt.stats().names == ["0.weight", "0.bias", "2.weight", "2.bias"]


def nonfinite_elsewhere(rank, world):
    """A rank that has no bad gradient says so; all raise."""
    model = net()
    params = list(model.parameters())[rank::world]
    opt = normkern.SGD(params, lr=0.5, max_norm=0.1, error_if_nonfinite=True, group="world")
    for p in params:
        p.grad = torch.full_like(p, torch.nan if rank == 0 else 1.0)
    refused(opt.step, "params[0] of param_groups[0]" if rank == 0 else "a parameter of another process")
    for norm_type in (1.0, torch.inf):
        opt = normkern.SGD(params, lr=0.5, max_norm=0.1, norm_type=norm_type, group=dist.group.WORLD)
        for p in params:
            p.grad = torch.full_like(p, rank + 1.0)
        opt.step()
        counts = [sum(p.numel() for p in list(model.parameters())[r::world]) for r in range(world)]
        expected = world if norm_type == torch.inf else sum((r + 1) * n for r, n in enumerate(counts))
        assert abs(opt.last_grad_norm.item() / expected - 1) < 1e-12


def dtensors_need_no_group(rank, world):
    model = fully_shard(net())
    opt = normkern.SGD(model.parameters(), lr=0.5, max_norm=0.1, group="world")
    model(own(rank, world)[1]).square().mean().backward()
    refused(opt.step, "DTensors", "group=None")
    opt = normkern.SGD(model.named_parameters(), lr=0.5, max_norm=0.1, stats="tensor")
    alone, expected = clipped_alone(rank, world, 0.1, steps=1)
    opt.step()
    torch.testing.assert_close(opt.last_grad_norm.float(), expected)
    total = opt.stats().scalars("grad_norm")["grad_norm/all"]
    assert abs(total / expected.item() - 1) < 1e-5
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q)


if __name__ == "__main__":
    script.run(zero, zero_without_clipping, flat_shards, flat_but_whole, nonfinite_elsewhere, dtensors_need_no_group)
