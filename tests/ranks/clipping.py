"""A step that clips by the norm of all ranks' gradients: the run of one process, with torch's clip and torch's step."""

import script
import torch
import torch.distributed as dist
from sums import Counted, halves, meshes, sharded_and_whole
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_

import normkern

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def follow(ours, theirs, opt, own_loss, whole_loss):
    """Six steps of both, of which some clip and some do not."""
    twin = torch.optim.SGD(theirs.parameters(), **OPTIONS)
    clipped = []
    for t in range(6):
        opt.zero_grad()
        twin.zero_grad()
        own_loss(ours, t).backward()
        whole_loss(theirs, t).backward()
        grads = [p.grad.detach().clone() for p in ours.parameters()]
        max_norm = (0.02, 50.0)[t % 2]
        norm, expected = opt.step(max_norm=max_norm), clip_grad_norm_(theirs.parameters(), max_norm)
        twin.step()
        torch.testing.assert_close(norm, expected, rtol=1e-10, atol=0)
        clipped.append(bool(expected > max_norm))
        for p, q, g in zip(ours.parameters(), theirs.parameters(), grads, strict=True):
            w = p.full_tensor() if hasattr(p, "full_tensor") else p
            torch.testing.assert_close(w.detach(), q.detach(), rtol=1e-9, atol=1e-12)
            g, now = ((x.to_local() if hasattr(x, "to_local") else x) for x in (g, p.grad))
            assert torch.equal(g, now)  # .grad is not written
    assert True in clipped
    assert False in clipped


def data_parallel(rank, world):
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    follow(
        wrapped, twin, normkern.SGD(model.parameters(), **OPTIONS),
        lambda m, t: m(halves(rank, world, t)[1][0]).square().mean(),
        lambda m, t: m(halves(rank, world, t)[0][0]).square().mean(),
    )  # fmt: skip


def fully_sharded(rank, world):
    """FSDP2, and on two dimensions HSDP; with statistics, which are of gradients before clipping, and without."""
    for mesh in meshes(world):
        for stats in (None, "row"):
            ours, theirs = sharded_and_whole(mesh)
            opt = normkern.SGD(ours.named_parameters(), stats=stats, **OPTIONS)
            follow(
                ours, theirs, opt,
                lambda m, t: m(halves(rank, world, t)[1][0]).square().mean(),
                lambda m, t: m(halves(rank, world, t)[0][0]).square().mean(),
            )  # fmt: skip
            if stats:
                squares = torch.stack([q.grad.square().sum() for q in theirs.parameters()])
                told = torch.stack([opt.stats().grad_sq[s].sum() for s in opt.stats().slots.values()])
                torch.testing.assert_close(told, squares)  # theirs is clipped in place, at the last step by nothing


def some_of_torch(rank, world):
    """DTensors beside whole tensors, by the kernel and by torch's loop."""
    mesh = next(meshes(world))
    for differentiable in (False, True):
        torch.manual_seed(2)
        wholes = [torch.randn(shape, dtype=torch.float64) for shape in ((7, 3), (5,), (4, 4))]
        places = [[Shard(0)], None, [Replicate()]]

        def lay(x, place):
            return x.clone() if place is None else distribute_tensor(x.clone(), mesh, place)

        ours, theirs = [lay(w, place) for w, place in zip(wholes, places, strict=True)], [w.clone() for w in wholes]
        opt = normkern.SGD(ours, differentiable=differentiable, **OPTIONS)
        twin = torch.optim.SGD(theirs, **OPTIONS)
        for max_norm in (0.5, 1e3):
            for p, q, place in zip(ours, theirs, places, strict=True):
                q.grad = torch.randn_like(q)
                p.grad = lay(q.grad, place)
            expected = clip_grad_norm_(theirs, max_norm)
            torch.testing.assert_close(opt.step(max_norm=max_norm), expected, rtol=1e-12, atol=0)
            twin.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.full_tensor() if hasattr(p, "full_tensor") else p, q)


def one_small_all_reduce(rank, world):
    """Of a number per parameter, where anything is split."""
    ours, _ = sharded_and_whole(next(meshes(world)))
    opt = normkern.SGD(ours.parameters(), **OPTIONS)
    ours(torch.ones(3, 5, dtype=torch.float64)).square().mean().backward()
    with Counted() as counted:
        opt.step(max_norm=1.0)
    assert counted.sizes == [len(list(ours.parameters()))], counted.sizes


def a_scaler_skips_everywhere(rank, world):
    """One rank's NaN is everybody's norm, and nobody steps."""
    ours, _ = sharded_and_whole(next(meshes(world)))
    opt = normkern.SGD(ours.parameters(), **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.full_tensor().clone() for p in ours.parameters()]
    scaler.scale(ours(torch.ones(3, 5, dtype=torch.float64)).square().mean()).backward()
    if rank == 0:
        next(ours.parameters()).grad.to_local().fill_(torch.nan)
    norm = scaler.step(opt, max_norm=1.0)
    scaler.update()
    assert norm is None or norm.isnan(), norm
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p.full_tensor(), w) for p, w in zip(ours.parameters(), before, strict=True))
    dist.barrier()


if __name__ == "__main__":
    script.run(data_parallel, fully_sharded, some_of_torch, one_small_all_reduce, a_scaler_skips_everywhere)
